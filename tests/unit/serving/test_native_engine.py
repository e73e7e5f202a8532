"""The native engine says what transformers and PEFT say, whatever company a request keeps, and lets go of what it held."""

import asyncio
import copy
import json
import shutil
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.config import Config
from cluster.errors import ContextTooLong, NotFound, Overloaded, Unavailable
from serving.engine.base import GenerateRequest, Sampling
from serving.engine.native import NativeEngine
from serving.engine.native.sampling import choose, generator_for

A, B, C = "a" * 64, "b" * 64, "c" * 64
PROMPTS = [tuple((7 * n + 31 * k) % 250 + 3 for k in range(3 + 9 * n)) for n in range(6)]
LONG = 1500
Make = Callable[..., Config]
Start = Callable[..., NativeEngine]
Reference = Callable[..., list[int]]


@pytest.fixture
def start(make_config: Make, tiny_llama: Path, adapters: dict[str, Path]) -> Iterator[Start]:
    """``start("batch_size=1", …)``: a running engine that knows the adapters; it ends with the test.

    With ``endless=True`` no token ends an answer before ``max_tokens``.
    """
    with engines(make_config, tiny_llama, adapters) as starter:
        yield starter


@contextmanager
def engines(make_config: Make, directory: Path, adapters: dict[str, Path]) -> Iterator[Start]:
    started: list[NativeEngine] = []

    def start(*settings: str, model: Path = directory, endless: bool = False) -> NativeEngine:
        generator = [f"serving.generator.{setting}" for setting in ("threads=1", *settings)]
        engine = NativeEngine(make_config(*generator), model)
        engine.start()
        started.append(engine)
        engine.eos = frozenset() if endless else engine.eos
        for digest, files in adapters.items():
            engine.add_adapter(digest, files)
        return engine

    yield start
    for engine in started:
        engine.stop()


@pytest.fixture(scope="module")
def reference(base_model: Any, adapters: dict[str, Path]) -> Reference:
    """``reference(prompt, adapter, n)``: greedy ids of transformers' ``generate``, the end of turn taken off."""
    from peft import PeftModel

    models = {None: base_model} | {
        digest: PeftModel.from_pretrained(copy.deepcopy(base_model), directory).eval()
        for digest, directory in adapters.items()
    }

    def generate(prompt: tuple[int, ...], adapter: str | None = None, n: int = 12) -> list[int]:
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            out = models[adapter].generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False, pad_token_id=2
            )
        return [token for token in out[0, len(prompt) :].tolist() if token != base_model.generation_config.eos_token_id]

    return generate


def request(
    prompt: tuple[int, ...] = PROMPTS[0], adapter: str | None = None, n: int = 12, **sampling: Any
) -> GenerateRequest:
    return GenerateRequest("r", prompt, Sampling(n, **sampling), adapter)


async def complete(engine: NativeEngine, asked: GenerateRequest) -> tuple[list[int], str | None]:
    """All ids of an answer, and why it ended."""
    ids: list[int] = []
    reason = None
    async for delta in engine.generate(asked):
        ids.extend(delta.token_ids)
        reason = delta.finish_reason
    return ids, reason


def answers(engine: NativeEngine, *asked: GenerateRequest) -> list[list[int]]:
    """The ids of all answers, asked for at once."""

    async def gather() -> list[list[int]]:
        return [ids for ids, _ in await asyncio.gather(*(complete(engine, each) for each in asked))]

    return asyncio.run(gather())


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.001)


# -- the same tokens as the libraries


@pytest.mark.parametrize("prompt", PROMPTS, ids=len)
def test_a_single_request_is_exact(start: Start, reference: Reference, prompt: tuple[int, ...]) -> None:
    assert answers(start(), request(prompt)) == [reference(prompt)]


def test_concurrent_requests_of_different_lengths_are_exact(start: Start, reference: Reference) -> None:
    got = answers(start(), *(request(prompt, n=10 + n) for n, prompt in enumerate(PROMPTS)))
    assert got == [reference(prompt, n=10 + n) for n, prompt in enumerate(PROMPTS)]


def test_base_and_adapters_in_one_batch_speak_as_each_alone(start: Start, reference: Reference) -> None:
    asked = [(prompt, adapter) for prompt in PROMPTS[:3] for adapter in (None, A, B)]
    expected = [reference(*each) for each in asked]
    assert len({tuple(ids) for ids in expected[:3]}) == 3, "the adapters change nothing; this test would prove nothing"
    assert answers(start("batch_size=9"), *(request(*each) for each in asked)) == expected


def test_more_requests_than_slots_all_finish(start: Start, reference: Reference) -> None:
    prompts = PROMPTS + PROMPTS[::-1]
    assert answers(start("batch_size=2"), *map(request, prompts)) == [reference(prompt) for prompt in prompts]


def test_a_slot_remembers_nothing_of_who_had_it(start: Start, reference: Reference) -> None:
    engine = start("batch_size=1")
    for prompt in (PROMPTS[5], PROMPTS[0], PROMPTS[3]):
        assert answers(engine, request(prompt)) == [reference(prompt)]


