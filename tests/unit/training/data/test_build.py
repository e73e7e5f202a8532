"""Rows from pairs: the kinds in their shares, what the retriever must find, and what must not leak or be answerable."""

from collections.abc import Sequence
from typing import Any

import pytest

from cluster.errors import BadInput
from retrieval.query import is_follow_up
from retrieval.types import Chunk, Passage
from training.data.build import Built, Shares, allowed, build
from training.data.extract import pairs
from training.data.grounded import holds
from training.data.pairs import Pair
from training.data.rows import Row
from training.data.sentences import content

PLACES = ("Norhaven", "Eastwick", "Tilby", "Marlow")
CHUNKS = [
    Chunk(f"{place}-{n}", f"fees-{place.lower()}", f"Fees at {place}", "", text, n, f"{place}.md")
    for number, place in enumerate(PLACES, 3)
    for n, text in enumerate(
        (
            f"A berth for a sailing boat in {place} costs {number}7.50 euros. A mooring buoy for rowing boats in {place} costs {number} euros.",
            f"Lost keys of rented boats are kept for {number}1 days in the office. The slipway at {place} closes {number}5 minutes before high water.",
        )
    )
]
CHUNKS.append(
    Chunk("lift", "lift", "Boat lift", "", "The boat lift in Norhaven is 4.5 metres wide. Nobody may sail from Tilby at night.", 0, "l.md")
)  # fmt: skip


def passages(chunks: Sequence[Chunk]) -> list[Passage]:
    return [Passage(c.chunk_id, c.doc_id, c.title, c.heading, c.text, c.source, c.position, 0.5) for c in chunks]


def built(given: Sequence[Pair] | None = None, **options: Any) -> Built:
    settings: dict[str, Any] = {
        "chunks": CHUNKS,
        "live": CHUNKS,
        "heldout": [],
        "retrieve": lambda _: passages(CHUNKS),
        "shares": Shares(),
        "limit": None,
        "seed": 1,
        "top_k": 3,
        "only_findable": False,
    }
    made = list(pairs(CHUNKS)) if given is None else given
    return build(made, **settings | options)


def test_every_quote_stands_in_its_document_and_every_answer_in_its_quote() -> None:
    rows = built().rows
    assert len(rows) > 15
    assert len({row.id for row in rows}) == len(rows)
    for row in rows:
        for item in row.evidence or ():
            assert any(holds(chunk.text, item.quote) for chunk in CHUNKS if chunk.doc_id == item.document)
        if row.kind in ("single", "multi"):
            assert row.evidence and row.reference in row.evidence[-1].quote
        if row.kind == "two":
            assert len(row.documents) == 2
            assert row.evidence
            assert row.reference == "; ".join(
                part for part, item in zip(row.reference.split("; "), row.evidence, strict=True) if part in item.quote
            )


def test_follow_ups_lean_on_what_was_asked() -> None:
    follow_ups = [row for row in built(shares=Shares(multi=0.4)).rows if row.kind == "multi"]
    assert follow_ups
    for row in follow_ups:
        assert [message.role for message in row.messages] == ["user", "assistant", "user", "assistant"]
        assert is_follow_up(row.messages[2].content)
        assert row.messages[1].content != row.reference


def test_questions_without_an_answer_speak_of_what_no_chunk_says() -> None:
    rows = [row for row in built(shares=Shares(none=0.5)).rows if row.kind == "none"]
    assert rows
    questions = " ".join(row.messages[0].content for row in rows)
    assert any(f"boat lift in {place}" in questions for place in ("Tilby", "Eastwick", "Marlow"))
    for row in rows:
        assert (row.reference, row.evidence) == ("", ())
        asked = content(row.messages[0].content)
        assert not any(
            asked - content("how much wide when does do for long") <= content(f"{c.title} {c.text}") for c in CHUNKS
        )


def test_the_shares_are_of_all_rows_and_the_limit_is_kept() -> None:
    limited = built(limit=10, shares=Shares(none=0.1, two=0.2, multi=0.1))
    assert dict(limited.kinds) == {"single": 6, "two": 2, "multi": 1, "none": 1}
    assert dict(built(shares=Shares(0, 0, 0)).kinds).keys() == {"single"}


def test_the_seed_decides() -> None:
    first, same, other = (built(limit=10, seed=seed).rows for seed in (1, 1, 2))
    assert first == same
    assert first != other


def test_only_rows_whose_gold_chunk_is_found_are_kept() -> None:
    half = [chunk for chunk in CHUNKS if chunk.doc_id in ("fees-norhaven", "fees-tilby")]
    counted = built(retrieve=lambda _: passages(half))
    assert 0 < counted.findable.total() < counted.checked.total()
    assert counted.shown.total() < counted.findable.total()
    kept = built(retrieve=lambda _: passages(half), only_findable=True)
    documents = {document for row in kept.rows for document in row.documents}
    assert documents == {"fees-norhaven", "fees-tilby"}
    assert kept.findable["single"] == kept.kinds["single"]


def heldout(question: str, *documents: str) -> Row:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": "x" if documents else ""}]
    evidence = [{"document": document, "quote": "x"} for document in documents]
    return Row.model_validate({"id": "h", "messages": turns, "evidence": evidence})


def test_documents_and_questions_held_out_are_left_alone() -> None:
    held = [heldout("What is the fee?", "fees-tilby"), heldout("Who sails?")]
    left = allowed(CHUNKS, held)
    assert {chunk.doc_id for chunk in CHUNKS} - {chunk.doc_id for chunk in left} == {"fees-tilby"}
    (single,) = [row for row in built().rows if row.kind == "single" and "boat lift" in row.messages[0].content]
    again = built(heldout=[heldout(single.messages[0].content.upper())])
    assert again.leaked == 1
    assert single.id not in {row.id for row in again.rows}


def test_a_pair_without_an_answer_is_taken_at_its_word() -> None:
    asked = Pair("Who founded the boat lift?", "", CHUNKS[-1].text, CHUNKS[-1], "en")
    rows = built([*pairs(CHUNKS), asked], shares=Shares(none=0.3)).rows
    assert [row.reference for row in rows if row.messages[0].content == asked.question] == [""]


def test_shares_that_leave_no_single_rows_are_refused() -> None:
    with pytest.raises(BadInput, match="leave less than a tenth for single rows"):
        Shares(none=0.5, two=0.3, multi=0.2)
    with pytest.raises(BadInput, match=r"--two -1 is not a share; give a number from 0 to 1"):
        Shares(two=-1)
