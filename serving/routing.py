"""Which replica answers a request for an adapter: the one where it is done soonest, loading included.

Pure Python, shared by every router: :mod:`serving.router` feeds it what Ray Serve knows. Costs are seconds. A replica
with work in front of a request delays it by ``min(tokens, requests * its own tokens) / tokens_per_s``: replicas share
their time between the sequences of a batch, and under processor sharing another request delays mine by the smaller of
what is left of it and of mine. To that come the seconds of loading the adapter where it is not in memory. So a hot
adapter overflows to a further replica as soon as the queue where it is costs more than a load, and stays where it is
until then.

A cold adapter goes to its *home*: the first replicas in the order of :func:`homes`, a rendezvous hash (Thaler and
Ravishankar, 1998) on which all routers agree without talking; a replica that comes or goes moves only the adapters it
wins or had. It is loaded where it has no home only if that wins a margin beyond the load: another adapter is pushed out
there and has to be loaded again.

Not covered: which replica holds a request's prefix in its cache, beyond what follows from its adapter; network distance.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from statistics import fmean
from typing import Any

from serving.scaling import homes_wanted

TOKENS_PER_S = 100.0
"""Speed of a replica before any was measured."""
LOAD_S = 0.5
"""Seconds of loading an adapter before any load was measured."""
HOSTED = 0.1
"""Moving an adapter from host memory into a slot, as a share of loading it."""
MARGIN_LOADS, MARGIN_TIME = 2.0, 0.75
"""What a load away from home has to win: so many loads, or such a share of the request's time in a full batch if that is
more. Chosen by simulation of skewed load over more adapters than fit: with less, the loads of strict homes double where
loads are cheap, and little is won; with more, tails grow."""
REPORT_LAG_S = 0.5
"""Age of a report when it arrives, at most: what was sent less than that before is not in it yet."""
UNCONFIRMED_S = 60.0
"""A request that was given a replica and of which nothing was heard since is forgotten."""
KEEP_AGAIN_S = 10.0
"""How long a replica that was asked to keep adapters is given to load them."""


@dataclass(frozen=True)
class Report:
    """What a replica last said of itself (:class:`serving.reporting.Reporter` writes it); nothing before its first."""

    number: int = 0
    """Counts up; the same number is the same report."""
    requests: int = 0
    """Running and waiting."""
    waiting_tokens: int = 0
    tokens_per_s: float = 0.0
    """Prompt and answer tokens it computes when it has enough to do; 0: not measured yet."""
    load_s: float = 0.0
    """Seconds to load an adapter, on average; 0: not measured yet."""
    resident: frozenset[str] = frozenset()
    hosted: frozenset[str] = frozenset()
    demand: Mapping[str, float] = field(default_factory=dict)
    """Adapter -> tokens/s that were asked of this replica."""
    minimum: Mapping[str, int] = field(default_factory=dict)
    """Adapter -> least number of replicas that keep it, from ``adapter_replicas``."""

    @classmethod
    def read(cls, stats: Mapping[str, Any]) -> Report:
        """From the mapping that travels through Serve."""
        return cls(**{**stats, "resident": frozenset(stats["resident"]), "hosted": frozenset(stats["hosted"])})


@dataclass(frozen=True)
class Candidate:
    """A replica as :func:`rank` sees it."""

    id: str
    requests: int = 0
    tokens: int = 0
    """What its requests still have to compute, at most."""
    tokens_per_s: float = TOKENS_PER_S
    load_s: float = LOAD_S
    resident: frozenset[str] = frozenset()
    """Adapters that decode there without loading, or will when a load under way ends."""
    hosted: frozenset[str] = frozenset()


def homes(key: str, replicas: Iterable[str]) -> list[str]:
    """`replicas` in the order in which `key` prefers them; the same on every machine."""

    def weight(replica: str) -> bytes:
        return blake2b(f"{key}\0{replica}".encode(), digest_size=8).digest()

    return sorted(replicas, key=weight, reverse=True)


def rank(
    candidates: Sequence[Candidate], adapter: str | None, *, tokens: int, batch: int = 1, wanted: int = 1, key: str = ""
) -> list[str]:
    """Ids of `candidates`, the one with the least expected delay first.

    Args:
        adapter: digest; ``None`` is the base model, which is everywhere.
        tokens: prompt and answer of the request, at most.
        batch: sequences that a replica decodes together.
        wanted: how many replicas should hold the adapter (:func:`serving.scaling.homes_wanted`).
        key: decides between equals for the base model; requests with different keys spread evenly.
    """
    order = {id: place for place, id in enumerate(homes(adapter or key, (each.id for each in candidates)))}

    def cost(candidate: Candidate) -> float:
        delay = min(candidate.tokens, candidate.requests * tokens) / candidate.tokens_per_s
        if adapter is None or adapter in candidate.resident:
            return delay
        if adapter in candidate.hosted:
            return delay + HOSTED * candidate.load_s
        if order[candidate.id] < wanted:
            return delay + candidate.load_s
        own = tokens * batch / candidate.tokens_per_s
        return delay + candidate.load_s + max(MARGIN_LOADS * candidate.load_s, MARGIN_TIME * own)

    return [each.id for each in sorted(candidates, key=lambda each: (cost(each), order[each.id]))]


@dataclass
class _Sent:
    """A request that this router gave to a replica and that has not ended."""

    replica: str
    adapter: str | None
    tokens: int
    at: float
    reported: bool = False
    """Whether the replica's last report counts it."""
    confirmed: bool = False