# -- adapters


def test_two_adapters_take_turns_where_one_has_room(start: Start, reference: Reference) -> None:
    engine = start("adapters_resident=1", "batch_size=4")
    asked = [(PROMPTS[n], adapter) for n, adapter in enumerate([A, B, None, A, C, B])]
    assert answers(engine, *(request(*each) for each in asked)) == [reference(*each) for each in asked]
    assert len(engine.adapters.resident) == 1


def test_an_evicted_adapter_comes_back_the_same(start: Start, reference: Reference) -> None:
    engine = start("adapters_resident=1")
    for adapter in (A, B, A, None, B, A):
        assert answers(engine, request(PROMPTS[2], adapter)) == [reference(PROMPTS[2], adapter)]


def test_a_waiting_adapter_is_not_passed_for_ever(start: Start) -> None:
    engine = start("adapters_resident=1", "batch_size=4", endless=True)

    async def run() -> None:
        done: list[str] = []

        async def ask(name: str, adapter: str | None, n: int) -> None:
            await complete(engine, request(adapter=adapter, n=n))
            done.append(name)

        async with aclosing(engine.generate(request(adapter=A, n=200))) as first, asyncio.TaskGroup() as group:
            await anext(first)
            group.create_task(ask("other", B, 1))
            await until(lambda: len(engine.waiting) == 1)
            group.create_task(ask("same as the first", A, 1))
            group.create_task(ask("base", None, 1))
            async for _ in first:
                pass
        assert done == ["base", "other", "same as the first"]

    asyncio.run(run())


def test_an_unknown_adapter_is_not_found_and_takes_no_slot(start: Start, reference: Reference) -> None:
    engine = start("batch_size=1")
    for _ in range(2):
        with pytest.raises(NotFound, match="adapter ffffffffffff was not added"):
            answers(engine, request(adapter="f" * 64))
    assert answers(engine, request()) == [reference(PROMPTS[0])]


# -- ends


def test_the_answer_ends_at_max_tokens(start: Start) -> None:
    ids, reason = asyncio.run(complete(start(), request(n=5)))
    assert (len(ids), reason) == (5, "length")


