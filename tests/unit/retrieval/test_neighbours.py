from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrieval.chunk import chunk
from retrieval.neighbours import join, widen
from retrieval.types import Document, Passage


def passage(position: int, doc_id: str = "d", score: float = 1.0) -> Passage:
    return Passage(f"{doc_id}{position}", doc_id, "", "", f"text {position}", "d.md", position, score)


def rows(count: int, doc_id: str = "d", missing: tuple[int, ...] = (), **values: Any) -> list[dict[str, Any]]:
    return [
        {"doc_id": doc_id, "position": place, "text": f"text {place}", "heading": "", "page": place + 1,
         "start": 10 * place, "end": 10 * place + 6} | values
        for place in range(count) if place not in missing
    ]  # fmt: skip


def texts(found: list[Passage]) -> list[list[str]]:
    return [each.text.replace("text ", "").split() for each in found]


def test_a_window_ends_at_the_document_and_at_what_may_not_be_read() -> None:
    assert texts(widen([passage(0)], rows(9), 2)) == [["0", "1", "2"]]
    assert texts(widen([passage(4)], rows(9), 1)) == [["3", "4", "5"]]
    assert texts(widen([passage(4)], rows(9, missing=(3, 6)), 2)) == [["4", "5"]]
    assert widen([passage(4)], rows(9), 1)[0].page == 4


def test_windows_that_touch_are_one_passage_at_the_better_place() -> None:
    assert texts(widen([passage(1), passage(7), passage(4)], rows(9), 1)) == [list("012345678")]
    assert texts(widen([passage(7), passage(0, "e"), passage(1)], [*rows(9), *rows(1, "e")], 1)) == [
        ["6", "7", "8"], ["0"], ["0", "1", "2"]
    ]  # fmt: skip
    first = widen([passage(4, score=0.9), passage(3, score=0.5)], rows(9), 1)
    assert [(each.chunk_id, each.score, each.position) for each in first] == [("d4", 0.9, 4)]


def test_a_chunk_that_is_gone_by_now_stays_as_it_was_found() -> None:
    assert texts(widen([passage(4)], rows(3), 1)) == [["4"]]


def test_a_heading_between_two_chunks_is_written_out() -> None:
    run = [
        {"text": "A dog costs 3.", "heading": "Fares > Dogs", "start": 0, "end": 14},
        {"text": "Dogs: A cat is free.", "heading": "Fares > Cats", "start": 30, "end": 44},
        {"text": "No heading.", "heading": "", "start": 50, "end": 61},
    ]
    assert join(run) == "A dog costs 3.\n\nCats\n\nA cat is free.\n\nNo heading."


@pytest.mark.parametrize("overlap", [0, 6])
@given(words=st.lists(st.sampled_from(["ferry", "dog.", "ten crowns", "\n\n", "\n", "deck"]), min_size=1, max_size=120))
def test_joined_chunks_are_the_text_without_what_overlaps_repeat(overlap: int, words: list[str]) -> None:
    text = " ".join(words).strip()
    document = Document("d", "", text, "d.md")
    pieces = list(chunk(document, chunk_tokens=16, overlap_tokens=overlap, count_tokens=lambda each: len(each.split())))
    if pieces:
        run = [{name: getattr(piece, name) for name in ("text", "heading", "start", "end")} for piece in pieces]
        assert join(run).split() == text.split()
