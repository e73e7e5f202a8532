"""Replicas of the generator on a real Ray Serve: where requests go, how replicas come, are given up and end.

Engines answer when the test lets them (:mod:`tests.gate`); all else is what is served. The last test decodes with the
native engine. Several routers at a time and several nodes are not covered here.
"""

from __future__ import annotations

import asyncio
import os
import signal
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from cluster import runtime
from cluster.config import Config, to_json
from cluster.errors import Unavailable
from serving.engine.base import Delta, GenerateRequest, Sampling
from serving.routing import homes
from tests import trade

if TYPE_CHECKING:
    from tests.gate import Gate

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
ADAPTERS = 5


def configure(directory: Path, *overrides: str) -> Config:
    generator = {
        "engine": "echo",
        "cpus": 0.1,
        "min_replicas": 2,
        "max_replicas": 2,
        "max_ongoing_requests": 100,
        "batch_size": 4,
        "stuck_s": 3,
        "drain_s": 1,
        "adapter_replicas": "{kept: 2}",
    }
    ours = [f"serving.generator.{name}={value}" for name, value in generator.items()]
    return trade.configure(directory, "ray.num_cpus=2", *ours, *overrides)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[str]]]:
    """A Ray with Serve on it, no HTTP; the directory of a trade, and the digests of its adapters, `kept` the first."""
    from ray import serve

    directory = tmp_path_factory.mktemp("replicas")
    config = configure(directory)
    digests = [
        trade.publish(config, trade.write_adapter(config, directory / name, seed=seed), name).digest
        for seed, name in enumerate(["kept", *(f"adapter-{number}" for number in range(ADAPTERS))])
    ]
    with runtime.connect(config):
        serve.start(proxy_location="Disabled")
        yield directory, digests
        serve.shutdown()
    trade.assert_no_children()


def deploy(config: Config, gate: Gate) -> Any:
    """Replicas behind `gate`, in place of those there are; a handle that streams."""
    from ray import serve

    from serving.app import generator_options
    from tests.gate import GatedGenerator

    chosen = generator_options(config.serving.generator)
    made = serve.deployment(GatedGenerator).options(**chosen).bind(to_json(config), str(gate.directory))
    return serve.run(made, name="gated", route_prefix=None).options(stream=True)


@contextmanager
def deployed(config: Config, gate: Gate) -> Iterator[Any]:
    """The same; gone afterwards."""
    from ray import serve

    handle = deploy(config, gate)
    try:
        yield handle
    finally:
        gate.open()
        serve.delete("gated")


def replicas(state: str = "RUNNING") -> dict[str, int]:
    """Id -> pid of the replicas in `state`."""
    from ray.serve.context import _get_global_client

    [deployment] = _get_global_client().get_serve_details()["applications"]["gated"]["deployments"].values()
    return {each["replica_id"]: each["pid"] for each in deployment["replicas"] if each["state"] == state}


def request(adapter: str | None = None, tokens: int = 100) -> GenerateRequest:
    return GenerateRequest(uuid.uuid4().hex, tuple(range(8)), Sampling(tokens - 8), adapter)


async def begin(handle: Any, adapter: str | None = None, tokens: int = 100) -> tuple[int, AsyncGenerator[Delta, None]]:
    """A request whose first token is there: pid of the replica that answers, and the rest of the stream."""
    from serving.app import generate

    stream: Any = generate(handle, request(adapter, tokens))
    first = await anext(stream)
    return first.token_ids[0], stream


async def rest(stream: AsyncIterator[Delta]) -> str | None:
    return [delta async for delta in stream][-1].finish_reason


@pytest.fixture(scope="module")
def two(places: tuple[Path, list[str]]) -> Iterator[tuple[Any, Gate, list[str]]]:
    """Two replicas, which the tests of this file kill one after the other."""
    from tests.gate import Gate

    directory, digests = places
    gate = Gate(directory / "two")
    with deployed(configure(directory), gate) as handle:
        yield handle, gate, digests


def both_running() -> dict[str, int] | None:
    found = replicas()
    return found if len(found) == 2 and all(psutil.pid_exists(pid) for pid in found.values()) else None


