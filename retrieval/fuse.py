"""Two rankings -> one: what vectors found and what words found.

:func:`auto` adds the scores themselves, because ranks hide how sure a side is: a convex combination, which Bruch, Gai
and Ingber (An Analysis of Fusion Functions for Hybrid Retrieval, 2023) found to beat reciprocal rank fusion and to need
little tuning. It differs from theirs in the scale of the dense side, which comes from the embedder and the collection
(:mod:`retrieval.calibrate`) instead of the query, and in what it assumes of a passage that one side did not return.
Figures on fifteen collections: ``docs/decisions/0015-fusion.md``.

The score of a fused passage is in [0, 1] and comparable within one answer. That of ``auto`` is a weighted mean whose
dense part is also comparable between questions to the same collection. Each passage keeps the scores of its stages, and
``fused``. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cluster.config import RetrievalConfig
from retrieval.calibrate import UNCALIBRATED, Calibration
from retrieval.types import Passage

RANK_CONSTANT = 60
"""The `k` of reciprocal rank fusion: how little the first ranks stand out from the next."""
WORDS = 0.85
"""The best BM25 score of a query counts as much as this share of the embedder's scale. Chosen on four collections;
a third less or more changes nDCG@10 there by 0.015 at most."""
BEYOND = 0.5
"""A passage that vectors did not return is taken to lie so far below the last that was, in parts of the span from first to last."""


def fuse(
    dense: Sequence[Passage],
    words: Sequence[Passage],
    settings: RetrievalConfig,
    calibration: Calibration | None = None,
) -> list[Passage]:
    """All passages of `dense` and `words` (each best first) in one order, as ``settings.fusion`` says."""
    if settings.fusion == "rrf":
        return rrf(dense, words)
    if settings.fusion == "weighted":
        return weighted(dense, words, settings.dense_weight)
    return auto(dense, words, calibration or UNCALIBRATED, complete=len(words) < settings.candidates)


def rrf(*rankings: Sequence[Passage], k: int = RANK_CONSTANT) -> list[Passage]:
    """By the sum of ``1 / (k + rank)``, rank from 1 (Cormack, Clarke and Büttcher, 2009), scaled so that 1 is first everywhere.

    Equal sums keep the order in which passages were met, so a tie goes to the first ranking.
    """
    highest = len(rankings) / (k + 1)
    sums: dict[str, float] = {}
    for ranking in rankings:
        for rank, passage in enumerate(ranking, start=1):
            sums[passage.chunk_id] = sums.get(passage.chunk_id, 0.0) + 1 / (k + rank) / highest
    return _ordered(rankings, sums)


def weighted(dense: Sequence[Passage], words: Sequence[Passage], dense_weight: float) -> list[Passage]:
    """By ``dense_weight * dense + (1 - dense_weight) * words``, each side stretched to [0, 1]; 0 where it found nothing."""
    sides = ((_stretched(dense), dense_weight), (_stretched(words), 1 - dense_weight))
    sums: dict[str, float] = {}
    for scores, weight in sides:
        for key, score in scores.items():
            sums[key] = sums.get(key, 0.0) + weight * score
    return _ordered((dense, words), sums)


def auto(
    dense: Sequence[Passage], words: Sequence[Passage], calibration: Calibration, *, complete: bool = False
) -> list[Passage]:
    """By both scores, with the weights that `calibration` gives.

    The dense score is ``(1 + cosine) / 2``, that of words is BM25 as a share of the best for this query.

    Args:
        complete: `words` holds every passage that has any word of the query, so the others have a BM25 score of 0 and
            not one at or below the last.
    """
    if not dense or not words:
        return _ordered(
            (dense, words), {one.chunk_id: _unit(one.score) for one in dense} or _stretched(words, lowest=0.0)
        )
    weight = dense_weight(calibration)
    last = dense[-1].score - BEYOND * (dense[0].score - dense[-1].score)
    best = words[0].score
    found = {passage.chunk_id: (1 - weight) * passage.score / best for passage in words}
    least = 0.0 if complete else found[words[-1].chunk_id]
    far = weight * _unit(last)
    sums = {key: far + value for key, value in found.items()}
    for passage in dense:
        near = weight * _unit(passage.score)
        sums[passage.chunk_id] = near + found.get(passage.chunk_id, least)
    return _ordered((dense, words), sums)


def dense_weight(calibration: Calibration) -> float:
    """Share of the dense side in :func:`auto`, in [0, 1]; the words have the rest."""
    by_vector = 2 * calibration.trust  # twice, as its score spans half a unit for each unit of cosine
    return by_vector / (by_vector + WORDS * calibration.scale)


def _stretched(ranking: Sequence[Passage], lowest: float | None = None) -> dict[str, float]:
    """Scores in [0, 1] by chunk: 1 for the best, 0 for `lowest`, by default the last; all 1 where all are equal."""
    if not ranking:
        return {}
    low = ranking[-1].score if lowest is None else lowest
    span = ranking[0].score - low
    return {passage.chunk_id: (passage.score - low) / span if span > 0 else 1.0 for passage in ranking}


def _unit(cosine: float) -> float:
    """In [0, 1], also for what is extrapolated below -1 or rounded above 1."""
    return min(1.0, max(0.0, (1 + cosine) / 2))


def _ordered(rankings: Sequence[Sequence[Passage]], scores: Mapping[str, float]) -> list[Passage]:
    """The passages of `rankings`, each once and with the scores of all its stages, by `scores`."""
    found: dict[str, Passage] = {}
    stages: dict[str, dict[str, float]] = {}
    for ranking in rankings:
        for passage in ranking:
            key = passage.chunk_id
            if key in found:
                stages[key] = stages[key] | passage.scores
            else:
                found[key], stages[key] = passage, passage.scores
    best = sorted(found, key=scores.__getitem__, reverse=True)
    return [_rescored(found[key], scores[key], stages[key]) for key in best]


def _rescored(passage: Passage, score: float, stages: Mapping[str, float]) -> Passage:
    # dataclasses.replace takes six times as long, and this is done for every candidate of every query.
    made = object.__new__(Passage)
    made.__dict__.update(passage.__dict__, score=score, scores={**stages, "fused": score})
    return made
