import pytest

from retrieval.fuse import fuse
from retrieval.types import Passage


def passage(chunk_id: str, stage: str, score: float) -> Passage:
    return Passage(chunk_id, "doc", "", "", "text", "", 0, score, {stage: score})


def test_agreement_beats_one_first_place_and_scores_are_gathered() -> None:
    dense = [passage("a", "dense", 0.9), passage("b", "dense", 0.8)]
    words = [passage("c", "bm25", 7.0), passage("b", "bm25", 5.0)]
    fused = fuse(dense, words)
    assert [p.chunk_id for p in fused] == ["b", "a", "c"]
    assert fused[0].scores == {"dense": 0.8, "bm25": 5.0, "rrf": pytest.approx(2 / 62)}
    assert fused[0].score == fused[0].scores["rrf"]
    assert fused[1].scores == {"dense": 0.9, "rrf": pytest.approx(1 / 61)}


def test_ties_go_to_the_first_ranking() -> None:
    assert [p.chunk_id for p in fuse([passage("a", "dense", 1)], [passage("b", "bm25", 1)])] == ["a", "b"]


def test_a_small_constant_favours_first_places() -> None:
    dense = [passage("a", "dense", 0.9), passage("b", "dense", 0.8)]
    words = [passage("c", "bm25", 7.0), passage("d", "bm25", 5.0), passage("b", "bm25", 4.0)]
    assert fuse(dense, words)[0].chunk_id == "b"
    assert fuse(dense, words, k=0)[0].chunk_id == "a"


def test_nothing_found() -> None:
    assert fuse([], []) == []
