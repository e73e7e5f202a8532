"""Rules of routing against each other, in a simulation of the replicas and the load of :mod:`benchmarks.routing`.

Minutes of load in seconds and without Ray, so that the constants of :mod:`serving.routing` can be chosen. Every rule sees
what a router sees: reports once a second that arrive 0.2 s later, and its own requests; there are two routers. Simulated
time, so the figures are the same on every machine. ``waited`` and ``busiest`` are as in :mod:`benchmarks.routing`.

metier: :meth:`serving.routing.Book.rank`. sooner: the same without a margin for loads away from home. homes: the first
home, always. least: the fewest requests at this moment, which no router knows.
"""

from __future__ import annotations

import heapq
import itertools
import statistics
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

from benchmarks import report
from benchmarks.routing import (
    BATCH,
    DRIVERS,
    PATTERNS,
    REPLICAS,
    SLOTS,
    STEP_EACH_S,
    STEP_S,
    WARM_UP_S,
    arrivals,
    quantile,
)
from serving import routing
from serving.engine.base import EngineStats
from serving.reporting import Reporter

LOAD_S = (0.05, 0.25, 0.65)
SECONDS, REPORT_EVERY_S, REPORT_TAKES_S = 150.0, 1.0, 0.2
RULES = ("metier", "sooner", "homes", "least")


class Replica:
    """Eight sequences decode together, eight adapters are resident."""

    def __init__(self, world: World, load_s: float) -> None:
        self.world, self.load_s = world, load_s
        self.waiting: list[list[Any]] = []
        self.running: list[list[Any]] = []
        self.slots: OrderedDict[str, float] = OrderedDict()
        """Adapter -> when its load ends."""
        self.made = self.loads = 0
        self.stepping = False
        self.reporter = Reporter(lambda: world.now)

    def load(self, adapter: str) -> float:
        """Seconds until `adapter` is there."""
        if adapter not in self.slots:
            self.slots[adapter] = self.world.now + self.load_s
            self.loads += 1
            if len(self.slots) > SLOTS:
                self.slots.popitem(last=False)
        self.slots.move_to_end(adapter)
        return max(0.0, self.slots[adapter] - self.world.now)

    def decode(self, tokens: int, done: Callable[[], None]) -> None:
        self.waiting.append([tokens, done])
        if not self.stepping:
            self._begin()

    def _begin(self) -> None:
        while self.waiting and len(self.running) < BATCH:
            self.running.append(self.waiting.pop(0))
        self.stepping = bool(self.running)
        if self.running:
            self.world.after(STEP_S + STEP_EACH_S * len(self.running), self._step)

    def _step(self) -> None:
        self.made += len(self.running)
        for sequence in self.running:
            sequence[0] -= 1
            if not sequence[0]:
                sequence[1]()
        self.running = [sequence for sequence in self.running if sequence[0]]
        self._begin()

    def report(self) -> dict[str, Any]:
        stats = EngineStats(
            running=len(self.running),
            waiting=len(self.waiting),
            waiting_tokens=sum(tokens for tokens, _ in [*self.running, *self.waiting]),
            resident=tuple(adapter for adapter, at in self.slots.items() if at <= self.world.now),
            answer_tokens=self.made,
            adapter_loads=self.loads,
            adapter_load_s=self.loads * self.load_s,
        )
        return dict(self.reporter.report(stats, {}))


class World:
    """Time, replicas, routers."""

    def __init__(self, rule: str, load_s: float, seed: int) -> None:
        self.now, self.rule = 0.0, rule
        self.events: list[Any] = []
        self.count = itertools.count()
        self.replicas = {f"replica-{seed}-{number}": Replica(self, load_s) for number in range(REPLICAS)}
        self.books = [routing.Book(BATCH) for _ in range(DRIVERS)]
        self.answers: list[tuple[float, bool, str]] = []

    def after(self, seconds: float, call: Callable[..., None], *arguments: Any) -> None:
        heapq.heappush(self.events, (self.now + seconds, next(self.count), call, arguments))

    def run(self, pattern: str, seed: int) -> None:
        for driver, book in enumerate(self.books):
            for at, adapter, tokens in arrivals(pattern, SECONDS, seed, driver):
                self.after(at, self._arrive, book, at, adapter, tokens)
        self._report()
        while self.events:
            self.now, _, call, arguments = heapq.heappop(self.events)
            call(*arguments)

    def _choose(self, book: routing.Book, adapter: str, tokens: int, request: str) -> str:
        if self.rule == "homes":
            return routing.homes(adapter, self.replicas)[0]
        if self.rule == "least":
            order = routing.homes(request, self.replicas)
            return min(order, key=lambda id: len(self.replicas[id].waiting) + len(self.replicas[id].running))
        return book.rank(self.replicas, adapter, tokens, request)[0]

    def _arrive(self, book: routing.Book, at: float, adapter: str, tokens: int) -> None:
        request = str(next(self.count))
        id = self._choose(book, adapter, tokens, request)
        book.sent(request, id, adapter, tokens, self.now)
        book.accepted(request)
        replica = self.replicas[id]
        replica.reporter.demand.add(adapter, tokens)
        wait = replica.load(adapter)

        def done() -> None:
            book.ended(request, id)
            if at >= WARM_UP_S:
                self.answers.append((self.now - at, wait > replica.load_s / 4, id))

        self.after(wait, replica.decode, tokens, done)

    def _report(self) -> None:
        self.after(REPORT_TAKES_S, self._hear, {id: replica.report() for id, replica in self.replicas.items()})
        if self.now < SECONDS:
            self.after(REPORT_EVERY_S, self._report)

    def _hear(self, reports: dict[str, dict[str, Any]]) -> None:
        for book in self.books:
            book.hear(reports, self.now)
            for id, adapters in book.to_keep(self.now).items():
                for adapter in adapters:
                    self.replicas[id].load(adapter)


def result(rule: str, pattern: str, load_s: float, seeds: int) -> dict[str, float]:
    """Means over `seeds` runs."""
    found = []
    for seed in range(seeds):
        world = World(rule, load_s, seed)
        share = 0.0 if rule == "sooner" else 1.0
        margin = {name: share * getattr(routing, name) for name in ("MARGIN_LOADS", "MARGIN_TIME")}
        with patch.multiple(routing, **margin):
            world.run(pattern, seed)
        taken = [answer[0] for answer in world.answers]
        busiest = Counter(answer[2] for answer in world.answers).most_common(1)[0][1]
        figures = {"p50_s": quantile(taken, 0.5), "p95_s": quantile(taken, 0.95)}
        figures["waited"] = statistics.fmean(answer[1] for answer in world.answers)
        found.append(figures | {"busiest": busiest / len(taken)})
    return {name: round(statistics.fmean(each[name] for each in found), 3) for name in found[0]}


def measure(seeds: int) -> dict[str, Any]:
    figures: dict[str, Any] = {"seeds": seeds}
    ratios = {}
    for pattern, load_s in itertools.product(PATTERNS, LOAD_S):
        by_rule = {rule: result(rule, pattern, load_s, seeds) for rule in RULES}
        figures |= {f"{pattern}, load {load_s:g} s, {rule}": each for rule, each in by_rule.items()}
        for rule in RULES[1:]:
            for name in ("p95_s", "waited"):
                ratio = by_rule[rule][name] / by_rule["metier"][name]
                ratios[f"{pattern}, load {load_s:g} s: {name} of {rule} / metier"] = round(ratio, 2)
    return figures | {"ratios": ratios}


if __name__ == "__main__":
    report.run(__doc__, measure, quick=1, full=5)