def with_end(tiny_llama: Path, out: Path, end: int) -> Path:
    """The tiny llama, told that generation ends at `end`."""
    shutil.copytree(tiny_llama, out)
    settings = json.loads((out / "generation_config.json").read_text())
    (out / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": [end]}))
    return out


def test_the_answer_stops_before_the_end_token(
    start: Start, reference: Reference, tiny_llama: Path, tmp_path: Path
) -> None:
    whole = reference(PROMPTS[1])
    end = next(token for place, token in enumerate(whole) if place > 2 and token not in whole[:place])
    engine = start(model=with_end(tiny_llama, tmp_path / "model", end))
    assert asyncio.run(complete(engine, request(PROMPTS[1]))) == (whole[: whole.index(end)], "stop")


def test_the_end_of_turn_that_training_teaches_always_counts(start: Start, tiny_llama: Path, tmp_path: Path) -> None:
    engine = start(model=with_end(tiny_llama, tmp_path / "model", 0))
    assert engine.eos == {0, 2}


def test_a_model_without_generation_settings_is_served(start: Start, tiny_llama: Path, tmp_path: Path) -> None:
    model = with_end(tiny_llama, tmp_path / "model", 0)
    (model / "generation_config.json").unlink()
    assert start(model=model).eos == {2}


def test_prompt_and_answer_may_fill_the_context(start: Start) -> None:
    ids, reason = asyncio.run(complete(start(), request((5,) * 2044, n=4)))
    assert (len(ids), reason) == (4, "length")


def test_a_prompt_that_is_too_long_is_refused(start: Start) -> None:
    with pytest.raises(ContextTooLong, match="prompt has 2045 tokens"):
        answers(start(), request((5,) * 2045, n=4))


def test_who_does_not_read_along_gets_one_delta(start: Start, reference: Reference) -> None:
    engine = start()

    async def run() -> list[Any]:
        whole = request(PROMPTS[2], B)
        return [delta async for delta in engine.generate(replace(whole, stream=False))]

    (delta,) = asyncio.run(run())
    assert (list(delta.token_ids), delta.finish_reason) == (reference(PROMPTS[2], B), "length")


# -- sampling


def test_a_seed_gives_the_same_answer_in_any_company(start: Start) -> None:
    engine = start()
    seeded = request(PROMPTS[3], temperature=1.0, seed=11)
    alone = answers(engine, seeded)[0]
    company = [
        request(prompt, adapter, temperature=1.0) for prompt, adapter in zip(PROMPTS, [A, None] * 3, strict=True)
    ]
    assert answers(engine, *company, seeded)[-1] == alone
    assert answers(engine, seeded, *company[:2])[0] == alone


def test_another_seed_gives_another_answer(start: Start) -> None:
    asked = [request(PROMPTS[3], temperature=1.5, seed=seed) for seed in (1, 2)]
    first, second = answers(start(), *asked)
    assert first != second


def test_a_small_nucleus_is_greedy() -> None:
    logits = torch.tensor([0.1, 3.0, 2.9, -1.0])
    sampling = Sampling(1, temperature=1.0, top_p=0.3, seed=1)
    assert {choose(logits, sampling, generator_for(sampling)) for _ in range(20)} == {1}


def test_a_nucleus_holds_the_likeliest_up_to_top_p() -> None:
    logits = torch.log(torch.tensor([0.15, 0.5, 0.3, 0.05]))
    sampling = Sampling(1, temperature=1.0, top_p=0.7, seed=1)
    chance = generator_for(sampling)
    assert {choose(logits, sampling, chance) for _ in range(200)} == {1, 2}


def test_temperature_flattens() -> None:
    logits = torch.tensor([0.0, 4.0, 0.0, 0.0])

    def share(temperature: float) -> float:
        sampling = Sampling(1, temperature=temperature, seed=3)
        chance = generator_for(sampling)
        return sum(choose(logits, sampling, chance) == 1 for _ in range(300)) / 300

    assert share(0.2) == 1.0
    assert share(1.0) > share(4.0) > 0.25


# -- letting go


def test_a_reader_that_leaves_frees_its_slot(start: Start, reference: Reference) -> None:
    engine = start("batch_size=1", "adapters_resident=1", endless=True)

    async def run() -> list[int]:
        async with aclosing(engine.generate(request(adapter=A, n=LONG))) as stream:
            await anext(stream)
            (left,) = engine.running
        ids, _ = await complete(engine, request(PROMPTS[1], B))
        assert left.made < LONG
        return ids

    assert asyncio.run(run()) == reference(PROMPTS[1], B)
    assert (engine.free, engine.running) == ([0], [])


def test_a_cancelled_task_that_waits_leaves_the_queue(start: Start) -> None:
    engine = start("batch_size=1", endless=True)

    async def run() -> None:
        async with aclosing(engine.generate(request(n=LONG))) as stream:
            await anext(stream)
            waiting = asyncio.create_task(complete(engine, request()))
            await until(lambda: len(engine.waiting) == 1)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            await until(lambda: not engine.waiting)

    asyncio.run(run())


def test_a_caller_whose_event_loop_is_gone_hurts_nobody(start: Start, reference: Reference) -> None:
    engine = start("batch_size=2", endless=True)
    loop = asyncio.new_event_loop()
    stream: AsyncIterator[Any] = engine.generate(request(n=LONG))
    loop.run_until_complete(anext(stream))
    loop.close()
    assert answers(engine, request(PROMPTS[2])) == [reference(PROMPTS[2])]
    engine.check_health()


def test_a_full_queue_is_refused(start: Start) -> None:
    engine = start("batch_size=1", "max_ongoing_requests=1", endless=True)

    async def run() -> None:
        async with aclosing(engine.generate(request(n=LONG))) as stream:
            await anext(stream)
            waiting = asyncio.create_task(complete(engine, request()))
            await until(lambda: len(engine.waiting) == 1)
            with pytest.raises(Overloaded, match="has 1 requests waiting"):
                await complete(engine, request())
            waiting.cancel()

    asyncio.run(run())


def test_stopping_ends_all_who_wait(start: Start) -> None:
    engine = start("batch_size=1", endless=True)

    async def run() -> list[Any]:
        callers = [asyncio.create_task(complete(engine, request(n=LONG))) for _ in range(3)]
        await until(lambda: len(engine.waiting) == 2)
        await asyncio.to_thread(engine.stop)
        return await asyncio.gather(*callers, return_exceptions=True)

    outcomes = asyncio.run(run())
    assert [type(outcome) for outcome in outcomes] == [Unavailable] * 3
    with pytest.raises(Unavailable, match="not running"):
        engine.check_health()


def test_nobody_joins_an_engine_that_is_stopping(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = start()
    inside, go_on = threading.Event(), threading.Event()

    def step() -> None:
        inside.set()
        go_on.wait(30)

    monkeypatch.setattr(engine, "_step", step)

    async def run() -> None:
        first = asyncio.create_task(complete(engine, request()))
        await asyncio.to_thread(inside.wait, 30)
        stop = asyncio.create_task(asyncio.to_thread(engine.stop))
        await until(lambda: engine.stopping)
        with pytest.raises(Unavailable, match="stopping"):
            await complete(engine, request())
        go_on.set()
        await stop
        with pytest.raises(Unavailable, match="stopped before"):
            await first

    asyncio.run(run())


def test_a_failing_step_ends_all_and_shows_in_the_health(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = start()

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(engine, "_decode", fail)
    with pytest.raises(Unavailable, match="stopped before the answer was complete"):
        answers(engine, request())
    assert engine.thread is not None
    engine.thread.join(30)
    for act in (engine.check_health, lambda: answers(engine, request())):
        with pytest.raises(Unavailable, match="out of memory"):
            act()
