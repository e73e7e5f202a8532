import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrieval.diversity import diversify
from retrieval.types import Passage


def passage(name: str, score: float) -> Passage:
    return Passage(name, "d", "", "", name, "d.md", 0, score, {"dense": score})


def unit(*values: float) -> np.ndarray:
    vector = np.array(values, dtype=np.float32)
    return vector / np.linalg.norm(vector)


FOUND = [passage("a", 0.9), passage("a again", 0.88), passage("b", 0.7), passage("c", 0.2)]
VECTORS = {"a": unit(1, 0, 0), "a again": unit(1, 0.05, 0), "b": unit(0, 1, 0), "c": unit(0, 0, 1)}


def ids(strength: float, k: int = 3) -> list[str]:
    return [each.chunk_id for each in diversify(FOUND, VECTORS, strength, k)]


def test_the_stronger_the_later_comes_a_repetition() -> None:
    assert ids(0) == ["a", "a again", "b"]
    assert ids(0.4) == ["a", "b", "a again"]
    assert ids(0.9) == ["a", "b", "c"]
    assert ids(1, 4) == ["a", "b", "c", "a again"]


def test_scores_stay_and_what_decided_is_said() -> None:
    first, second, _ = diversify(FOUND, VECTORS, 0.5, 3)
    assert (first.score, second.score) == (0.9, 0.7)
    assert first.scores == {"dense": 0.9, "mmr": pytest.approx(0.5)}
    assert second.scores["mmr"] == pytest.approx(0.5 * (0.7 - 0.2) / 0.7)


def test_few_and_equal_passages() -> None:
    assert diversify([], {}, 0.5, 3) == []
    assert [each.chunk_id for each in diversify(FOUND[:1], VECTORS, 0.5, 3)] == ["a"]
    equal = [passage(name, 0.5) for name in VECTORS]
    assert [each.chunk_id for each in diversify(equal, VECTORS, 0.5, 4)] == ["a", "b", "c", "a again"]


@given(
    scores=st.lists(st.floats(-10, 10), min_size=1, max_size=12), strength=st.floats(0, 1), k=st.integers(1, 15),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_it_picks_each_once_and_the_best_first(scores: list[float], strength: float, k: int, seed: int) -> None:
    found = [passage(str(number), score) for number, score in enumerate(sorted(scores, reverse=True))]
    drawn = np.random.default_rng(seed).normal(size=(len(found), 4)).astype(np.float32)
    vectors = {str(number): unit(*row) for number, row in enumerate(drawn)}
    picked = [each.chunk_id for each in diversify(found, vectors, strength, k)]
    assert len(picked) == len(set(picked)) == min(k, len(found))
    assert picked[0] == "0"
    if strength == 0:
        assert [float(found[int(name)].score) for name in picked] == sorted(scores, reverse=True)[:k]
