"""Passages that do not all say the same: maximal marginal relevance (Carbonell and Goldstein, 1998)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from retrieval.embed import Vectors
from retrieval.types import Passage


def diversify(passages: Sequence[Passage], vectors: Mapping[str, Vectors], strength: float, k: int) -> list[Passage]:
    """The `k` of `passages` that are picked one by one by ``(1 - strength) * relevance - strength * likeness``.

    Relevance is the passage's score, between 0 for the worst and 1 for the best of `passages`, so that `strength`
    means the same whatever gave the scores; likeness is the largest cosine to a passage that was picked before. What
    decided stands in ``scores["mmr"]``; ``score`` stays, so the result need not be in its order.

    Args:
        passages: best first.
        vectors: chunk id -> unit vector ``[dimension]``, of every passage.
        strength: 0 keeps the order, 1 goes by likeness alone (the first stays the best).
    """
    if not passages:
        return []
    scores = np.array([passage.score for passage in passages])
    span = float(scores.max() - scores.min())
    relevance = (scores - scores.min()) / span if span else np.ones(len(passages))
    matrix = np.stack([vectors[passage.chunk_id] for passage in passages])
    likeness = np.zeros(len(passages))
    left = np.ones(len(passages), dtype=bool)
    picked: list[Passage] = []
    for _ in range(min(k, len(passages))):
        worth = (1 - strength) * relevance - strength * likeness
        # The first pick is the most relevant one also where relevance counts for nothing.
        best = int(np.argmax(np.where(left, worth if picked else relevance, -np.inf)))
        passage = passages[best]
        picked.append(replace(passage, scores=passage.scores | {"mmr": float(worth[best])}))
        likeness = np.maximum(likeness, matrix @ matrix[best])
        left[best] = False
    return picked