def test_homes_load_what_they_keep_before_anybody_asks(two: tuple[Any, Gate, list[str]]) -> None:
    _, gate, (kept, *_) = two
    pids = set(replicas().values())
    loaded = trade.wait_for("both replicas to load it", lambda: len(gate.loaded()) == 2 and gate.loaded())
    assert loaded == {pid: {kept} for pid in pids}


def test_each_cold_adapter_goes_to_its_home(two: tuple[Any, Gate, list[str]]) -> None:
    handle, gate, (_, *cold) = two
    gate.open()
    ids = {pid: id for id, pid in replicas().items()}

    async def ask() -> None:
        for adapter in cold:
            for _ in range(2):
                pid, stream = await begin(handle, adapter, tokens=10)
                assert await rest(stream) == "stop"
                assert ids[pid] == homes(adapter, ids.values())[0]

    asyncio.run(ask())


def test_a_hot_adapter_spreads_and_comes_to_both_in_equal_parts(two: tuple[Any, Gate, list[str]]) -> None:
    handle, gate, (_, hot, *_) = two
    gate.close()

    async def ask() -> list[int]:
        begun = [await begin(handle, hot) for _ in range(20)]
        gate.open()
        assert {await rest(stream) for _, stream in begun} == {"stop"}
        return [pid for pid, _ in begun]

    answered = asyncio.run(ask())
    shares = sorted(answered.count(pid) for pid in replicas().values())
    assert sum(shares) == 20
    assert shares[0] >= 7, "three stay at home before it is worth a load elsewhere, and then queues decide"


def test_a_killed_replica_ends_its_streams_with_an_error_and_comes_back(two: tuple[Any, Gate, list[str]]) -> None:
    handle, gate, _ = two
    gate.close()
    before = trade.wait_for("two replicas", both_running)

    async def ask() -> None:
        begun = [await begin(handle) for _ in range(12)]
        victim = begun[0][0]
        assert {pid for pid, _ in begun} == set(before.values())
        os.kill(victim, signal.SIGKILL)
        for pid, stream in begun:
            if pid == victim:
                with pytest.raises(Unavailable, match="ended before the answer was complete"):
                    await asyncio.wait_for(rest(stream), 60)
        gate.open()
        assert {await rest(stream) for pid, stream in begun if pid != victim} == {"stop"}
        for _ in range(4):
            pid, stream = await begin(handle)
            assert pid != victim and await rest(stream) == "stop"

    asyncio.run(ask())
    after = trade.wait_for("it to come back", lambda: (now := both_running()) and now != before and now, 120)
    assert len(before.keys() & after.keys()) == 1


def test_a_stuck_engine_is_replaced_and_its_streams_end_at_once(two: tuple[Any, Gate, list[str]]) -> None:
    handle, gate, _ = two
    gate.close()
    before = trade.wait_for("two replicas", both_running, 120)

    async def ask() -> None:
        begun = [await begin(handle) for _ in range(12)]
        victim = begun[0][0]
        gate.fall_ill(victim)
        for pid, stream in begun:
            if pid == victim:
                with pytest.raises(Unavailable, match="in one step for over 3 s; try again"):
                    await asyncio.wait_for(rest(stream), 60)
        gate.open()
        assert {await rest(stream) for pid, stream in begun if pid != victim} == {"stop"}

    asyncio.run(ask())
    after = trade.wait_for("another in its place", lambda: (now := both_running()) and now != before and now, 120)
    assert len(before.keys() & after.keys()) == 1


def test_a_replica_that_hangs_is_replaced_and_its_streams_end(two: tuple[Any, Gate, list[str]]) -> None:
    handle, gate, _ = two
    gate.close()
    before = trade.wait_for("two replicas", both_running, 120)

    async def ask() -> None:
        begun = [await begin(handle) for _ in range(12)]
        assert {pid for pid, _ in begun} == set(before.values())
        victim = begun[0][0]
        os.kill(victim, signal.SIGSTOP)
        gate.open()
        assert {await rest(stream) for pid, stream in begun if pid != victim} == {"stop"}
        for pid, stream in begun:
            if pid == victim:
                with pytest.raises(Unavailable, match="ended before the answer was complete"):
                    await asyncio.wait_for(rest(stream), 120)

    asyncio.run(ask())
    after = trade.wait_for("another in its place", lambda: (now := both_running()) and now != before and now, 120)
    assert len(before.keys() & after.keys()) == 1