class Book:
    """What one router knows of the replicas: their reports, and what it sent them since.

    Reports come about once a second, requests by the hundred: without its own entries a router would send all of a
    second's requests to the replica that was idle in the last report. Every time is given by the caller, in seconds of
    any steady clock.
    """

    def __init__(self, batch: int = 1) -> None:
        self.batch = batch
        """Sequences that a replica decodes together."""
        self.reports: dict[str, Report] = {}
        self._sent: dict[str, _Sent] = {}
        self._arriving: defaultdict[str, dict[str, float]] = defaultdict(dict)
        """Replica -> adapter -> when a request for it was last sent there, until a report tells what became of it."""
        self._kept: dict[str, tuple[frozenset[str], float]] = {}
        self.wanted: dict[str, int] = {}
        """Adapter -> how many replicas should hold it, for those that need more than the one they are asked of."""

    def hear(self, reports: Mapping[str, Mapping[str, Any]], now: float) -> None:
        """The replicas there are, with what each last said (an empty mapping: nothing yet)."""
        for gone in self.reports.keys() - reports.keys():
            for table in (self.reports, self._arriving, self._kept):
                table.pop(gone, None)
        self._sent = {
            id: sent
            for id, sent in self._sent.items()
            if sent.replica in reports and (sent.confirmed or sent.at > now - UNCONFIRMED_S)
        }
        news = set()
        for replica, stats in reports.items():
            report = Report.read(stats) if stats else Report()
            if report.number != self.reports.get(replica, Report()).number:
                news.add(replica)
            self.reports[replica] = report
        for sent in self._sent.values():
            sent.reported |= sent.replica in news and sent.at <= now - REPORT_LAG_S
        for replica in news:
            arriving = self._arriving[replica]
            self._arriving[replica] = {adapter: at for adapter, at in arriving.items() if at > now - REPORT_LAG_S}
        self.wanted = self._wanted()

    def sent(self, request: str, replica: str, adapter: str | None, tokens: int, now: float) -> None:
        """`request` was given to `replica`; once more if the first one refused it."""
        self._sent[request] = _Sent(replica, adapter, tokens, now)
        if adapter is not None:
            self._arriving[replica][adapter] = now

    def accepted(self, request: str) -> None:
        """The replica took `request`: it is there until it ends."""
        if sent := self._sent.get(request):
            sent.confirmed = True

    def ended(self, request: str, replica: str) -> None:
        """`request` is no longer on `replica`, for whatever reason."""
        if (sent := self._sent.get(request)) and sent.replica == replica:
            del self._sent[request]

    def rank(self, replicas: Iterable[str], adapter: str | None, tokens: int, request: str) -> list[str]:
        """`replicas` for a request, best first."""
        wanted = self.wanted.get(adapter, 1) if adapter else 1
        return rank(self.candidates(replicas), adapter, tokens=tokens, batch=self.batch, wanted=wanted, key=request)

    def candidates(self, replicas: Iterable[str]) -> list[Candidate]:
        """Reports with what was sent since."""
        tokens: Counter[str] = Counter()
        requests: Counter[str] = Counter()
        using: defaultdict[str, set[str]] = defaultdict(set)
        for sent in self._sent.values():
            if not sent.reported:
                tokens[sent.replica] += sent.tokens
                requests[sent.replica] += 1
            if sent.adapter is not None:
                using[sent.replica].add(sent.adapter)
        speed, load_s = self._typical("tokens_per_s", TOKENS_PER_S), self._typical("load_s", LOAD_S)
        found = []
        for replica in replicas:
            report = self.reports.get(replica, Report())
            found.append(
                Candidate(
                    id=replica,
                    requests=report.requests + requests[replica],
                    tokens=report.waiting_tokens + tokens[replica],
                    tokens_per_s=report.tokens_per_s or speed,
                    load_s=report.load_s or load_s,
                    resident=report.resident.union(using[replica], self._arriving.get(replica, ())),
                    hosted=report.hosted,
                )
            )
        return found

    def to_keep(self, now: float) -> dict[str, list[str]]:
        """Replica -> all adapters it is a home of, for replicas that miss one of theirs; to be asked at once."""
        theirs: defaultdict[str, set[str]] = defaultdict(set)
        for adapter, count in self.wanted.items():
            for replica in homes(adapter, self.reports)[:count]:
                theirs[replica].add(adapter)
        asked = {}
        for replica, adapters in theirs.items():
            report = self.reports[replica]
            last, at = self._kept.get(replica, (frozenset(), 0.0))
            if (
                report.number
                and adapters - report.resident - report.hosted
                and (last != adapters or now > at + KEEP_AGAIN_S)
            ):
                self._kept[replica] = frozenset(adapters), now
                asked[replica] = sorted(adapters)
        return asked

    def _wanted(self) -> dict[str, int]:
        demand: Counter[str] = Counter()
        minimum: dict[str, int] = {}
        for report in self.reports.values():
            demand.update(report.demand)
            for adapter, least in report.minimum.items():
                minimum[adapter] = max(least, minimum.get(adapter, 0))
        return homes_wanted(demand, minimum, self._typical("tokens_per_s", TOKENS_PER_S), len(self.reports))

    def _typical(self, figure: str, unknown: float) -> float:
        known = [value for report in self.reports.values() if (value := getattr(report, figure))]
        return fmean(known) if known else unknown
