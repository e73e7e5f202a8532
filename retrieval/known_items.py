"""Does a new collection find what the old one finds: passages that must be found, asked of both.

The questions are a few words out of sampled passages, so they favour nobody's judgement and need no labels; they are
easier than what people ask. Not covered: whether answers get better (``metier eval``).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Mapping
from statistics import fmean
from typing import Any

from cluster.config import RetrievalConfig
from cluster.knowledge import EmbedderState
from retrieval.embed import Embeds
from retrieval.filters import And, In, live
from retrieval.retriever import Retriever
from retrieval.store import Row, Store
from retrieval.types import Principal, Snapshot

WORDS = 8
"""Of a question."""


def known_items(
    store: Store,
    embedders: Callable[[EmbedderState], Embeds],
    settings: RetrievalConfig,
    *,
    sample: int = 100,
    k: int = 10,
) -> Callable[[Snapshot, Snapshot], Mapping[str, Any]]:
    """A comparison of two collections for :func:`retrieval.reindex.reindex`.

    What it says, for ``dense`` and for ``settings.mode``, the latter again on top: ``recall_before`` and ``recall``
    (share of the sampled passages among the first `k` of the old and the new), and ``overlap`` (mean share of the first
    `k` of either that both have). Passages are told apart by chunk; by document (``by``), if chunks are cut anew.
    """
    retriever = Retriever(store, embedders)

    def compare(before: Snapshot, after: Snapshot) -> Mapping[str, Any]:
        items = _sampled(store, after, sample)
        there = And((In("chunk_id", [item["chunk_id"] for item in items]), live(before.reads)))
        key = "chunk_id" if store.count(before.collection, there) == len(items) else "doc_id"

        def found(item: Row, snapshot: Snapshot, mode: str) -> set[str]:
            bare = {
                "mode": mode,
                "top_k": k,
                "candidates": max(4 * k, settings.candidates),
                "min_score": -1.0,
                "rerank": 0,
            }
            passages = retriever.retrieve(
                _question(item["text"]),
                snapshot,
                principal=Principal(item["tenant"], tuple(item["groups"])),
                settings=settings.model_copy(update=bare),
            ).passages
            return {getattr(passage, key) for passage in passages}

        modes: dict[str, dict[str, float]] = {}
        for mode in dict.fromkeys(("dense", settings.mode)):
            pairs = [(item[key], found(item, before, mode), found(item, after, mode)) for item in items]
            modes[mode] = {
                "recall_before": _mean(wanted in old for wanted, old, _ in pairs),
                "recall": _mean(wanted in new for wanted, _, new in pairs),
                "overlap": _mean(len(old & new) / max(1, len(old | new)) for _, old, new in pairs),
            }
        return {"queries": len(items), "k": k, "by": key, **modes, **modes[settings.mode]}

    return compare


def _sampled(store: Store, snapshot: Snapshot, count: int) -> list[Row]:
    """Some rows of a version, the same every time: chunk ids are hashes, so the smallest are as good as drawn."""
    rows = store.rows(snapshot.collection, live(snapshot.reads), ["chunk_id"])
    ids = heapq.nsmallest(count, (row["chunk_id"] for row in rows))
    columns = ["chunk_id", "doc_id", "text", "tenant", "groups"]
    return list(store.rows(snapshot.collection, And((In("chunk_id", ids), live(snapshot.reads))), columns))


def _question(text: str) -> str:
    """Words from the middle of `text`."""
    words = text.split()
    start = max(0, (len(words) - WORDS) // 2)
    return " ".join(words[start : start + WORDS])


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return round(fmean(found), 4) if found else 0.0
