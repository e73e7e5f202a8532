"""Ids become text piece by piece: nothing is lost, and nobody sees half a character."""

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.text import REPLACEMENT, Detokenizer, Pieces, StopText


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


# -- stop strings


def read(tokenizer: Any, steps: Sequence[Sequence[int]], stop: Sequence[str]) -> tuple[list[str], StopText]:
    text = StopText(tokenizer, stop)
    return [*(text.push(ids) for ids in steps), text.flush()], text


@pytest.mark.parametrize(
    ("text", "stop", "shown"),
    [
        ("one two three", ["two"], "one "),
        ("one two three", ["three", "two"], "one "),
        ("abc", ["b", "abc"], "a"),  # `b` is complete first
        ("xabc", ["bc", "abc"], "x"),  # both at once: the longer one
        ("one tw", ["two"], "one tw"),
        ("aaab", ["aab"], "a"),
        ("東京まで", ["京"], "東"),
        ("no stops here", [], "no stops here"),
    ],
)
def test_text_ends_before_the_stop_string_that_is_complete_first(
    tokenizer: Any, text: str, stop: list[str], shown: str
) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    for steps in ([ids], [[token] for token in ids]):
        pieces, result = read(tokenizer, steps, stop)
        assert "".join(pieces) == result.text == shown
        assert result.stopped is (shown != text)


def test_only_what_may_become_a_stop_string_is_held_back(tokenizer: Any) -> None:
    text = StopText(tokenizer, ["\n\n", "END"])
    shown = [
        text.push(tokenizer.encode(piece, add_special_tokens=False)) for piece in ["a", "\n", "b", "E", "N", "d", "E"]
    ]
    assert shown == ["a", "", "\nb", "", "", "ENd", ""]
    assert text.flush() == "E"


def test_after_the_stop_string_nothing_is_shown(tokenizer: Any) -> None:
    ids = tokenizer.encode("a.b.c", add_special_tokens=False)
    pieces, text = read(tokenizer, [[token] for token in ids], ["."])
    assert pieces == ["a", "", "", "", "", ""]
    assert text.stopped


@given(st.text("abé", max_size=30), st.lists(st.text("abé", min_size=1, max_size=4), max_size=4), st.data())
def test_what_is_shown_does_not_depend_on_the_steps(tokenizer: Any, text: str, stop: list[str], data: Any) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    cuts = data.draw(st.lists(st.integers(0, len(ids)), max_size=6).map(sorted))
    borders = [0, *cuts, len(ids)]
    pieces, in_steps = read(tokenizer, [ids[a:b] for a, b in itertools.pairwise(borders)], stop)
    _, at_once = read(tokenizer, [ids], stop)
    assert "".join(pieces) == in_steps.text == at_once.text
    assert in_steps.stopped is at_once.stopped
    ends = [(text.find(each) + len(each), text.find(each)) for each in stop if each in text]
    assert at_once.text == (text[: min(ends)[1]] if ends else text)
    assert not any(each in in_steps.text for each in stop)


# -- single tokens


@pytest.mark.parametrize("text", ["plain", " a space", "é🚚 東京", "tab\tand\nline"])
def test_the_bytes_of_tokens_put_together_are_the_text(tokenizer: Any, text: str) -> None:
    pieces = Pieces(tokenizer)
    told = [pieces.of(token) for token in tokenizer.encode(text, add_special_tokens=False)]
    assert bytes(byte for _, data in told for byte in data).decode() == text
    assert all(piece == bytes(data).decode(errors="replace") for piece, data in told)


def test_a_piece_keeps_its_space_and_its_bytes_where_the_tokenizer_is_sentencepiece() -> None:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {"<unk>": 0, "▁": 1, "a": 2, "▁the": 3, "<0xF0>": 4, "<0x9F>": 5, "ferry": 6}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    raw.normalizer = normalizers.Sequence([])
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    pieces = Pieces(PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>"))
    assert pieces.of(3) == (" the", list(b" the"))
    assert pieces.of(6) == ("ferry", list(b"ferry"))
    assert pieces.of(4)[1] == [0xF0]


def test_a_control_token_has_a_name(tokenizer: Any) -> None:
    assert Pieces(tokenizer).of(tokenizer.eos_token_id) == ("<|im_end|>", list(b"<|im_end|>"))
