"""What a generator replica measures of itself for those who route requests to it: speed, load time, demand.

Pure Python; ``serving.app`` hands it to Ray Serve. :class:`serving.routing.Report` says what each figure means.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

from serving.engine.base import EngineStats

DEMAND_S = 30.0
"""Time constant of an adapter's demand: what was asked so long ago counts 1/e."""
SPEED_HALF_LIFE_S = 60.0
"""Busy seconds after which a replica that has become slower is believed to be half as fast as it was at its best."""
FORGOTTEN = 0.01
"""Tokens/s below which an adapter's demand is dropped."""


class Demand:
    """Tokens per second asked of each adapter, exponentially weighted."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._rates: dict[str, tuple[float, float]] = {}

    def add(self, adapter: str, tokens: int) -> None:
        now = self._clock()
        self._rates[adapter] = (self._now(adapter, now) + tokens / DEMAND_S, now)

    def rates(self) -> dict[str, float]:
        """Adapter -> tokens/s now; those that are hardly asked any more are left out, and forgotten."""
        now = self._clock()
        rates = {adapter: self._now(adapter, now) for adapter in self._rates}
        self._rates = {adapter: at for adapter, at in self._rates.items() if rates[adapter] >= FORGOTTEN}
        return {adapter: round(rate, 2) for adapter, rate in rates.items() if rate >= FORGOTTEN}

    def _now(self, adapter: str, now: float) -> float:
        rate, at = self._rates.get(adapter, (0.0, now))
        return rate * math.exp((at - now) / DEMAND_S)


class Reporter:
    """Turns an engine's counters into figures that another machine can reckon with."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.demand = Demand(clock)
        self._clock = clock
        self._last: dict[str, Any] = {"number": 0}
        self._before = EngineStats()
        self._at = clock()
        self._speed = 0.0

    def report(self, stats: EngineStats, minimum: Mapping[str, int]) -> dict[str, Any]:
        """Of this moment, as plain data, with the same number as the last one if nothing changed; speed is taken over the time
        since the last call."""
        self._measure(stats)
        figures = {
            "requests": stats.running + stats.waiting,
            "waiting_tokens": stats.waiting_tokens,
            "tokens_per_s": self._speed,
            "load_s": stats.adapter_load_s / stats.adapter_loads if stats.adapter_loads else 0.0,
            "resident": list(stats.resident),
            "hosted": list(stats.hosted),
            "demand": self.demand.rates(),
            "minimum": dict(minimum),
        }
        if figures != {name: value for name, value in self._last.items() if name != "number"}:
            self._last = {"number": self._last["number"] + 1, **figures}
        return self._last

    def _measure(self, stats: EngineStats) -> None:
        """The best speed lately. Only while there was work all along: an idle replica is not a slow one."""
        now, before = self._clock(), self._before
        seconds = now - self._at
        made = stats.prompt_tokens - stats.cached_tokens + stats.answer_tokens
        made -= before.prompt_tokens - before.cached_tokens + before.answer_tokens
        if seconds > 0 and before.waiting_tokens and made:
            self._speed = max(made / seconds, self._speed * 0.5 ** (seconds / SPEED_HALF_LIFE_S))
        self._before, self._at = stats, now
