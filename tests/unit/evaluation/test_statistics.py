"""Bootstrap intervals: against the normal approximation and scipy, how often they hold, and what pairing takes out."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from cluster.errors import BadInput
from evaluation.statistics import mean_interval, paired_interval


def test_of_many_answers_it_is_close_to_the_normal_approximation() -> None:
    values = [1.0] * 300 + [0.0] * 100
    interval = mean_interval(values)
    half = 1.96 * (0.75 * 0.25 / 400) ** 0.5
    assert interval.mean == 0.75
    assert interval.low == pytest.approx(0.75 - half, abs=0.005)
    assert interval.high == pytest.approx(0.75 + half, abs=0.005)
    assert interval.questions == 400


def test_it_agrees_with_scipy_on_skewed_scores() -> None:
    draw = random.Random(3)
    values = [draw.random() ** 4 for _ in range(60)]
    ours = mean_interval(values)
    theirs = stats.bootstrap((values,), lambda x, axis: x.mean(axis), method="percentile", rng=1).confidence_interval
    assert ours.low == pytest.approx(theirs.low, abs=0.01)
    assert ours.high == pytest.approx(theirs.high, abs=0.01)


def test_about_nineteen_in_twenty_intervals_hold_the_true_mean() -> None:
    draw = random.Random(11)
    held = 0
    for experiment in range(200):
        sample = [float(draw.random() < 0.4) for _ in range(60)]
        interval = mean_interval(sample, resamples=400, seed=experiment)
        held += interval.low <= 0.4 <= interval.high
    assert 178 <= held <= 199


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=40))
def test_the_mean_lies_inside_and_the_interval_inside_the_values(values: list[float]) -> None:
    interval = mean_interval(values, resamples=200)
    slack = 1e-9
    assert min(values) - slack <= interval.low <= interval.high <= max(values) + slack
    assert interval.mean == pytest.approx(sum(values) / len(values))


def test_the_seed_decides_and_more_confidence_is_wider() -> None:
    values = [0.0, 0.1, 0.4, 0.5, 0.9, 1.0]
    assert mean_interval(values, seed=5) == mean_interval(values, seed=5)
    wide, narrow = mean_interval(values, confidence=0.99), mean_interval(values, confidence=0.8)
    assert wide.low < narrow.low < narrow.high < wide.high


def test_pairing_takes_out_how_hard_a_question_is() -> None:
    draw = random.Random(2)
    hard = {f"q{number}": draw.random() * 0.9 for number in range(80)}
    better = {question: value + 0.05 for question, value in hard.items()}
    paired = paired_interval(better, hard)
    assert paired.mean == pytest.approx(0.05)
    assert paired.excludes_zero
    assert paired.high - paired.low < 1e-9
    alone, other = mean_interval(list(better.values())), mean_interval(list(hard.values()))
    assert alone.low < other.high, "two intervals that overlap would not have told the arms apart"


def test_the_sign_of_a_difference_is_sure_or_not() -> None:
    same = {f"q{number}": float(number % 2) for number in range(40)}
    other = {question: 1 - value for question, value in same.items()}
    assert not paired_interval(same, other).excludes_zero
    assert paired_interval(dict.fromkeys(same, 0.0), dict.fromkeys(same, 1.0)).high < 0
    assert paired_interval(dict.fromkeys(same, 0.0), dict.fromkeys(same, 1.0)).excludes_zero


def test_arms_that_answered_other_questions_are_refused_by_name() -> None:
    with pytest.raises(BadInput) as refused:
        paired_interval({"q1": 1.0, "q2": 0.0}, {"q1": 1.0})
    assert str(refused.value) == (
        "question q2 was answered by one arm only, so the two cannot be paired; ask both the same questions"
    )
    assert refused.value.param == "q2"


def test_nothing_and_not_a_number_are_refused() -> None:
    with pytest.raises(BadInput, match="there are no answers to take a mean of; ask at least one question"):
        mean_interval([])
    with pytest.raises(BadInput, match="a score is not a number"):
        mean_interval([1.0, float("nan")])
