"""Copies and near copies: all are found, with the similarity that two sets of shingles really have."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrieval import duplicates
from retrieval.duplicates import copies, drop_duplicates, near, near_to, normal, similarity
from retrieval.types import Document

WORDS = [f"{first}{second}{third}" for first in ("ka", "lo", "mi", "ter") for second in ("dor", "vel", "sen", "bra") for third in ("a", "ing", "s", "on")]  # fmt: skip


def text(chance: random.Random, words: int = 40) -> str:
    return " ".join(chance.choices(WORDS, k=words))


def test_normal_form_forgets_case_punctuation_spaces_and_what_is_not_seen() -> None:
    assert normal("  What's\u200b a  “Ferry”?\n") == normal("what s a ferry")
    assert normal("Tiê\u0300n") == normal("TIỀN")
    assert normal("1.5 crowns") != normal("15 crowns")
    assert normal("-") == ""


def test_marks_that_are_letters_elsewhere_stay() -> None:
    assert normal("कि") != normal("क")


def test_copies_point_at_the_first() -> None:
    assert copies(["A ferry.", "a bus", "a FERRY!", "a ferry", "…", "?"]) == [(0, 2), (0, 3)]


def test_near_copies_have_their_exact_similarity() -> None:
    chance = random.Random(1)
    first = text(chance)
    words = first.split()
    changed = " ".join([*words[:-1], "otherwise"])
    found = near([first, text(chance), changed, first.upper()])
    left, right = ({form[i : i + 5] for i in range(len(form) - 4)} for form in (normal(first), normal(changed)))
    assert found == [(0, 2, len(left & right) / len(left | right)), (0, 3, 1.0)]


def test_the_threshold_divides() -> None:
    pair = ["the quick brown fox jumps over the lazy dog", "the quick brown fox jumped over the lazy dogs"]
    value = similarity(*pair)
    assert 0.6 < value < 0.9
    assert near(pair, value) == [(0, 1, value)]
    assert near(pair, value + 0.01) == []


def test_nearly_all_pairs_are_found_that_comparing_everything_finds() -> None:
    chance = random.Random(2)
    texts = [text(chance) for _ in range(120)]
    for original in texts[:80]:
        words = original.split()
        for place in chance.sample(range(len(words)), 2):
            words[place] = "changed"
        texts.append(" ".join(words))
    forms = [normal(each) for each in texts]
    every = {
        (i, j) for i in range(len(forms)) for j in range(i + 1, len(forms)) if similarity(forms[i], forms[j]) >= 0.75
    }
    found = {(i, j) for i, j, _ in near(texts, 0.75)}
    assert len(every) > 40
    assert found <= every
    assert len(found) >= 0.95 * len(every)


def test_the_result_is_the_same_each_time_whatever_else_is_random() -> None:
    chance = random.Random(3)
    texts = [text(chance, 12) for _ in range(50)] * 2
    random.seed(1)
    one = near(texts)
    random.seed(2)
    assert near(texts) == one
    assert len(one) == 50


def test_many_copies_make_as_many_pairs_not_their_square() -> None:
    assert len(near(["the same words again and again"] * 2000)) == 1999


def test_a_crowded_band_is_compared_with_its_first_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    base = text(random.Random(4), 60)
    texts = [f"{base} {number:03}" for number in range(20)]
    assert len(near(texts)) == 20 * 19 / 2
    monkeypatch.setattr(duplicates, "CROWD", 3)
    found = near(texts)
    assert {j for _, j, _ in found} == set(range(1, 20))
    assert len(found) < 20 * 19 / 2


def test_every_text_is_held_against_every_reference() -> None:
    chance = random.Random(5)
    one, two = text(chance), text(chance)
    found = near_to([one, two, one.upper(), one + " x"], [two, one, one])
    assert [(i, j) for i, j, _ in found] == [(0, 1), (0, 2), (1, 0), (2, 1), (2, 2), (3, 1), (3, 2)]


def test_short_and_empty_texts() -> None:
    assert near(["ab", "AB", "", "", "?", "!"]) == [(0, 1, 1.0)]
    assert near([]) == near_to([], ["a"]) == near_to(["a"], []) == []


def test_a_book_is_read_in_parts() -> None:
    book = " ".join(str(number) for number in range(30_000))
    ((left, right, value),) = near([book, book + " the end"])
    assert (left, right) == (0, 1)
    assert 0.99 < value < 1


@given(st.lists(st.text(max_size=40), max_size=12))
def test_near_is_above_the_threshold_and_in_order(texts: list[str]) -> None:
    found = near(texts, 0.8)
    assert all(i < j and value >= 0.8 for i, j, value in found)
    assert found == sorted(found)
    assert {(i, j) for i, j, value in found if value == 1.0} >= set(copies(texts))


def document(name: str, text: str, groups: tuple[str, ...] | None = None) -> Document:
    return Document(name, name, text, f"{name}.md", groups=groups)


def prose(seed: int, words: int) -> list[str]:
    chance = random.Random(seed)
    return ["".join(chance.choices("abcdefghijklmnopqrstuvwxyz", k=6)) for _ in range(words)]


def kept(documents: list[Document], threshold: float = 0.9) -> tuple[list[str], dict[str, str]]:
    left, problems = drop_duplicates(documents, threshold)
    return [each.doc_id for each in left], {problem.source: problem.reason for problem in problems}


def test_the_first_of_equal_documents_stays_and_the_others_name_it() -> None:
    names, problems = kept([document("a", "A ferry."), document("b", "a  FERRY"), document("c", "Another ferry.")])
    assert names == ["a", "c"]
    assert problems == {"b.md": "'b' says the same as 'a' (a.md), which is kept"}


def test_near_copies_of_documents_go_from_the_similarity_that_is_set() -> None:
    words = text(random.Random(6), 300).split()
    one, two = document("one", " ".join(words)), document("two", " ".join([*words[:-1], "otherwise"]))
    names, problems = kept([one, two], 0.95)
    assert names == ["one"] and "nearly the same (9" in problems["two.md"]
    assert kept([one, two], 1)[0] == ["one", "two"]
    assert kept([one, document("copy", one.text.upper())], 1)[0] == ["one"]


def test_documents_that_name_other_numbers_are_not_near_copies() -> None:
    words = text(random.Random(7), 300)
    assert kept([document("r1", f"{words} costs 40 crowns"), document("r4", f"{words} costs 45 crowns")])[0] == [
        "r1",
        "r4",
    ]


def test_copies_for_other_groups_stay() -> None:
    same = [
        document("open", "A ferry."),
        document("crew", "A ferry.", ("crew",)),
        document("crew2", "A ferry.", ("crew",)),
    ]
    assert kept(same)[0] == ["open", "crew"]


def test_what_resembles_only_a_document_that_was_left_out_stays() -> None:
    words, others = prose(8, 200), prose(9, 200)
    a, b, c = (
        document(name, " ".join(words[:end] + others[end:])) for name, end in (("a", 200), ("b", 195), ("c", 190))
    )
    assert {(i, j) for i, j, _ in near([a.text, b.text, c.text], 0.93)} == {(0, 1), (1, 2)}
    assert kept([a, b, c, document("copy of b", b.text)], 0.93)[0] == ["a", "c"]


def test_long_and_short_texts_have_the_same_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    words, others = prose(10, 200), prose(11, 100)
    left, right = " ".join(words), " ".join(words[:100] + others)
    measured = similarity(left, right)
    monkeypatch.setattr(duplicates, "LONG", 10**9)
    assert similarity(left, right) == measured
    assert 0.3 < measured < 0.4
    assert similarity("", left) == 0
