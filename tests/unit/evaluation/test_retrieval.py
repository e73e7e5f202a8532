"""Measures over rankings, how chunks become documents, and when a difference is chance."""

import random
from pathlib import Path

import pytest

from cluster.errors import BadInput
from evaluation.retrieval import Evaluated, ModeResult, best_documents, check_modes, measure, randomization_test
from evaluation.retrieval_plot import retrieval_plot
from retrieval.types import Passage

JUDGED = {"q1": {"a": 1, "b": 1}, "q2": {"c": 1}}


def test_measures_are_those_of_the_textbook() -> None:
    values = measure({"q1": ["x", "a", "y", "b"], "q2": ["c"]}, JUDGED, 100)
    assert values["RR@10"] == {"q1": 0.5, "q2": 1.0}
    assert values["R@1"] == {"q1": 0.0, "q2": 1.0}
    assert values["R@5"] == {"q1": 1.0, "q2": 1.0}
    assert values["P@5"] == {"q1": pytest.approx(0.4), "q2": pytest.approx(0.2)}
    assert values["AP"] == {"q1": pytest.approx((1 / 2 + 2 / 4) / 2), "q2": 1.0}
    assert values["nDCG@10"]["q1"] == pytest.approx((0.63093 + 0.43068) / (1 + 0.63093), abs=1e-4)
    assert list(values) == ["nDCG@10", "R@1", "R@5", "R@10", "R@100", "P@5", "P@10", "RR@10", "AP"]


def test_a_query_that_found_nothing_counts_as_zero() -> None:
    values = measure({"q1": ["a", "b"], "q2": []}, JUDGED, 100)
    assert all(of == {"q1": of["q1"], "q2": 0.0} for of in values.values())
    assert ModeResult(values, [0.1]).means()["nDCG@10"] == pytest.approx(0.5)


def test_grades_weigh() -> None:
    graded = {"q": {"a": 3, "b": 1}}
    better, worse = (measure({"q": run}, graded, 10)["nDCG@10"]["q"] for run in (["a", "b"], ["b", "a"]))
    assert better == 1.0 > worse


def test_no_measure_looks_deeper_than_was_asked() -> None:
    assert list(measure({"q1": ["a"], "q2": []}, JUDGED, 5)) == ["R@1", "R@5", "P@5", "AP"]


def test_a_document_stands_where_its_best_chunk_stands() -> None:
    passages = [Passage(str(n), doc, "", "", "", "", 0, 1.0) for n, doc in enumerate("abacbd")]
    assert best_documents(passages, 3) == ["a", "b", "c"]


def test_chance_and_difference_are_told_apart() -> None:
    draw = random.Random(2)
    base = {str(n): draw.random() for n in range(80)}
    noise = {key: value + draw.uniform(-0.1, 0.1) for key, value in base.items()}
    better = {key: value + draw.uniform(-0.05, 0.1) for key, value in base.items()}
    assert randomization_test(base, noise) > 0.05
    assert randomization_test(better, base) < 0.01
    assert randomization_test(base, better) == randomization_test(better, base)
    assert randomization_test(base, base) == 1.0


@pytest.mark.parametrize(("modes", "message"), [(["dense", "both"], "no mode 'both'"), ([], "names none")])
def test_modes_are_checked(modes: list[str], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        check_modes(modes)


def test_latency_in_milliseconds() -> None:
    assert ModeResult({}, [0.010] * 95 + [0.2] * 5).latency() == {"p50_ms": 10.0, "p95_ms": pytest.approx(19.5)}


def test_plot_of_two_collections(tmp_path: Path) -> None:
    modes = {
        name: ModeResult(measure({"q1": run, "q2": []}, JUDGED, 100), [0.1])
        for name, run in (("dense", ["a"]), ("bm25", ["b", "a"]))
    }
    one = Evaluated(3, 4, 2, 100, None, modes)
    retrieval_plot({"first": one}, tmp_path / "new" / "one.png")
    retrieval_plot({"first": one, "second": one}, tmp_path / "two.png")
    sizes = [path.read_bytes()[16:24] for path in (tmp_path / "new" / "one.png", tmp_path / "two.png")]
    heights = [int.from_bytes(size[4:]) for size in sizes]
    assert heights[1] == 2 * heights[0]
    with pytest.raises(BadInput, match="cannot be written"):
        retrieval_plot({"first": one}, tmp_path / "two.png" / "inside.png")
