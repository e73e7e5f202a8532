"""Rows + the live index -> examples: the question as serving would ask it, the answer as it should be cited.

A row without evidence is asked as serving asks without retrieval. The passages of any other are the ones the retriever returns for its question on the current knowledge version: the
gold chunk stands among the very distractors it will meet in service (RAFT, Zhang et al., 2024). Where the
retriever misses the gold chunk, it takes the last place; in a share of the rows it is taken out and the answer is
the decline sentence, as it is for questions the documents do not answer.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

from cluster.config import PromptConfig
from cluster.errors import BadInput
from retrieval.prompt import Grounded, ground, with_marks
from retrieval.types import Chunk, Passage
from training.data.examples import Example
from training.data.rows import AnyRow, Evidence, Row, Text

Retrieve = Callable[[Sequence[dict[str, str]]], Sequence[Passage]]
"""Conversation -> more passages than are shown, best first, nothing cut by a score floor."""
ChunksOf = Callable[[str], Sequence[Chunk]]
"""Document id -> its live chunks."""


def ground_rows(
    rows: Sequence[AnyRow],
    prompt: PromptConfig,
    *,
    retrieve: Retrieve,
    chunks_of: ChunksOf,
    count_tokens: Callable[[str], int],
    top_k: int,
    no_gold_share: float,
    seed: int,
    loss_turns: Literal["last", "all"] = "last",
) -> Iterator[Example]:
    """Examples, one for each of `rows`, in their order. Nothing is retrieved for rows that are not grounded.

    Raises:
        BadInput: a quote stands in no live chunk of its document; the message names row and document.
    """
    chance = random.Random(seed)
    for row in rows:
        if isinstance(row, Text):
            yield Example(id=row.id, text=row.text, documents=row.documents)
            continue
        evidence = row.evidence
        if evidence is None:
            asked = ground(prompt, row.conversation, None, count_tokens)
            yield _example(row, asked, row.reference, loss_turns)
            continue
        gold = [_gold_chunk(row, item, chunks_of) for item in evidence]
        found = list(retrieve(row.conversation))
        without = row.answerable and chance.random() < no_gold_share
        if without:
            ids = {chunk.chunk_id for chunk in gold}  # a quote that a chunk border cuts is held by none
            shown = [
                passage for passage in found if passage.chunk_id not in ids and not _holds_any(passage.text, evidence)
            ][:top_k]
        else:
            shown = _with_gold(found, gold, top_k)
        grounded = ground(prompt, row.conversation, shown, count_tokens)
        numbers = [
            number
            for number, passage in enumerate(grounded.passages, 1)
            if any(passage.chunk_id == chunk.chunk_id for chunk in gold)
        ]
        answer = with_marks(row.reference, numbers) if numbers and not without else prompt.decline
        # Its earlier answers were given among passages of their own, which are not here: none is learned unasked.
        yield _example(row, grounded, answer, "last")


def _example(row: Row, asked: Grounded, answer: str, loss_turns: Literal["last", "all"]) -> Example:
    """`asked` begins with our system message; the row's own is part of that, its other turns follow in order."""
    turns = [message for message in row.messages[:-1] if message.role != "system"]
    flags = [turn.train if turn.train is not None else loss_turns == "all" for turn in turns]
    last = row.messages[-1].train
    return Example(
        id=row.id,
        messages=tuple(asked.messages),
        answer=answer,
        learned=last is None or last,
        turns=tuple(
            place
            for place, (turn, flag) in enumerate(zip(turns, flags, strict=True), 1)
            if flag and turn.role == "assistant"
        ),
        documents=tuple(dict.fromkeys(passage.doc_id for passage in asked.passages)),
        chunks=tuple(passage.chunk_id for passage in asked.passages),
    )


def holds(text: str, quote: str) -> bool:
    """Whether `quote` occurs in `text`, white space aside."""
    return _flat(quote) in _flat(text)


def _holds_any(text: str, evidence: Sequence[Evidence]) -> bool:
    return any(holds(text, item.quote) for item in evidence)


def _with_gold(found: Sequence[Passage], gold: Sequence[Chunk], top_k: int) -> list[Passage]:
    shown = list(found[:top_k])
    missing = [chunk for chunk in gold if chunk.chunk_id not in {passage.chunk_id for passage in shown}]
    ids = {chunk.chunk_id for chunk in gold}
    for chunk in missing:
        if len(shown) >= top_k:
            last = max((i for i, passage in enumerate(shown) if passage.chunk_id not in ids), default=None)
            if last is None:
                break
            del shown[last]
        shown.append(_as_passage(chunk))
    return shown


def _gold_chunk(row: Row, evidence: Evidence, chunks_of: ChunksOf) -> Chunk:
    chunks = chunks_of(evidence.document)
    for chunk in chunks:
        if holds(chunk.text, evidence.quote):
            return chunk
    best = max(chunks, key=lambda chunk: _overlap(chunk.text, evidence.quote), default=None)
    if best is not None and _overlap(best.text, evidence.quote) >= 0.5:
        return best  # a quote that a chunk border cuts
    reason = (
        "is not in the index; run `metier index`"
        if best is None
        else "does not contain the quote; mend the row or the document"
    )
    raise BadInput(f"row {row.id}: evidence: document '{evidence.document}' {reason}", param=row.id)


def _overlap(text: str, quote: str) -> float:
    words = set(_flat(quote).split())
    return len(words & set(_flat(text).split())) / max(1, len(words))


def _flat(text: str) -> str:
    return " ".join(text.split())


def _as_passage(chunk: Chunk) -> Passage:
    return Passage(
        chunk.chunk_id, chunk.doc_id, chunk.title, chunk.heading, chunk.text, chunk.source, chunk.position, 0.0
    )
