"""The four arms: the same questions answered by base, base+RAG, tuned and tuned+RAG, over HTTP.

What is learned from the table: how much of the gain is knowing it right (retrieval), how much is saying it right
(tuning), and whether the two add up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from evaluation.metrics import citation_hit, exact_match, token_f1
from serving.client import Client, Reply
from training.data.rows import Row


@dataclass(frozen=True)
class Arm:
    """One way of answering."""

    name: str
    model: str
    rag: bool


@dataclass(frozen=True)
class Score:
    """Means over the questions of one arm."""

    arm: str
    model: str
    questions: int
    exact_match: float
    """Over the answerable questions."""
    token_f1: float
    """Over the answerable questions."""
    citation_hit: float
    """Over the answerable questions."""
    abstention: float
    """Share of the unanswerable questions that were declined."""
    false_abstention: float
    """Share of the answerable questions that were declined."""


@dataclass(frozen=True)
class Answered:
    """One question and what an arm made of it; a row of the report file."""

    arm: str
    id: str
    kind: str
    reference: str
    answer: str
    cited: tuple[str, ...]
    declined: bool
    exact_match: float
    token_f1: float
    citation_hit: float


def arms(base: str, tuned: str, release: str) -> list[Arm]:
    """The four arms; the release (tuned model with its knowledge) is the last."""
    return [
        Arm("base", base, False),
        Arm("base+RAG", base, True),
        Arm("tuned", tuned, False),
        Arm("tuned+RAG", release, True),
    ]


def run(
    client: Client,
    arm: Arm,
    rows: Sequence[Row],
    *,
    max_tokens: int,
    concurrency: int,
    on_answer: Callable[[], None] = lambda: None,
) -> list[Answered]:
    """Ask `arm` every question, `concurrency` at a time; answers come back in the order of `rows`."""

    def ask(row: Row) -> Answered:
        reply = client.ask(arm.model, row.conversation, max_tokens=max_tokens, rag={"enabled": arm.rag})
        on_answer()
        return judge(arm.name, row, reply)

    with ThreadPoolExecutor(concurrency) as pool:
        return list(pool.map(ask, rows))


def judge(arm: str, row: Row, reply: Reply) -> Answered:
    """Score one reply. Unanswerable rows have no reference; only whether they were declined counts."""
    cited = tuple(dict.fromkeys(citation.doc_id for citation in reply.citations))
    scored = row.answerable and not reply.declined
    return Answered(
        arm,
        row.id,
        row.kind,
        row.reference,
        reply.text,
        cited,
        reply.declined,
        exact_match(reply.text, row.reference) if scored else 0.0,
        token_f1(reply.text, row.reference) if scored else 0.0,
        citation_hit(cited, row.documents) if scored else 0.0,
    )


def score(arm: Arm, answered: Sequence[Answered], rows: Sequence[Row]) -> Score:
    """Means over `answered`, which stands in the order of `rows`."""
    pairs = list(zip(answered, rows, strict=True))
    answerable = [a for a, row in pairs if row.answerable]
    unanswerable = [a for a, row in pairs if not row.answerable]

    def mean(values: list[Any]) -> float:
        return sum(values) / len(values) if values else float("nan")

    return Score(
        arm.name,
        arm.model,
        len(pairs),
        mean([a.exact_match for a in answerable]),
        mean([a.token_f1 for a in answerable]),
        mean([a.citation_hit for a in answerable]),
        mean([float(a.declined) for a in unanswerable]),
        mean([float(a.declined) for a in answerable]),
    )
