"""Two rankings -> one, by reciprocal rank (Cormack, Clarke and Büttcher, 2009)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from retrieval.types import Passage

RANK_CONSTANT = 60
"""The `k` of the paper: how little the first ranks stand out from the next."""


def fuse(*rankings: Sequence[Passage], k: int = RANK_CONSTANT) -> list[Passage]:
    """All passages of `rankings` (each best first), ordered by the sum of ``1 / (k + rank)``, rank from 1.

    ``scores`` gathers what each stage said, and ``rrf``. Equal sums keep the order in which passages were met, so a
    tie goes to the first ranking.
    """
    sums: dict[str, float] = {}
    found: dict[str, Passage] = {}
    for ranking in rankings:
        for rank, passage in enumerate(ranking, start=1):
            key = passage.chunk_id
            sums[key] = sums.get(key, 0.0) + 1 / (k + rank)
            found[key] = replace(passage, scores=found[key].scores | passage.scores) if key in found else passage
    fused = [replace(found[key], score=total, scores=found[key].scores | {"rrf": total}) for key, total in sums.items()]
    return sorted(fused, key=lambda passage: -passage.score)
