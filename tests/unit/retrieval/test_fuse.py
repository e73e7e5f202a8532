"""Fusion of two rankings: what each way of it trusts, and that scores stay in [0, 1]."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.config import RetrievalConfig
from retrieval.calibrate import UNCALIBRATED, Calibration
from retrieval.fuse import auto, dense_weight, fuse, rrf, weighted
from retrieval.types import Passage

HYBRID = RetrievalConfig(candidates=4)
FOREIGN = replace(UNCALIBRATED, lift=0.05)
"""An embedder that does not understand the texts: all are alike to it."""


def passage(chunk_id: str, stage: str, score: float) -> Passage:
    return Passage(chunk_id, "doc", "", "", "text", "", 0, score, {stage: score})


def dense(**scores: float) -> list[Passage]:
    return [passage(key, "dense", score) for key, score in scores.items()]


def words(**scores: float) -> list[Passage]:
    return [passage(key, "bm25", score) for key, score in scores.items()]


def order(passages: Sequence[Passage]) -> str:
    return "".join(one.chunk_id for one in passages)


def test_rrf_prefers_agreement_and_gathers_scores() -> None:
    fused = rrf(dense(a=0.9, b=0.8), words(c=7.0, b=5.0))
    assert order(fused) == "bac"
    assert fused[0].scores == {"dense": 0.8, "bm25": 5.0, "fused": pytest.approx(61 / 62)}
    assert fused[0].score == fused[0].scores["fused"]
    assert fused[1].scores == {"dense": 0.9, "fused": pytest.approx(1 / 2)}


def test_rrf_ties_go_to_the_first_ranking() -> None:
    assert order(rrf(dense(a=1), words(b=1))) == "ab"


def test_a_small_constant_favours_first_places() -> None:
    left, right = dense(a=0.9, b=0.8), words(c=7.0, d=5.0, b=4.0)
    assert order(rrf(left, right))[0] == "b"
    assert order(rrf(left, right, k=0))[0] == "a"


@pytest.mark.parametrize(("weight", "first"), [(0.9, "a"), (0.1, "c")])
def test_weighted_follows_its_weight(weight: float, first: str) -> None:
    left, right = dense(a=0.9, b=0.2), words(c=7.0, b=1.0)
    assert order(weighted(left, right, weight))[0] == first
    assert weighted(left, right, weight)[0].score == pytest.approx(0.9)


def test_auto_lets_a_sure_side_decide() -> None:
    """Vectors that see little difference give way to one clear hit of words, and the other way round."""
    assert order(auto(dense(a=0.42, b=0.41, c=0.40), words(c=12.0, a=2.0, b=2.0), UNCALIBRATED))[0] == "c"
    assert order(auto(dense(a=0.80, b=0.30, c=0.25), words(c=5.0, b=4.9, a=4.8), UNCALIBRATED))[0] == "a"


def test_auto_leaves_out_an_embedder_that_does_not_understand() -> None:
    left, right = dense(a=0.95, b=0.80, c=0.70), words(c=9.0, b=7.0, a=6.0)
    assert order(auto(left, right, UNCALIBRATED))[0] == "a"
    assert order(auto(left, right, FOREIGN)) == "cba"
    assert [one.score for one in auto(left, right, FOREIGN)] == pytest.approx([1, 7 / 9, 6 / 9])
    half = replace(UNCALIBRATED, lift=0.47 * UNCALIBRATED.probe_lift)
    assert 0.4 < half.trust < 0.6
    assert dense_weight(FOREIGN) == 0 < dense_weight(half) < dense_weight(UNCALIBRATED)


def test_auto_does_not_depend_on_how_wide_the_embedder_spreads_its_cosines() -> None:
    """Cosines packed into a fifth of their range, as contrastive models with a low temperature have them."""
    left, right = dense(a=0.62, b=0.50, c=0.31, d=0.30), words(d=11.0, b=10.5, c=5.0, a=1.0)
    packed = [replace(one, score=0.8 + 0.2 * one.score) for one in left]
    calibration = Calibration(lift=0.39, probe_lift=0.39, sample=64)
    narrow = Calibration(lift=0.39 * 0.2, probe_lift=0.39 * 0.2, sample=64)
    assert order(auto(packed, right, narrow)) == order(auto(left, right, calibration)) == "badc"


def test_auto_takes_what_vectors_did_not_return_to_be_further_off() -> None:
    fused = auto(dense(a=0.7, b=0.5), words(c=9.0, b=9.0, d=4.0), UNCALIBRATED)
    score = {one.chunk_id: one.score for one in fused}
    assert score["c"] < score["b"]
    assert score["b"] - score["c"] == pytest.approx((0.5 - 0.4) / 2 * dense_weight(UNCALIBRATED))


def test_auto_knows_whether_words_found_all() -> None:
    """Fewer words hits than asked for: the others have no word of the query, and not just few."""
    left, right = dense(a=0.6, b=0.6), words(b=5.0, c=4.0)
    few, full = fuse(left, right, HYBRID), fuse(left, right, HYBRID.model_copy(update={"candidates": 2}))
    gap = [
        next(o.score for o in made if o.chunk_id == "b") - next(o.score for o in made if o.chunk_id == "a")
        for made in (few, full)
    ]
    assert gap[0] > gap[1] > 0


def test_one_side_alone_keeps_its_order() -> None:
    assert [one.score for one in auto(dense(a=0.9, b=0.1), [], UNCALIBRATED)] == pytest.approx([0.95, 0.55])
    assert [one.score for one in auto([], words(a=8.0, b=2.0), UNCALIBRATED)] == [1.0, 0.25]
    assert weighted(dense(a=0.9), [], 0.5)[0].score == 0.5


@pytest.mark.parametrize("fusion", ["auto", "rrf", "weighted"])
def test_nothing_found(fusion: str) -> None:
    assert fuse([], [], HYBRID.model_copy(update={"fusion": fusion})) == []


def test_the_setting_chooses() -> None:
    left, right = dense(a=0.9, b=0.1), words(c=3.0, b=2.9)
    made = {name: fuse(left, right, RetrievalConfig(fusion=name)) for name in ("auto", "rrf", "weighted")}
    assert len({tuple(one.score for one in passages) for passages in made.values()}) == 3


cosines = st.lists(st.floats(-1, 1), max_size=12).map(lambda values: sorted(values, reverse=True))
bm25 = st.lists(st.floats(0.01, 60), max_size=12).map(lambda values: sorted(values, reverse=True))


@given(cosines, bm25, st.sampled_from(["auto", "rrf", "weighted"]), st.sampled_from([UNCALIBRATED, FOREIGN, None]))
def test_every_passage_once_best_first_in_the_unit_interval(
    left: list[float], right: list[float], fusion: str, calibration: Calibration | None
) -> None:
    by_vector = [passage(str(number), "dense", score) for number, score in enumerate(left)]
    by_words = [passage(str(number * 2), "bm25", score) for number, score in enumerate(right)]
    fused = fuse(by_vector, by_words, HYBRID.model_copy(update={"fusion": fusion}), calibration)
    scores = [one.score for one in fused]
    assert scores == sorted(scores, reverse=True)
    assert all(0 <= score <= 1 + 1e-9 for score in scores)
    assert sorted(one.chunk_id for one in fused) == sorted({one.chunk_id for one in [*by_vector, *by_words]})
    for one in fused:
        assert one.scores["fused"] == one.score
        assert ("dense" in one.scores) == (one.chunk_id in {each.chunk_id for each in by_vector})
