"""The generator replica without Ray: ready when made, adapters fetched once and checked, streams let end before it does."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster.adapter_files import WEIGHTS_FILE
from cluster.config import Config, to_json
from cluster.errors import ConfigError, DeadlineExceeded, MetierError, Mismatch, ModelNotFound, NotFound, Unavailable
from cluster.registry import AdapterVersion
from serving.engine.base import Delta, GenerateRequest, Sampling
from serving.generator import GeneratorReplica, make_engine
from serving.names import Names
from tests import trade

PROMPT = tuple((31 * n) % 250 + 3 for n in range(40))
LONG = 1200


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A storage with adapters: ``first`` and ``second`` of this base, ``other`` of one in another precision."""
    directory = tmp_path_factory.mktemp("trade")
    settings = ("threads=1", "drain_s=30", "kernels='off'")
    config = trade.configure(directory, *(f"serving.generator.{setting}" for setting in settings))
    for seed, name in enumerate(("first", "second"), 1):
        trade.publish(config, trade.write_adapter(config, directory / name, seed=seed), name)
    other = config.model_copy(update={"base": config.base.model_copy(update={"dtype": "bfloat16"})})
    trade.publish(other, trade.write_adapter(config, directory / "other", seed=3), "other")
    return config


@pytest.fixture
def start(config: Config, tmp_path: Path) -> Iterator[Callable[..., GeneratorReplica]]:
    """``start(engine="native", drain_s=1)``: a replica with settings of its own and an empty disk."""
    started: list[GeneratorReplica] = []

    def make(engine: str = "echo", **settings: Any) -> GeneratorReplica:
        replica = GeneratorReplica(to_json(changed(config, tmp_path, engine=engine, **settings)))
        started.append(replica)
        return replica

    yield make
    for replica in started:
        replica.engine.stop()


def changed(config: Config, directory: Path, **settings: Any) -> Config:
    models = directory / "models"
    models.mkdir(exist_ok=True)
    base = Path(config.models_cache)
    for model in base.iterdir():
        if model.name != "adapters" and not (models / model.name).exists():
            (models / model.name).symlink_to(model)
    generator = config.serving.generator.model_copy(update=settings)
    serving = config.serving.model_copy(update={"generator": generator})
    return config.model_copy(update={"serving": serving, "models_cache": str(models)})


def version(replica: GeneratorReplica, name: str) -> AdapterVersion:
    return replica.registry.adapter(name)


def request(adapter: str | None = None, n: int = 8, **fields: Any) -> GenerateRequest:
    return GenerateRequest("r", PROMPT, Sampling(n, ignore_eos=True), adapter, **fields)


async def complete(replica: GeneratorReplica, asked: GenerateRequest) -> list[int]:
    return [token async for delta in replica.generate(asked) for token in delta.token_ids]


def answer(replica: GeneratorReplica, asked: GenerateRequest) -> list[int]:
    return asyncio.run(complete(replica, asked))


@contextmanager
def slow_fetch(replica: GeneratorReplica) -> Iterator[tuple[threading.Event, threading.Event, list[str]]]:
    """Fetching from the registry waits: (it has begun, let it go on, what was fetched)."""
    began, go_on, copies = threading.Event(), threading.Event(), list[str]()
    plain = replica.registry.copy_adapter

    def copy(digest: str, out: Path) -> None:
        copies.append(digest)
        began.set()
        assert go_on.wait(30)
        plain(digest, out)

    replica.registry.copy_adapter = copy  # type: ignore[method-assign]
    try:
        yield began, go_on, copies
    finally:
        go_on.set()


# -- ready


def test_a_replica_answers_for_the_base_and_for_adapters(start: Callable[..., GeneratorReplica]) -> None:
    replica = start()
    assert answer(replica, request()) == list(PROMPT[-8:])
    assert answer(replica, request(version(replica, "first").digest)) == list(PROMPT[-8:])
    replica.check_health()


def test_a_replica_can_be_made_on_a_running_event_loop(start: Callable[..., GeneratorReplica]) -> None:
    async def make() -> list[int]:
        return await complete(start(), request())

    assert asyncio.run(make()) == list(PROMPT[-8:])


def test_what_is_configured_is_loaded_before_it_is_ready(start: Callable[..., GeneratorReplica]) -> None:
    replica = start("native", adapters_resident=2, pinned_adapters=("first@1",), warmup_adapters=("second",))
    first, second = (version(replica, name).digest for name in ("first", "second"))
    stats = replica.stats()
    assert set(stats.resident) == {first, second}
    assert stats.adapter_loads == 2
    assert stats.answer_tokens >= 4, "no answer was made yet"
    assert answer(replica, request(first)) != answer(replica, request(second))
    assert replica.stats().adapter_loads == 2


