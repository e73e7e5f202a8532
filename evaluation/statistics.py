"""How sure a mean over questions is: bootstrap intervals, of one arm and of the difference between two. Pure.

The interval is the percentile bootstrap (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13):
questions are drawn with replacement as many times as there are, the mean is taken, and what the middle 95 % of such
means span is the interval. Two arms that answered the same questions are compared question by question, which takes
out how hard each question is (Koehn, Statistical Significance Tests for Machine Translation Evaluation, 2004).

Not covered: the spread between training runs (one seed is one draw), corrections for many comparisons, and few
questions: below about twenty the interval is too narrow.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.errors import BadInput

RESAMPLES = 10_000
SEED = 17


@dataclass(frozen=True)
class Interval:
    """A mean and where it lies with the confidence that was asked for."""

    mean: float
    low: float
    high: float
    questions: int

    @property
    def excludes_zero(self) -> bool:
        """Of a difference: whether its sign is sure."""
        return self.low > 0 or self.high < 0


def mean_interval(
    values: Sequence[float], *, confidence: float = 0.95, resamples: int = RESAMPLES, seed: int = SEED
) -> Interval:
    """The mean of `values`, one a question, and its bootstrap interval. The same seed draws the same questions.

    Raises:
        BadInput: there are no values, or one is not a number.
    """
    if not values:
        raise BadInput("there are no answers to take a mean of; ask at least one question")
    if not all(math.isfinite(value) for value in values):
        raise BadInput("a score is not a number; leave questions without a score out before taking the mean")
    draw = random.Random(seed)
    means = sorted(math.fsum(draw.choices(values, k=len(values))) / len(values) for _ in range(resamples))
    tail = (1 - confidence) / 2
    return Interval(math.fsum(values) / len(values), _quantile(means, tail), _quantile(means, 1 - tail), len(values))


def paired_interval(
    ours: Mapping[str, float],
    theirs: Mapping[str, float],
    *,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> Interval:
    """The mean of `ours` minus `theirs`, both by question id, and its interval: questions are drawn, with both answers.

    Raises:
        BadInput: the two did not answer the same questions; the message names one that only one of them did.
    """
    if alone := sorted(ours.keys() ^ theirs.keys()):
        raise BadInput(
            f"question {alone[0]} was answered by one arm only, so the two cannot be paired; ask both the same questions",
            param=alone[0],
        )
    differences = [ours[question] - theirs[question] for question in sorted(ours)]
    return mean_interval(differences, confidence=confidence, resamples=resamples, seed=seed)


def _quantile(ordered: Sequence[float], share: float) -> float:
    """The value below which `share` of `ordered` lie, between two by straight line."""
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])
