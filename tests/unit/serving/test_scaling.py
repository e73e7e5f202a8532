"""What a replica measures of itself, and how many replicas follow from it; no Ray here."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from serving.engine.base import EngineStats
from serving.reporting import DEMAND_S, SPEED_HALF_LIFE_S, Demand, Reporter
from serving.routing import Report
from serving.scaling import WaitingTokens, homes_wanted


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def context(waiting: dict[str, float], *, replicas: int, total: float = 0, queued: float = 0) -> Any:
    """As much of Serve's ``AutoscalingContext`` as the policy reads; tests/ray gives it a real one."""
    return SimpleNamespace(
        current_num_replicas=replicas,
        target_num_replicas=replicas,
        total_num_requests=total,
        total_queued_requests=queued,
        aggregated_metrics={"waiting_tokens": waiting} if waiting else {},
    )


@pytest.mark.parametrize(
    ("waiting", "replicas", "total", "queued", "wanted"),
    [
        ({"a": 0.0}, 1, 0, 0, 0),
        ({"a": 1.0}, 1, 1, 0, 1),
        ({"a": 0.0, "b": 0.0}, 2, 3, 0, 1),  # requests without tokens yet keep one awake
        ({"a": 1000.0}, 1, 8, 0, 1),
        ({"a": 1001.0}, 1, 8, 0, 2),
        ({"a": 3000.0, "b": 1500.0}, 2, 20, 0, 5),
        ({"a": 1000.0}, 1, 32, 24, 4),  # three times as many wait in front, of the same size
        ({"a": 500.0}, 1, 24, 24, 1),  # all of them in front: what is left on the replica counts alone
    ],
)
def test_replicas_follow_waiting_tokens(
    waiting: dict[str, float], replicas: int, total: int, queued: int, wanted: int
) -> None:
    asked = context(waiting, replicas=replicas, total=total, queued=queued)
    assert WaitingTokens(1000)(asked) == (wanted, {})


def test_no_report_yet_changes_nothing() -> None:
    assert WaitingTokens(1000)(context({}, replicas=3, total=50)) == (3, {})


def test_homes_follow_demand_and_never_fall_below_the_minimum() -> None:
    demand = {"hot": 210.0, "warm": 70.0, "cold": 1.0}
    assert homes_wanted(demand, {}, 100.0, 5) == {"hot": 3}
    assert homes_wanted(demand, {"cold": 2, "hot": 2}, 100.0, 5) == {"hot": 3, "cold": 2}
    assert homes_wanted(demand, {"cold": 4}, 10.0, 3) == {"hot": 3, "warm": 3, "cold": 3}, "no more than there are"


def test_demand_is_a_rate_that_forgets() -> None:
    clock = Clock()
    demand = Demand(clock)
    for _ in range(3000):  # 50 tokens/s for five minutes
        clock.now += 0.1
        demand.add("hot", 5)
    assert demand.rates()["hot"] == pytest.approx(50, rel=0.01)
    clock.now += DEMAND_S
    assert demand.rates()["hot"] == pytest.approx(50 / math.e, rel=0.01)
    clock.now += 10 * DEMAND_S
    assert demand.rates() == {} and demand._rates == {}


def test_speed_is_the_best_while_busy_and_idleness_is_no_slowness() -> None:
    clock = Clock()
    reporter = Reporter(clock)

    def said(seconds: float, **figures: Any) -> float:
        clock.now += seconds
        speed: float = reporter.report(EngineStats(**figures), {})["tokens_per_s"]
        return speed

    assert said(1, waiting_tokens=500) == 0.0
    assert said(2, waiting_tokens=300, prompt_tokens=300, cached_tokens=200, answer_tokens=100) == 100.0
    assert said(1, waiting_tokens=0, prompt_tokens=300, cached_tokens=200, answer_tokens=300) == 200.0
    assert said(3600, waiting_tokens=10, prompt_tokens=300, cached_tokens=200, answer_tokens=301) == 200.0
    slower = said(SPEED_HALF_LIFE_S, waiting_tokens=10, prompt_tokens=300, cached_tokens=200, answer_tokens=361)
    assert slower == 100.0


def test_a_report_is_numbered_anew_only_when_something_changed() -> None:
    clock = Clock()
    reporter = Reporter(clock)
    stats = EngineStats(running=1, waiting=2, resident=("a",), adapter_loads=4, adapter_load_s=2.0)
    first = reporter.report(stats, {"a": 2})
    assert Report.read(first) == Report(1, 3, 0, 0.0, 0.5, frozenset({"a"}), frozenset(), {}, {"a": 2})
    clock.now += 1
    assert reporter.report(stats, {"a": 2}) is first
    reporter.demand.add("a", 300)
    assert (reporter.report(stats, {"a": 2})["number"], reporter.report(stats, {})["number"]) == (2, 3)