def test_a_replica_keeps_ready_what_a_router_asks_for(start: Callable[..., GeneratorReplica]) -> None:
    replica = start("native", adapters_resident=2)
    first, other = (version(replica, name).digest for name in ("first", "other"))
    asyncio.run(replica.keep([other, "e" * 64, first]))
    assert replica.stats().resident == (first,)


@pytest.mark.parametrize("setting", ["pinned_adapters", "warmup_adapters"])
def test_a_replica_does_not_start_without_what_is_configured(
    setting: str, start: Callable[..., GeneratorReplica]
) -> None:
    with pytest.raises(ModelNotFound, match="there is no adapter 'third'"):
        start(**{setting: ("third",)})
    with pytest.raises(Mismatch, match=r"base\.dtype is bfloat16 in the adapter, float32 here"):
        start(**{setting: ("other",)})


def test_an_engine_whose_extra_is_missing_is_said(config: Config, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"pip install metier\[vllm\]") as missing:
        make_engine(changed(config, tmp_path, engine="vllm"))
    assert missing.value.param == "serving.generator.engine"


# -- adapters


def test_many_who_ask_for_one_adapter_fetch_it_once_and_others_do_not_wait(
    start: Callable[..., GeneratorReplica],
) -> None:
    replica = start()
    first, second = (version(replica, name).digest for name in ("first", "second"))
    assert answer(replica, request(second)) == list(PROMPT[-8:])

    async def run(copies: list[str], began: threading.Event, go_on: threading.Event) -> None:
        crowd = [asyncio.create_task(complete(replica, request(first))) for _ in range(200)]
        assert await asyncio.to_thread(began.wait, 30)
        assert await complete(replica, request(second)) == list(PROMPT[-8:])
        assert await complete(replica, request()) == list(PROMPT[-8:])
        assert not any(task.done() for task in crowd)
        go_on.set()
        assert await asyncio.gather(*crowd) == [list(PROMPT[-8:])] * 200
        assert copies == [first]

    with slow_fetch(replica) as (began, go_on, copies):
        asyncio.run(run(copies, began, go_on))


def test_who_leaves_while_an_adapter_is_fetched_leaves_the_others_alone(start: Callable[..., GeneratorReplica]) -> None:
    replica = start()
    first = version(replica, "first").digest

    async def run(began: threading.Event, go_on: threading.Event) -> None:
        leaver, stayer = (asyncio.create_task(complete(replica, request(first))) for _ in range(2))
        assert await asyncio.to_thread(began.wait, 30)
        leaver.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaver
        go_on.set()
        assert await stayer == list(PROMPT[-8:])

    with slow_fetch(replica) as (began, go_on, _):
        asyncio.run(run(began, go_on))
    assert replica.disk._remove(replica.disk.directory / first) is True, "somebody still holds it"


def test_fetching_counts_for_the_deadline(start: Callable[..., GeneratorReplica]) -> None:
    replica = start()
    first = version(replica, "first").digest
    with slow_fetch(replica), pytest.raises(DeadlineExceeded, match=f"adapter {first[:12]} was not here after 0.2 s"):
        answer(replica, request(first, deadline_s=0.2))
    assert answer(replica, request(first, deadline_s=30.0)) == list(PROMPT[-8:])


@pytest.mark.parametrize(
    ("adapter", "kind", "sentence"),
    [
        ("e" * 64, NotFound, "adapter eeeeeeeeeeee is not in .*; publish it again"),
        ("other", Mismatch, r"base\.dtype is bfloat16 in the adapter, float32 here"),
        ("../../first", MetierError, "is not a digest"),
    ],
)
def test_an_adapter_that_cannot_be_served_is_a_sentence_each_time(
    adapter: str, kind: type[MetierError], sentence: str, start: Callable[..., GeneratorReplica]
) -> None:
    replica = start()
    digest = version(replica, adapter).digest if adapter == "other" else adapter
    for _ in range(2):
        with pytest.raises(kind, match=sentence):
            answer(replica, request(digest))
    assert answer(replica, request()) == list(PROMPT[-8:])


def test_a_mismatch_is_also_seen_on_files_that_are_already_here(start: Callable[..., GeneratorReplica]) -> None:
    replica = start()
    digest = version(replica, "other").digest
    replica.disk.acquire(digest)
    with pytest.raises(Mismatch, match=r"base\.dtype"):
        answer(replica, request(digest))


