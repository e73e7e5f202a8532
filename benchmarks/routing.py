"""Requests for 50 adapters on three replicas: our router beside Ray Serve's own multiplexing, on the same replicas.

What is compared is routing alone, so the replicas only keep time: a step over a batch of n sequences takes 30 + 3 n ms,
eight run at once, eight adapters are resident, and an absent one is loaded in as long as this machine takes to copy,
read and check the file of a rank-16 adapter over all linear layers of an 8-billion-parameter Llama (84 MB; measured
first, and the same for both). Arrivals are Poisson and the same for both arms, 65 % of what three replicas can do,
given by two processes with a router each. Prompts cost nothing here.

zipf: adapters are asked for by Zipf's law with exponent 1.1. hot: 80 % of all requests are for one adapter, the rest as
before. Every round asks for adapters that no replica has seen, so that rounds do not lean on each other; the first ten
seconds of it do not count. Figures are medians of the rounds; ``waited`` is the share of requests that had to wait for
a load, ``busiest`` the share of requests that went to the busiest replica (a third is even).
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import random
import shutil
import statistics
import tempfile
import time
from collections import Counter, OrderedDict, deque
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve.config import RequestRouterConfig

from benchmarks import report
from cluster import runtime
from cluster.config import load
from serving.engine.base import EngineStats, GenerateRequest, Sampling
from serving.reporting import Reporter

REPLICAS, SLOTS, BATCH, ADAPTERS, EXPONENT, HOT_SHARE, DRIVERS = 3, 8, 8, 50, 1.1, 0.8, 2
STEP_S, STEP_EACH_S = 0.030, 0.003
TOKENS = (16, 48)
LOAD = 0.65
"""Share of what the replicas can do."""
WARM_UP_S = 10.0
ADAPTER_BYTES = 84 << 20
ARMS, PATTERNS = ("metier", "serve.multiplexed"), ("zipf", "hot")


class Clockwork:
    """Decodes nothing, in the time that decoding takes."""

    def __init__(self) -> None:
        self.waiting: deque[list[Any]] = deque()
        self.running: list[list[Any]] = []
        self.made = 0
        self.stepping: asyncio.Task[None] | None = None

    async def decode(self, tokens: int) -> None:
        done = asyncio.get_running_loop().create_future()
        self.waiting.append([tokens, done])
        if self.stepping is None:
            self.stepping = asyncio.create_task(self._steps())
        await done

    async def _steps(self) -> None:
        due = time.monotonic()  # a step that begins late on a busy machine is made up for
        while self.waiting or self.running:
            while self.waiting and len(self.running) < BATCH:
                self.running.append(self.waiting.popleft())
            due += STEP_S + STEP_EACH_S * len(self.running)
            await asyncio.sleep(due - time.monotonic())
            self.made += len(self.running)
            for sequence in self.running:
                sequence[0] -= 1
                if not sequence[0]:
                    sequence[1].set_result(None)
            self.running = [sequence for sequence in self.running if sequence[0]]
        self.stepping = None


class Ours:
    """A replica that keeps its last eight adapters and reports, as :class:`serving.app.Generator` does."""

    def __init__(self, load_s: float) -> None:
        self.name = serve.get_replica_context().replica_id.unique_id
        self.load_s, self.loads = load_s, 0
        self.engine = Clockwork()
        self.reporter = Reporter()
        self.slots: OrderedDict[str, asyncio.Task[None]] = OrderedDict()

    async def generate(self, request: GenerateRequest) -> tuple[str, bool]:
        assert request.adapter is not None
        self.reporter.demand.add(request.adapter, request.sampling.max_tokens)
        began = time.monotonic()
        await self._adapter(request.adapter)
        waited = time.monotonic() - began > self.load_s / 4
        await self.engine.decode(request.sampling.max_tokens)
        return self.name, waited

    async def keep(self, digests: list[str]) -> None:
        for digest in digests:
            await self._adapter(digest)

    def record_routing_stats(self) -> dict[str, Any]:
        queue = [*self.engine.waiting, *self.engine.running]
        stats = EngineStats(
            running=len(self.engine.running),
            waiting=len(self.engine.waiting),
            waiting_tokens=sum(tokens for tokens, _ in queue),
            resident=tuple(adapter for adapter, loaded in self.slots.items() if loaded.done()),
            answer_tokens=self.engine.made,
            adapter_loads=self.loads,
            adapter_load_s=self.loads * self.load_s,
        )
        return self.reporter.report(stats, {})

    async def _adapter(self, adapter: str) -> None:
        if adapter not in self.slots:
            self.slots[adapter] = asyncio.create_task(self._load())
            if len(self.slots) > SLOTS:
                self.slots.popitem(last=False)
        self.slots.move_to_end(adapter)
        await asyncio.shield(self.slots[adapter])

    async def _load(self) -> None:
        self.loads += 1
        await asyncio.sleep(self.load_s)


class Stock:
    """The same, with residency and routing by ``serve.multiplexed``."""

    def __init__(self, load_s: float) -> None:
        self.name = serve.get_replica_context().replica_id.unique_id
        self.load_s = load_s
        self.engine = Clockwork()

    @serve.multiplexed(max_num_models_per_replica=SLOTS)  # type: ignore[untyped-decorator]
    async def adapter(self, _: str) -> object:
        await asyncio.sleep(self.load_s)
        return object()

    async def generate(self, request: GenerateRequest) -> tuple[str, bool]:
        began = time.monotonic()
        await self.adapter(serve.get_multiplexed_model_id())
        waited = time.monotonic() - began > self.load_s / 4
        await self.engine.decode(request.sampling.max_tokens)
        return self.name, waited


class Driver:
    """Half of the load, and the router that goes with it."""

    async def drive(self, arm: str, arrivals: list[tuple[float, str, int]]) -> list[tuple[float, float, str, bool]]:
        """(arrival, seconds, replica, waited for a load) of each of `arrivals`: (time, adapter, tokens)."""
        handle = serve.get_app_handle(arm)
        began = time.monotonic()

        async def one(at: float, adapter: str, tokens: int) -> tuple[float, float, str, bool]:
            await asyncio.sleep(began + at - time.monotonic())
            sent = time.monotonic()
            asked = handle if arm == ARMS[0] else handle.options(multiplexed_model_id=adapter)
            request = GenerateRequest("", (), Sampling(tokens), adapter, stream=False)
            replica, waited = await asked.generate.remote(request)
            return at, time.monotonic() - sent, replica, waited

        return await asyncio.gather(*(one(*arrival) for arrival in arrivals))


def arrivals(pattern: str, seconds: float, number: int, driver: int) -> list[tuple[float, str, int]]:
    """What one driver sends in round `number`; each round has adapters of its own, which no replica holds yet."""
    chance = random.Random(f"{pattern} {number} {driver}")
    speed = REPLICAS * BATCH / (STEP_S + STEP_EACH_S * BATCH)
    rate = LOAD * speed / statistics.fmean(TOKENS) / DRIVERS
    names = [f"{pattern}-{number}-{each}" for each in range(ADAPTERS)]
    weights = [1 / (place + 1) ** EXPONENT for place in range(ADAPTERS)]
    if pattern == "hot":
        rest = (1 - HOT_SHARE) / sum(weights[1:])
        weights = [HOT_SHARE, *(rest * weight for weight in weights[1:])]
    times = itertools.takewhile(
        lambda at: at < seconds, itertools.accumulate(iter(lambda: chance.expovariate(rate), None))
    )
    return [(at, chance.choices(names, weights)[0], chance.randint(*TOKENS)) for at in times]


def load_seconds() -> float:
    """Least time to copy, read and check an adapter's file."""
    import torch
    from safetensors.torch import load_file, save_file

    taken = []
    with tempfile.TemporaryDirectory() as name:
        source, copy = Path(name, "published.safetensors"), Path(name, "fetched.safetensors")
        count = 2 * 7 * 32  # A and B of seven linear layers in each of 32 blocks
        save_file(
            {str(number): torch.ones(ADAPTER_BYTES // 2 // count, dtype=torch.bfloat16) for number in range(count)},
            source,
        )
        for _ in range(5):
            began = time.perf_counter()
            shutil.copy(source, copy)
            assert all(bool(tensor.isfinite().all()) for tensor in load_file(copy).values())
            taken.append(time.perf_counter() - began)
    return min(taken)


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[int(share * (len(values) - 1))]


def measure(rounds: int) -> dict[str, Any]:
    seconds = 30.0 if rounds > 1 else 15.0
    load_s = load_seconds()
    print(f"loading an adapter takes {load_s:.3f} s", flush=True)
    figures: dict[str, Any] = {"load_s": round(load_s, 3), "rounds": rounds, "seconds": seconds}
    found: dict[tuple[str, str], list[dict[str, float]]] = {(pattern, arm): [] for pattern in PATTERNS for arm in ARMS}
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    with runtime.connect(load(None, ["ray.num_cpus=2"])):
        serve.start(proxy_location="Disabled", logging_config={"log_level": "WARNING", "enable_access_log": False})
        common: dict[str, Any] = {
            "num_replicas": REPLICAS,
            "max_ongoing_requests": 32,
            "ray_actor_options": {"num_cpus": 0.1},
            "logging_config": {"log_level": "WARNING", "enable_access_log": False},
        }
        router = RequestRouterConfig(
            request_router_class="serving.router:AdapterRouter",
            request_router_kwargs={"batch": BATCH},
            request_routing_stats_period_s=1.0,
        )
        ours = serve.deployment(Ours).options(**common, request_router_config=router).bind(load_s)
        serve.run(ours, name=ARMS[0], route_prefix=None)
        serve.run(serve.deployment(Stock).options(**common).bind(load_s), name=ARMS[1], route_prefix=None)
        drivers = [ray.remote(Driver).options(num_cpus=0).remote() for _ in range(DRIVERS)]
        for number, pattern in itertools.product(range(rounds), PATTERNS):
            loads = [arrivals(pattern, WARM_UP_S + seconds, number, each) for each in range(DRIVERS)]
            for arm in ARMS if number % 2 == 0 else reversed(ARMS):
                parts = ray.get([driver.drive.remote(arm, part) for driver, part in zip(drivers, loads, strict=True)])
                answers = [answer for part in parts for answer in part if answer[0] >= WARM_UP_S]
                taken = [answer[1] for answer in answers]
                busiest = Counter(answer[2] for answer in answers).most_common(1)[0][1]
                result = {
                    "p50_s": quantile(taken, 0.5),
                    "p95_s": quantile(taken, 0.95),
                    "waited": statistics.fmean(answer[3] for answer in answers),
                    "busiest": busiest / len(answers),
                    "requests": len(answers),
                }
                found[pattern, arm].append(result)
                print(f"round {number + 1}, {pattern}, {arm}: {json.dumps(result)}", flush=True)
        serve.shutdown()
    for (pattern, arm), results in found.items():
        medians = {name: round(statistics.median(each[name] for each in results), 3) for name in results[0]}
        figures[f"{pattern}, {arm}"] = medians
    figures["ratios"] = {
        f"{pattern}: {name} of serve.multiplexed / ours": round(
            statistics.median(
                stock[name] / our[name]
                for our, stock in zip(found[pattern, ARMS[0]], found[pattern, ARMS[1]], strict=True)
                if our[name]
            ),
            2,
        )
        for pattern in PATTERNS
        for name in ("p50_s", "p95_s", "waited", "busiest")
    }
    return figures


if __name__ == "__main__":
    report.run(__doc__, measure, quick=1, full=3)
