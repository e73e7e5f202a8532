"""Why a passage was found: its rank and score at every stage, and the words of the question that it holds.

For people; computed from a :class:`retrieval.retriever.Trace` and nothing else. Words are those of
:mod:`retrieval.words`: an analyzer of the server that stems (``english``) may match more than is shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.config import RetrievalConfig
from retrieval.calibrate import stored
from retrieval.embed import embedding_text
from retrieval.fuse import dense_weight
from retrieval.retriever import CHARACTERS_A_TOKEN, Trace
from retrieval.types import Passage, Snapshot
from retrieval.words import QUERY_WORDS, matches, shorten


@dataclass(frozen=True)
class Explanation:
    """One passage and how it came to its place."""

    passage: Passage
    ranks: dict[str, int]
    """Stage (``dense``, ``bm25``, ``fused``, ``rerank``) -> its rank there, from 1; the best one, if several queries
    were searched."""
    words: tuple[str, ...]
    """Words of the question that stand in it, with title and heading."""


def explain(trace: Trace, passages: Sequence[Passage]) -> list[Explanation]:
    """Why each of `passages` of `trace` was found."""
    rankings = [
        *(("dense", each.dense) for each in trace.searched),
        *(("bm25", each.words) for each in trace.searched),
        *(("fused", each.fused) for each in trace.searched if each.dense and each.words),
        *((("rerank", trace.ranked),) if any("rerank" in one.scores for one in trace.ranked[:1]) else ()),
    ]
    ranks: dict[str, dict[str, int]] = {}
    for stage, ranking in rankings:
        for rank, found in enumerate(ranking, start=1):
            own = ranks.setdefault(found.chunk_id, {})
            own[stage] = min(rank, own.get(stage, rank))
    question = "\n".join(each.query for each in trace.searched)
    return [
        Explanation(
            passage,
            ranks.get(passage.chunk_id, {}),
            tuple(matches(question, embedding_text(passage.title, passage.heading, passage.text))),
        )
        for passage in passages
    ]


def left_out(trace: Trace, most: int) -> list[Passage]:
    """The best `most` candidates that are not among the passages: under the floor, beyond ``top_k``, or too alike."""
    shown = {passage.chunk_id for passage in trace.retrieved.passages}
    return [passage for passage in trace.ranked if passage.chunk_id not in shown][:most]


def cuts(trace: Trace, snapshot: Snapshot) -> list[str]:
    """What of a long question was not searched for, one line each."""
    longest = CHARACTERS_A_TOKEN * snapshot.embedder.max_tokens
    said = []
    if any(len(each.query) > longest for each in trace.searched):
        said.append(f"the embedder is given the first {longest:,} characters of the question")
    if any(shorten(each.query) != each.query for each in trace.searched):
        said.append(f"words are those of the first {QUERY_WORDS} of the question")
    return said


def dense_share(settings: RetrievalConfig, snapshot: Snapshot) -> float | None:
    """Weight of the dense score in the fusion, in [0, 1]; None where it goes by rank, or nothing is fused."""
    if settings.mode != "hybrid" or settings.fusion == "rrf":
        return None
    if settings.fusion == "weighted":
        return settings.dense_weight
    return dense_weight(stored(snapshot))
