"""Rows meet the index: gold among the passages that the retriever returns, and rows that learn to decline."""

from collections.abc import Sequence
from typing import Any

import pytest

from cluster.config import PromptConfig
from cluster.errors import BadInput
from retrieval.prompt import citations, ground
from retrieval.types import Chunk, Passage
from training.data.examples import Example
from training.data.grounded import ground_rows, holds
from training.data.rows import Evidence, Row

PROMPT = PromptConfig()
TEXTS = {
    "fees#0": "A trailer costs 18.50 crowns\nfor one crossing.",
    "fees#1": "A bicycle crosses free.",
    "hours#0": "The last ferry leaves at 22:40.",
    "hours#1": "On holidays the first ferry leaves at 7:10.",
    "dogs#0": "Dogs stay on a lead.",
}
CHUNKS = {
    name: Chunk(name, name.partition("#")[0], "Title", "", text, "f.md", place)
    for place, (name, text) in enumerate(TEXTS.items())
}


def passages(*names: str) -> list[Passage]:
    made = (CHUNKS[name] for name in names)
    return [Passage(c.chunk_id, c.doc_id, c.title, c.heading, c.text, c.source, c.position, 0.5) for c in made]


def chunks_of(document: str) -> list[Chunk]:
    return [chunk for chunk in CHUNKS.values() if chunk.doc_id == document]


def row(*evidence: tuple[str, str], id: str = "r", answer: str = "18.50 crowns") -> Row:
    return Row(
        id=id,
        messages=({"role": "user", "content": "How much is a trailer?"}, {"role": "assistant", "content": answer}),
        evidence=tuple(Evidence(document=document, quote=quote) for document, quote in evidence),
    )


TRAILER = ("fees", "trailer costs 18.50 crowns for one")
FERRY = ("hours", "leaves at 22:40")


def one(asked: Row, found: Sequence[str], **options: Any) -> Example:
    (made,) = many([asked], found, **options)
    return made


def many(asked: Sequence[Row], found: Sequence[str], **options: Any) -> list[Example]:
    settings: dict[str, Any] = {"count_tokens": len, "top_k": 3, "no_gold_share": 0.0, "seed": 1} | options
    return list(ground_rows(asked, PROMPT, retrieve=lambda _: passages(*found), chunks_of=chunks_of, **settings))


def test_gold_stays_where_the_retriever_put_it() -> None:
    made = one(row(TRAILER), ["dogs#0", "fees#0", "fees#1", "hours#0"])
    assert made.chunks == ("dogs#0", "fees#0", "fees#1")
    assert made.answer == "18.50 crowns [2]"
    assert made.documents == ("dogs", "fees")


def test_gold_that_the_retriever_missed_takes_the_last_place() -> None:
    made = one(row(TRAILER), ["dogs#0", "hours#0", "fees#1", "hours#1"])
    assert made.chunks == ("dogs#0", "hours#0", "fees#0")
    assert made.answer == "18.50 crowns [3]"


def test_gold_is_added_where_few_were_found() -> None:
    assert one(row(TRAILER), ["dogs#0"]).chunks == ("dogs#0", "fees#0")


def test_a_row_over_two_documents_carries_both_marks() -> None:
    made = one(row(TRAILER, FERRY), ["hours#0", "dogs#0", "fees#1"])
    assert made.chunks == ("hours#0", "dogs#0", "fees#0")
    assert made.answer == "18.50 crowns [1] [3]"
    cited = citations(made.answer, passages(*made.chunks))
    assert [citation.passage.doc_id for citation in cited] == ["hours", "fees"]


def test_one_inserted_gold_does_not_push_out_the_other() -> None:
    made = one(row(TRAILER, FERRY), ["dogs#0", "fees#1", "hours#0"])
    assert made.chunks == ("dogs#0", "hours#0", "fees#0")


def test_messages_are_those_that_serving_would_build() -> None:
    asked = row(TRAILER)
    made = one(asked, ["fees#0", "dogs#0"])
    assert list(made.messages) == ground(PROMPT, asked.conversation, passages("fees#0", "dogs#0"), len).messages


def test_a_row_robbed_of_its_gold_declines_and_shows_no_quote() -> None:
    made = one(row(TRAILER), ["fees#0", "dogs#0", "hours#0", "fees#1"], no_gold_share=1.0)
    assert made.answer == PROMPT.decline
    assert made.chunks == ("dogs#0", "hours#0", "fees#1")
    assert not any(holds(message["content"], TRAILER[1]) for message in made.messages)


def test_a_robbed_row_loses_every_gold_chunk() -> None:
    made = one(row(TRAILER, FERRY), ["fees#0", "dogs#0", "hours#0"], no_gold_share=1.0)
    assert made.chunks == ("dogs#0",)


def test_a_robbed_row_loses_gold_that_a_chunk_border_cuts() -> None:
    cut = ("fees", "A trailer costs 18.50 crowns for one crossing. No refunds.")
    assert one(row(cut), ["fees#0", "dogs#0"]).answer == "18.50 crowns [1]"
    assert one(row(cut), ["fees#0", "dogs#0"], no_gold_share=1.0).chunks == ("dogs#0",)


def test_a_question_without_evidence_declines_among_what_was_found() -> None:
    made = one(row(answer=""), ["fees#0", "dogs#0", "hours#0", "hours#1"])
    assert made.answer == PROMPT.decline
    assert made.chunks == ("fees#0", "dogs#0", "hours#0")


def test_gold_beyond_the_passage_budget_declines() -> None:
    made = one(row(TRAILER), ["dogs#0", "fees#0"], count_tokens=lambda text: 900)
    assert made.chunks == ("dogs#0",)
    assert made.answer == PROMPT.decline


def test_the_seed_decides_which_rows_are_robbed() -> None:
    asked = [row(TRAILER, id=str(number)) for number in range(40)]
    first, same, other = (many(asked, ["fees#0"], no_gold_share=0.5, seed=seed) for seed in (1, 1, 2))
    assert first == same
    assert first != other
    assert [made.id for made in first] == [asked_row.id for asked_row in asked]
    assert 10 < sum(made.answer == PROMPT.decline for made in first) < 30


def test_a_quote_that_stands_nowhere_is_refused_by_row() -> None:
    with pytest.raises(BadInput, match=r"row t7: evidence: document 'fees' does not contain the quote") as caught:
        one(row(("fees", "Lorries pay double in winter"), id="t7"), ["fees#0"])
    assert caught.value.param == "t7"


def test_a_document_that_is_not_there_is_refused_by_row() -> None:
    with pytest.raises(BadInput, match=r"row t7: evidence: document 'tolls' is not in the index; run `metier index`"):
        one(row(("tolls", "anything"), id="t7"), ["fees#0"])
