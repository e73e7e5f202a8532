"""Ids become text piece by piece: nothing is lost, and nobody sees half a character."""

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.text import REPLACEMENT, Detokenizer


def push_all(tokenizer: Any, steps: Sequence[Sequence[int]]) -> tuple[list[str], str]:
    """The pieces as they came, and the whole text."""
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push(ids) for ids in steps]
    return [*pieces, detokenizer.flush()], detokenizer.text


@pytest.mark.parametrize("text", ["Giá vé là 18,50 cua-rôn, thưa ông.", "🚚🚢 👩‍👩‍👧‍👦 é", "東京まで", "plain"])
def test_characters_split_over_tokens_are_shown_whole(tokenizer: Any, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) == len(text.encode())
    pieces, whole = push_all(tokenizer, [[token] for token in ids])
    assert whole == "".join(pieces) == text
    assert not any(REPLACEMENT in piece for piece in pieces)
    assert sum(map(bool, pieces)) == len(text)


@given(st.text(max_size=40), st.lists(st.integers(1, 5), max_size=60))
def test_any_text_in_any_steps_comes_out_as_it_is(tokenizer: Any, text: str, sizes: list[int]) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    borders = [0, *(border for border in itertools.accumulate(sizes) if border < len(ids)), len(ids)]
    pieces, whole = push_all(tokenizer, [ids[a:b] for a, b in itertools.pairwise(borders)])
    assert whole == "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)
    assert REPLACEMENT in text or not any(REPLACEMENT in piece for piece in pieces)


@given(st.lists(st.integers(0, 258), max_size=40))
def test_what_is_no_text_is_decoded_as_a_whole_would_be(tokenizer: Any, ids: list[int]) -> None:
    pieces, whole = push_all(tokenizer, [[token] for token in ids])
    assert whole == "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)


def test_half_a_character_at_the_end_is_shown_by_flush(tokenizer: Any) -> None:
    ids = tokenizer.encode("a🚚", add_special_tokens=False)[:-1]
    pieces, whole = push_all(tokenizer, [[token] for token in ids])
    assert pieces[:-1] == ["a", "", "", ""]
    assert whole.startswith("a" + REPLACEMENT)


def test_an_empty_step_shows_nothing(tokenizer: Any) -> None:
    detokenizer = Detokenizer(tokenizer)
    assert detokenizer.push([]) == ""
    assert detokenizer.push(tokenizer.encode("ok", add_special_tokens=False)) == "ok"
    assert detokenizer.push([]) == detokenizer.flush() == ""