def test_waiting_tokens_bring_a_replica_and_a_long_answer_outlives_the_one_that_goes(
    places: tuple[Path, list[str]],
) -> None:
    from tests.gate import Gate

    directory, _ = places
    gate = Gate(directory / "scaled")
    config = configure(
        directory,
        "serving.generator.min_replicas=1",
        "serving.generator.target_waiting_tokens=100",
        "serving.generator.upscale_delay_s=0",
        "serving.generator.downscale_delay_s=0",
        "serving.generator.drain_s=60",
        "serving.generator.adapter_replicas={}",
    )
    gate.waits(150)

    async def ask(handle: Any) -> None:
        trade.wait_for("a second replica", lambda: len(replicas()) == 2, 120)
        begun: dict[int, AsyncIterator[Delta]] = {}
        while len(begun) < 2:
            pid, stream = await begin(handle)
            begun[pid] = stream
        gate.waits(0)
        leaving = await asyncio.to_thread(trade.wait_for, "one to go", lambda: replicas("STOPPING"), 120)
        assert set(leaving.values()) < set(begun)
        gate.open()
        assert [await rest(stream) for stream in begun.values()] == ["stop", "stop"]
        await asyncio.to_thread(trade.wait_for, "it to be gone", lambda: not replicas("STOPPING"))
        assert len(replicas()) == 1

    with deployed(config, gate) as handle:
        asyncio.run(ask(handle))


def test_an_answer_outlives_a_deployment_over_its_replica(places: tuple[Path, list[str]]) -> None:
    from tests.gate import Gate

    directory, _ = places
    old, new = Gate(directory / "old"), Gate(directory / "new")
    new.open()
    config = configure(
        directory,
        "serving.generator.min_replicas=1",
        "serving.generator.max_replicas=1",
        "serving.generator.drain_s=60",
        "serving.generator.adapter_replicas={}",
    )

    async def ask(handle: Any) -> None:
        before, stream = await begin(handle)
        deploying = asyncio.create_task(asyncio.to_thread(deploy, config, new))
        await asyncio.to_thread(trade.wait_for, "it to go", lambda: before in replicas("STOPPING").values(), 120)
        old.open()
        assert await rest(stream) == "stop"
        after, other = await begin(await deploying)
        assert after != before and await rest(other) == "stop"

    with deployed(config, old) as handle:
        asyncio.run(ask(handle))


def test_serve_takes_the_policy_by_its_path_and_applies_its_delays(make_config: Callable[..., Config]) -> None:
    from ray.serve._private.autoscaling_state import _resolve_policy_callable
    from ray.serve.autoscaling_policy import _apply_autoscaling_config
    from ray.serve.config import AutoscalingConfig, AutoscalingContext

    from serving.app import generator_options

    def desired(replicas: int, waiting: dict[str, float], total: int, *overrides: str) -> int:
        settings = ["target_waiting_tokens=10", "max_replicas=9", "upscale_delay_s=0", *overrides]
        config = make_config(*(f"serving.generator.{each}" for each in settings))
        chosen = AutoscalingConfig(**generator_options(config.serving.generator)["autoscaling_config"])
        unused = ["deployment_id", "deployment_name", "app_name", "raw_metrics", "current_time"]
        unused += ["last_scale_up_time", "last_scale_down_time"]
        context = AutoscalingContext(
            current_num_replicas=replicas,
            target_num_replicas=replicas,
            running_replicas=list(waiting),
            total_num_requests=total,
            total_queued_requests=0,
            aggregated_metrics={"waiting_tokens": waiting},
            capacity_adjusted_min_replicas=0,
            capacity_adjusted_max_replicas=9,
            policy_state={},
            config=chosen,
            **dict.fromkeys(unused),
        )
        return int(_apply_autoscaling_config(_resolve_policy_callable(chosen.policy))(context)[0])

    assert desired(1, {"one": 45.0}, 4) == 5
    assert desired(1, {"one": 45.0}, 4, "upscale_delay_s=60") == 1
    assert desired(0, {}, 1, "min_replicas=0") == 1, "a request wakes a stage that sleeps"
    assert "policy" not in generator_options(make_config().serving.generator)["autoscaling_config"]