def test_weights_that_cannot_be_served_hurt_nobody_else(
    config: Config, tmp_path: Path, start: Callable[..., GeneratorReplica]
) -> None:
    wide = trade.publish(config, trade.write_adapter(config, tmp_path / "wide", rank=16), "wide", rank=16)
    spoilt = trade.write_adapter(config, tmp_path / "spoilt", seed=5)
    tensors = load_file(spoilt / WEIGHTS_FILE)
    tensors[min(tensors)][0, 0] = torch.inf
    save_file(tensors, spoilt / WEIGHTS_FILE)
    infinite = trade.publish(config, spoilt, "spoilt")
    replica = start("native", max_rank=8)
    first = version(replica, "first").digest
    fine = answer(replica, request(first))
    for _ in range(2):
        with pytest.raises(
            Mismatch, match=rf"adapter {wide.digest[:12]}: r is 16 .*up to rank 8 are served"
        ) as refused:
            answer(replica, request(wide.digest))
        assert refused.value.param == "r"
        with pytest.raises(Mismatch, match=rf"adapter {infinite.digest[:12]}: .*holds values that float32 cannot"):
            answer(replica, request(infinite.digest))
    assert answer(replica, request(first)) == fine
    assert replica.stats().resident == (first,)


def test_files_are_held_while_an_answer_runs_and_not_longer(start: Callable[..., GeneratorReplica]) -> None:
    replica = start()
    first = version(replica, "first").digest
    directory = replica.disk.directory / first

    async def run() -> None:
        async with aclosing(replica.generate(request(first))) as stream:
            await anext(stream)
            assert replica.disk._remove(directory) is False
        assert replica.disk._remove(directory) is True

    asyncio.run(run())
    assert answer(replica, request(first)) == list(PROMPT[-8:])


def test_an_adapter_deleted_in_use_is_served_to_the_end(
    config: Config, tmp_path: Path, start: Callable[..., GeneratorReplica]
) -> None:
    made = trade.publish(config, trade.write_adapter(config, tmp_path / "brief", seed=9), "brief")
    replica = start("native")
    names = Names(config, replica.registry, replica.base)
    model = f"{config.base.served_name}:brief"
    assert names.resolve(model).adapter == made.digest
    whole = answer(replica, request(made.digest, n=200))

    async def run() -> list[int]:
        async with aclosing(replica.generate(request(made.digest, n=200))) as stream:
            got = list((await anext(stream)).token_ids)
            replica.registry.storage.delete("adapters/brief")
            replica.registry.storage.delete(f"objects/adapters/{made.digest}")
            with pytest.raises(ModelNotFound, match="brief"):
                names.resolve(model)
            return got + [token async for delta in stream for token in delta.token_ids]

    assert asyncio.run(run()) == whole
    assert replica.disk._remove(replica.disk.directory / made.digest) is True
    with pytest.raises(NotFound, match="publish it again"):
        answer(replica, request(made.digest))


# -- the end


def test_what_runs_may_end_and_nobody_joins(start: Callable[..., GeneratorReplica]) -> None:
    replica = start("native")

    async def run() -> list[int]:
        whole = await complete(replica, request(n=300))
        async with aclosing(replica.generate(request(n=300))) as stream:
            got = list((await anext(stream)).token_ids)
            end = asyncio.create_task(replica.shutdown())
            while not replica._ending:
                await asyncio.sleep(0)
            with pytest.raises(Unavailable, match="ending"):
                await complete(replica, request())
            got += [token async for delta in stream for token in delta.token_ids]
        await end
        assert got == whole
        return got

    assert len(asyncio.run(run())) == 300
    with pytest.raises(Unavailable):
        replica.check_health()
    asyncio.run(replica.shutdown())


def test_what_runs_too_long_is_ended_with_an_error(start: Callable[..., GeneratorReplica]) -> None:
    replica = start("native", drain_s=0.1)

    async def run() -> None:
        async with aclosing(replica.generate(request(n=LONG))) as stream:
            await anext(stream)
            # Nobody reads until it is over: the stream cannot have ended well.
            await replica.shutdown()
            with pytest.raises(Unavailable):
                await read_on(stream)

    async def read_on(stream: AsyncIterator[Delta]) -> None:
        finished = [delta async for delta in stream if delta.finish_reason]
        assert not finished

    asyncio.run(run())


def test_a_replica_that_nobody_has_ends_its_threads(config: Config, tmp_path: Path) -> None:
    before = set(threading.enumerate())
    replica = GeneratorReplica(to_json(changed(config, tmp_path, engine="native")))
    answer(replica, request(version(replica, "first").digest))
    began = set(threading.enumerate()) - before
    assert any(thread.name == "metier-engine" for thread in began)
    del replica
    for thread in began:
        thread.join(30)
    assert not any(thread.is_alive() for thread in began)
