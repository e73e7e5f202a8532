"""The native engine says what transformers and PEFT say, whatever company a request keeps, and lets go of it all."""

import asyncio
import copy
import gc
import json
import math
import random
import re
import shutil
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from cluster.config import Config
from cluster.errors import ContextTooLong, DeadlineExceeded, NotFound, Overloaded, ResourcesShort, Unavailable
from serving.engine.base import Delta, GenerateRequest, Grammar, Sampling
from serving.engine.native.cache import page_bytes
from serving.engine.native.delivery import BEHIND, Inbox, merge
from serving.engine.native.engine import FAILURES, NativeEngine
from serving.engine.native.sampling import Chooser

A, B, C = "a" * 64, "b" * 64, "c" * 64
PROMPTS = [tuple((7 * n + 31 * k) % 250 + 3 for k in range(3 + 9 * n)) for n in range(6)]
LONG_PROMPTS = [
    tuple((5 * n + 13 * k + k // 50) % 250 + 3 for k in range(length)) for n, length in enumerate((130, 333, 600))
]
LONG = 1500
SMALL = ("base.context_tokens=128", "training.max_tokens=64", "prompt.passage_tokens=32", "serving.max_tokens=64")
"""A context so short that a cache of one is soon full."""
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

    def start(
        *settings: str, model: Path = directory, endless: bool = False, others: tuple[str, ...] = ()
    ) -> NativeEngine:
        generator = [f"serving.generator.{setting}" for setting in ("threads=1", *settings)]
        engine = NativeEngine(make_config(*others, *generator), model)
        engine.start()
        started.append(engine)
        engine.eos = frozenset() if endless else engine.eos
        for digest, files in adapters.items():
            engine.add_adapter(digest, files)
        return engine

    yield start
    for engine in started:
        engine.stop()


@pytest.fixture
def cramped(start: Start, tiny_llama: Path) -> Start:
    """As `start`, with a cache of one context of 128 tokens."""
    size = 32 * page_bytes(AutoConfig.from_pretrained(tiny_llama), 4, torch.float32)

    def cramped(*settings: str, **rest: Any) -> NativeEngine:
        return start("page_tokens=4", f"cache_bytes={size}", *settings, others=SMALL, **rest)

    return cramped


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


def deltas(engine: NativeEngine, asked: GenerateRequest) -> list[Delta]:
    async def gather() -> list[Delta]:
        return [delta async for delta in engine.generate(asked)]

    return asyncio.run(gather())


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.001)


async def running(engine: NativeEngine, count: int) -> None:
    await until(lambda: engine.stats().running == count)


def is_idle(engine: NativeEngine) -> bool:
    """Whether nobody holds anything any more."""
    held = (engine.answers, engine.arrived, engine.left, engine.preparing, engine.scheduler.running)
    pages = engine.scheduler.pages
    return not any(held) and not engine.scheduler.waiting and pages.free == pages.count


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


def test_more_requests_than_places_all_finish(start: Start, reference: Reference) -> None:
    prompts = PROMPTS + PROMPTS[::-1]
    assert answers(start("batch_size=2"), *map(request, prompts)) == [reference(prompt) for prompt in prompts]


@pytest.mark.parametrize("kernels", ["auto", "off"])
@pytest.mark.parametrize("chunk", [16, 64, 512])
def test_prompts_in_chunks_are_exact_beside_rows_that_decode(
    start: Start, reference: Reference, chunk: int, kernels: str
) -> None:
    asked = [(prompt, adapter) for prompt in (*LONG_PROMPTS, *PROMPTS[:2]) for adapter in (None, B)]
    engine = start(f"prefill_tokens={chunk}", "batch_size=16", f"kernels='{kernels}'")
    passes: list[list[int]] = []
    forward = engine.executor.forward

    def watched(parts: Any) -> Any:
        passes.append([len(part.tokens) for part in parts])
        return forward(parts)

    engine.executor.forward = watched  # type: ignore[method-assign]
    assert answers(engine, *(request(*each) for each in asked)) == [reference(*each) for each in asked]
    assert max(sum(count for count in counts if count > 1) for counts in passes) <= chunk
    assert any(1 in counts and max(counts) > 1 for counts in passes), "no prompt was computed beside a row that decodes"


# -- the prefix cache


def test_a_repeated_prompt_is_read_from_the_cache_and_exact(start: Start, reference: Reference) -> None:
    engine = start("page_tokens=16")
    for cached in (0, 320):
        made = deltas(engine, request(LONG_PROMPTS[1]))
        assert [token for delta in made for token in delta.token_ids] == reference(LONG_PROMPTS[1])
        assert [delta.cached_tokens for delta in made] == [cached, *[0] * (len(made) - 1)]
    assert (engine.stats().prompt_tokens, engine.stats().cached_tokens) == (666, 320)


def test_prompts_that_part_are_shared_up_to_there(start: Start, reference: Reference) -> None:
    engine = start("page_tokens=16")
    first, second = LONG_PROMPTS[1], LONG_PROMPTS[1][:200] + LONG_PROMPTS[2][:100]
    assert answers(engine, request(first)) == [reference(first)]
    made = deltas(engine, request(second))
    assert made[0].cached_tokens == 192
    assert [token for delta in made for token in delta.token_ids] == reference(second)


@pytest.mark.parametrize("kernels", ["auto", "off"])
def test_no_adapter_reads_what_another_computed(start: Start, reference: Reference, kernels: str) -> None:
    engine = start("page_tokens=4", f"kernels='{kernels}'")
    for adapter in (A, B, None, A, None, B):
        assert answers(engine, request(PROMPTS[5], adapter)) == [reference(PROMPTS[5], adapter)]
    assert engine.stats().cached_tokens == 3 * 44


def test_a_conversation_goes_on_from_its_answer(start: Start, reference: Reference) -> None:
    engine = start("page_tokens=4")
    (answer,) = answers(engine, request(PROMPTS[4]))
    more = (*PROMPTS[4], *answer, 7, 8, 9)
    made = deltas(engine, request(more))
    assert made[0].cached_tokens == (len(PROMPTS[4]) + len(answer) - 1) // 4 * 4
    assert [token for delta in made for token in delta.token_ids] == reference(more)


def test_questions_over_one_text_that_come_together_compute_it_once(start: Start, reference: Reference) -> None:
    engine = start("page_tokens=16", "prefill_tokens=2048")
    prompts = [LONG_PROMPTS[1] + PROMPTS[2 + n] for n in range(4)]
    assert answers(engine, *map(request, prompts)) == [reference(prompt) for prompt in prompts]
    assert engine.stats().cached_tokens == 3 * 320


def test_without_prefix_cache_nothing_is_kept(start: Start, reference: Reference) -> None:
    engine = start("prefix_cache=false")
    for _ in range(2):
        assert answers(engine, request(PROMPTS[5])) == [reference(PROMPTS[5])]
    assert engine.stats().cached_tokens == 0


def test_several_answers_share_their_prompt(start: Start, reference: Reference) -> None:
    engine = start("page_tokens=4")
    made = deltas(engine, replace(request(PROMPTS[5], B), sampling=Sampling(12, n=3)))
    for index in range(3):
        ids = [token for delta in made if delta.index == index for token in delta.token_ids]
        assert ids == reference(PROMPTS[5], B)
    assert engine.stats().cached_tokens == 2 * 44
    drawn = deltas(engine, replace(request(PROMPTS[5]), sampling=Sampling(12, n=3, temperature=1.5, seed=5)))
    texts = [tuple(token for delta in drawn if delta.index == index for token in delta.token_ids) for index in range(3)]
    assert len(set(texts)) == 3


# -- a full cache


@pytest.mark.parametrize("kernels", ["auto", "off"])
def test_a_cache_that_is_too_small_for_all_changes_no_answer(
    cramped: Start, reference: Reference, kernels: str
) -> None:
    engine = cramped("batch_size=8", f"kernels='{kernels}'")
    asked = [(prompt, adapter, 40) for prompt in PROMPTS for adapter in (None, A)]
    assert answers(engine, *(request(*each) for each in asked)) == [reference(*each) for each in asked]
    assert engine.stats().preemptions > 0
    assert is_idle(engine)


@pytest.mark.parametrize("prefixes", ["true", "false"])
def test_a_preempted_row_goes_on_with_its_own_chance(cramped: Start, start: Start, prefixes: str) -> None:
    asked = [request(prompt, adapter, 40, temperature=1.0, seed=9) for prompt in PROMPTS for adapter in (None, B)]
    roomy = answers(start("batch_size=1", others=SMALL), *asked)
    engine = cramped("batch_size=8", f"prefix_cache={prefixes}")
    assert answers(engine, *asked) == roomy
    assert engine.stats().preemptions > 0


@pytest.mark.parametrize("kernels", ["auto", "off"])
def test_a_crowd_that_comes_and_goes_at_random_changes_no_answer(
    cramped: Start, reference: Reference, kernels: str
) -> None:
    engine = cramped(
        "batch_size=8", "prefill_tokens=24", "adapters_resident=2", "adapters_host_bytes=40000", f"kernels='{kernels}'"
    )
    chance = random.Random(5)
    texts = [tuple(chance.randrange(3, 250) for _ in range(60)) for _ in range(3)]
    wrong: list[GenerateRequest] = []

    async def one(asked: GenerateRequest, leaves: int | None) -> None:
        async with aclosing(engine.generate(asked)) as stream:
            ids: list[int] = []
            async for delta in stream:
                ids.extend(delta.token_ids)
                if leaves is not None and len(ids) >= leaves:
                    return
        if ids != reference(asked.token_ids, asked.adapter, asked.sampling.max_tokens):
            wrong.append(asked)

    async def run() -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(80):
                prompt = (*chance.choice(texts)[: chance.randrange(1, 60)], chance.randrange(3, 250))
                asked = request(prompt, chance.choice([None, A, B, C]), chance.randrange(1, 40))
                asked = replace(asked, tenant=chance.choice("xyz"), stream=chance.random() < 0.7)
                group.create_task(one(asked, chance.choice([None, None, chance.randrange(20)])))
                for _ in range(chance.randrange(30)):
                    await asyncio.sleep(0)
        await until(lambda: is_idle(engine))

    asyncio.run(run())
    assert not wrong
    assert engine.stats().preemptions > 0


# -- adapters


def test_two_adapters_take_turns_where_one_has_room(start: Start, reference: Reference) -> None:
    engine = start("adapters_resident=1", "batch_size=4")
    asked = [(PROMPTS[n], adapter) for n, adapter in enumerate([A, B, None, A, C, B])]
    assert answers(engine, *(request(*each) for each in asked)) == [reference(*each) for each in asked]
    assert len(engine.stats().resident) == 1


def test_an_evicted_adapter_comes_back_the_same(start: Start, reference: Reference) -> None:
    engine = start("adapters_resident=1", "adapters_host_bytes=0")
    for adapter in (A, B, A, None, B, A):
        assert answers(engine, request(PROMPTS[2], adapter)) == [reference(PROMPTS[2], adapter)]


def test_an_unknown_adapter_is_not_found_and_takes_no_place(start: Start, reference: Reference) -> None:
    engine = start("batch_size=1")
    for _ in range(2):
        with pytest.raises(NotFound, match="adapter ffffffffffff was not added"):
            answers(engine, request(adapter="f" * 64))
    assert answers(engine, request()) == [reference(PROMPTS[0])]
    assert is_idle(engine)


def test_an_adapter_without_files_fails_all_who_want_it_and_nobody_else(
    start: Start, reference: Reference, adapters: dict[str, Path], tmp_path: Path
) -> None:
    engine = start("batch_size=4")
    engine.add_adapter("d" * 64, tmp_path / "d")

    async def run() -> list[Any]:
        asked = [request(adapter="d" * 64), request(PROMPTS[2], A), request(adapter="d" * 64)]
        return await asyncio.gather(*(complete(engine, each) for each in asked), return_exceptions=True)

    first, (ids, _), second = asyncio.run(run())
    assert (type(first), type(second)) == (NotFound, NotFound)
    assert ids == reference(PROMPTS[2], A)
    shutil.copytree(adapters[B], tmp_path / "d")
    assert answers(engine, request(PROMPTS[1], "d" * 64)) == [reference(PROMPTS[1], B)], "it was mended"


def test_a_preloaded_adapter_has_a_slot_before_it_is_asked_for(start: Start) -> None:
    engine = start("adapters_resident=2")
    engine.preload(B)
    assert (engine.stats().resident, engine.stats().adapter_loads) == ((B,), 1)
    engine.preload(A, pin=True)
    answers(engine, request(adapter=C), request(adapter=B), request(adapter=C))
    assert A in engine.stats().resident


def test_preloading_what_cannot_be_read_says_why(start: Start, tmp_path: Path) -> None:
    engine = start()
    engine.add_adapter("d" * 64, tmp_path / "d")
    for pin in (True, False):
        with pytest.raises(NotFound, match="adapter dddddddddddd"):
            engine.preload("d" * 64, pin)


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
    assert asyncio.run(complete(engine, request(PROMPTS[1], ignore_eos=True))) == (whole, "length")


def test_the_end_of_turn_that_training_teaches_always_counts(start: Start, tiny_llama: Path, tmp_path: Path) -> None:
    engine = start(model=with_end(tiny_llama, tmp_path / "model", 0))
    assert engine.eos == {0, 2}


def test_a_model_without_generation_settings_is_served(start: Start, tiny_llama: Path, tmp_path: Path) -> None:
    model = with_end(tiny_llama, tmp_path / "model", 0)
    (model / "generation_config.json").unlink()
    assert start(model=model).eos == {2}


def test_a_stop_string_ends_the_answer_with_the_token_that_completes_it(start: Start, tokenizer: Any) -> None:
    engine = start()
    letters = tuple((tokenizer.encode(letter, add_special_tokens=False)[-1], 50.0) for letter in "abcdefgh")
    asked = request(PROMPTS[1], n=30, logit_bias=letters, temperature=1.0, seed=3)
    (whole,) = answers(engine, asked)
    text = tokenizer.decode(whole)
    assert len(text) == len(whole) == 30
    stop = next(text[place : place + 2] for place in range(5, 28) if text.find(text[place : place + 2]) == place)
    ids, reason = asyncio.run(complete(engine, replace(asked, sampling=replace(asked.sampling, stop=("xyz", stop)))))
    assert (ids, reason) == (whole[: text.find(stop) + 2], "stop")


def test_prompt_and_answer_may_fill_the_context(start: Start) -> None:
    ids, reason = asyncio.run(complete(start(), request((5,) * 2044, n=4)))
    assert (len(ids), reason) == (4, "length")


def test_a_prompt_that_is_too_long_is_refused(start: Start) -> None:
    with pytest.raises(ContextTooLong, match="prompt has 2045 tokens"):
        answers(start(), request((5,) * 2045, n=4))


def test_who_does_not_read_along_gets_one_delta(start: Start, reference: Reference) -> None:
    (delta,) = deltas(start(), replace(request(PROMPTS[2], B), stream=False))
    assert (list(delta.token_ids), delta.finish_reason) == (reference(PROMPTS[2], B), "length")


# -- choosing


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


def test_log_probabilities_are_the_models_own(start: Start, base_model: Any) -> None:
    made = deltas(start(), request(PROMPTS[2], logprobs=3))
    ids = [token for delta in made for token in delta.token_ids]
    with torch.inference_mode():
        logits = base_model(input_ids=torch.tensor([[*PROMPTS[2], *ids]])).logits[0].log_softmax(-1)
    given = [logprob for delta in made for logprob in delta.logprobs]
    assert [logprob.token for logprob in given] == ids
    for place, logprob in enumerate(given, len(PROMPTS[2]) - 1):
        assert math.isclose(logprob.logprob, logits[place, logprob.token], abs_tol=1e-4)
        assert [token for token, _ in logprob.top] == logits[place].topk(3).indices.tolist()


def test_a_grammar_binds_each_of_several_answers(start: Start, tokenizer: Any) -> None:
    engine = start()
    sampling = Sampling(20, temperature=1.0, seed=1, n=3, grammar=Grammar("regex", "(yes|no), [0-9]{3}"))
    made = deltas(engine, replace(request(PROMPTS[2]), sampling=sampling))
    for index in range(3):
        ids = [token for delta in made if delta.index == index for token in delta.token_ids]
        assert re.fullmatch(r"(yes|no), [0-9]{3}", tokenizer.decode(ids))


# -- the way back


def test_a_step_sends_one_message_to_a_loop(start: Start) -> None:
    engine = start("batch_size=8", endless=True)

    async def run() -> int:
        loop, messages = asyncio.get_running_loop(), 0
        call = loop.call_soon_threadsafe

        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal messages
            messages += 1
            return call(*args, **kwargs)

        loop.call_soon_threadsafe = counted  # type: ignore[method-assign]
        await asyncio.gather(*(complete(engine, request(n=100)) for _ in range(8)))
        return messages

    assert asyncio.run(run()) <= 110


def test_a_reader_that_stops_reading_holds_a_bounded_number_of_deltas_and_loses_none(start: Start) -> None:
    engine = start(endless=True)
    count = 3 * BEHIND
    (whole,) = answers(engine, replace(request(n=count), stream=False))

    async def run() -> None:
        async with aclosing(engine.generate(request(n=count))) as stream:
            ids = [*(await anext(stream)).token_ids]
            (answer,) = engine.answers.values()
            inbox, most = answer.call.inbox, 0
            while not is_idle(engine):
                most = max(most, len(inbox.items))
                await asyncio.sleep(0.001)
            assert most <= BEHIND
            async for delta in stream:
                ids.extend(delta.token_ids)
        assert ids == whole

    asyncio.run(run())


def test_what_piled_up_is_merged_answer_by_answer() -> None:
    error = Unavailable("gone")
    items = [
        Delta((1,), index=0, cached_tokens=4),
        Delta((2,), index=1),
        Delta((3,), index=0),
        Delta((), "stop", 1),
        error,
    ]
    assert merge(items) == [Delta((1, 3), index=0, cached_tokens=4), Delta((2,), "stop", 1), error]


def test_nothing_follows_an_exception() -> None:
    inbox = Inbox()
    for item in (Delta((1,)), Unavailable("gone"), Delta((2,)), Unavailable("again")):
        inbox.put(item)
    assert len(inbox.items) == 2


# -- letting go


def test_a_reader_that_leaves_frees_its_place(start: Start, reference: Reference) -> None:
    engine = start("batch_size=1", "adapters_resident=1", endless=True)

    async def run() -> list[int]:
        async with aclosing(engine.generate(request(adapter=A, n=LONG))) as stream:
            await anext(stream)
            (row,) = engine.answers
        ids, _ = await complete(engine, request(PROMPTS[1], B))
        assert row.made < LONG
        return ids

    assert asyncio.run(run()) == reference(PROMPTS[1], B)
    assert is_idle(engine)


def test_a_cancelled_task_that_waits_leaves_the_queue(start: Start) -> None:
    engine = start("batch_size=1", endless=True)

    async def run() -> None:
        async with aclosing(engine.generate(request(n=LONG))) as stream:
            await anext(stream)
            waiting = asyncio.create_task(complete(engine, request()))
            await until(lambda: engine.stats().waiting == 1)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            await until(lambda: not engine.stats().waiting)

    asyncio.run(run())


def test_a_thousand_cancellations_leave_nothing(start: Start, reference: Reference) -> None:
    engine = start("batch_size=4", "adapters_resident=1", "max_waiting=8", "page_tokens=4", endless=True)
    engine.preload(A)
    engine.preload(B)
    threads = threading.active_count()

    async def run() -> None:
        for place in range(1000):
            asked = request(PROMPTS[place % 6], (None, A, B)[place % 3], 200)
            if place % 5 == 0:
                asked = replace(asked, sampling=replace(asked.sampling, n=2, temperature=1.0))
            task = asyncio.create_task(complete(engine, asked))
            for _ in range(place % 7):
                await asyncio.sleep(0)
            if place % 50 == 0:
                await until(lambda: engine.stats().running > 0 or task.done())  # noqa: B023
            task.cancel()
            with pytest.raises((asyncio.CancelledError, Overloaded)):
                await task
        await until(lambda: is_idle(engine))
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(run())
    assert threading.active_count() <= threads + 1, "two threads read adapters at most"
    for adapter in (A, B, None):
        assert engine.residency.can_lease(adapter)
        assert answers(engine, request(PROMPTS[2], adapter)) == [reference(PROMPTS[2], adapter)]


def test_a_caller_whose_event_loop_is_gone_hurts_nobody(start: Start, reference: Reference) -> None:
    engine = start("batch_size=2", endless=True)
    loop = asyncio.new_event_loop()
    stream: AsyncIterator[Any] = engine.generate(request(n=LONG))
    loop.run_until_complete(anext(stream))
    loop.close()
    assert answers(engine, request(PROMPTS[2])) == [reference(PROMPTS[2])]
    engine.check_health()
    asyncio.run(until(lambda: is_idle(engine)))


# -- too much, too late


def test_a_full_queue_is_refused(start: Start) -> None:
    engine = start("batch_size=1", "max_waiting=2", endless=True)

    async def run() -> None:
        async with aclosing(engine.generate(request(n=LONG))) as stream:
            await anext(stream)
            two = replace(request(), sampling=Sampling(3, n=2))
            waiting = asyncio.create_task(complete(engine, two))
            await until(lambda: engine.stats().waiting == 2)
            with pytest.raises(Overloaded, match="has 3 answers to make already and takes 3"):
                await complete(engine, request())
            waiting.cancel()
            await until(lambda: not engine.stats().waiting)
            with pytest.raises(Overloaded):
                await complete(engine, replace(request(), sampling=Sampling(3, n=3)))

    asyncio.run(run())
    assert len(answers(engine, request(n=3))[0]) == 3


def test_a_deadline_ends_who_runs(start: Start) -> None:
    engine = start(endless=True)
    forward, never = engine.executor.forward, threading.Event()

    def slow(parts: Any) -> Any:
        never.wait(0.01)
        return forward(parts)

    engine.executor.forward = slow  # type: ignore[method-assign]

    async def run() -> int:
        made = 0
        with pytest.raises(DeadlineExceeded, match=r"0\.3 s after the question"):
            async for delta in engine.generate(replace(request(n=LONG), deadline_s=0.3)):
                made += len(delta.token_ids)
        await until(lambda: is_idle(engine))
        return made

    assert asyncio.run(run()) < LONG


def test_a_deadline_ends_who_waits_and_who_reads_no_more(start: Start) -> None:
    engine = start("batch_size=1", endless=True)

    async def run() -> None:
        async with aclosing(engine.generate(replace(request(n=LONG), deadline_s=30))) as stream:
            await anext(stream)
            with held(engine):
                with pytest.raises(DeadlineExceeded):
                    await complete(engine, replace(request(), deadline_s=0.05))
                silent = engine.generate(replace(request(), deadline_s=0.05))
                with pytest.raises(DeadlineExceeded):
                    await anext(silent)
            await running(engine, 1)
            await until(lambda: not engine.stats().waiting)

    asyncio.run(run())


@contextmanager
def held(engine: NativeEngine) -> Iterator[threading.Event]:
    """The engine's next pass, and all after it, wait for the end of this."""
    inside, go_on, forward = threading.Event(), threading.Event(), engine.executor.forward

    def blocked(parts: Any) -> Any:
        inside.set()
        go_on.wait(30)
        return forward(parts)

    engine.executor.forward = blocked  # type: ignore[method-assign]
    try:
        yield inside
    finally:
        go_on.set()


def test_a_step_that_hangs_shows_in_the_health(start: Start, reference: Reference) -> None:
    engine = start("stuck_s=0.05")

    def stuck() -> bool:
        try:
            engine.check_health()
        except Unavailable as error:
            return "in one step for over 0.05 s" in str(error)
        return False

    async def run() -> list[int]:
        with held(engine) as inside:
            first = asyncio.create_task(complete(engine, request(PROMPTS[1])))
            await asyncio.to_thread(inside.wait, 30)
            await until(stuck)
            with pytest.raises(Unavailable, match="in one step"):
                await complete(engine, request())
        return (await first)[0]

    assert asyncio.run(run()) == reference(PROMPTS[1])
    engine.check_health()


# -- what breaks


def fail(*_: Any) -> None:
    raise RuntimeError("out of memory")


def test_a_pass_that_fails_ends_its_own_rows_and_the_engine_goes_on(start: Start, reference: Reference) -> None:
    engine = start("page_tokens=4")
    forward = engine.executor.forward

    async def run() -> list[Any]:
        engine.executor.forward = fail  # type: ignore[method-assign,assignment]
        outcomes = await asyncio.gather(complete(engine, request(PROMPTS[5])), return_exceptions=True)
        engine.executor.forward = forward  # type: ignore[method-assign]
        return outcomes

    for _ in range(FAILURES + 1):
        (outcome,) = asyncio.run(run())
        assert isinstance(outcome, Unavailable)
        assert "failed to compute" in str(outcome)
        (made, again) = (deltas(engine, request(PROMPTS[5])) for _ in range(2))
        assert [token for delta in made for token in delta.token_ids] == reference(PROMPTS[5])
        list(again)
    assert is_idle(engine)


def test_what_one_answer_stumbles_over_is_its_own_trouble(
    start: Start, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start()
    take = Chooser.take

    def stumble(chooser: Chooser, token: int) -> None:
        if chooser.sampling.seed == 13:
            raise ValueError("no such state")
        take(chooser, token)

    monkeypatch.setattr(Chooser, "take", stumble)

    async def run() -> list[Any]:
        asked = (request(PROMPTS[2]), request(PROMPTS[1], seed=13), request(PROMPTS[3], B))
        return await asyncio.gather(*(complete(engine, each) for each in asked), return_exceptions=True)

    (first, _), failed, (last, _) = asyncio.run(run())
    assert isinstance(failed, Unavailable)
    assert (first, last) == (reference(PROMPTS[2]), reference(PROMPTS[3], B))
    assert is_idle(engine)


def test_an_engine_that_fails_again_and_again_shows_in_the_health(start: Start) -> None:
    engine = start()
    engine.executor.forward = fail  # type: ignore[method-assign,assignment]
    for _ in range(FAILURES):
        with pytest.raises(Unavailable, match="failed to compute"):
            answers(engine, request())
    assert engine.thread is not None
    engine.thread.join(30)
    for act in (engine.check_health, lambda: answers(engine, request())):
        with pytest.raises(Unavailable, match="out of memory"):
            act()


def test_stopping_frees_the_model(start: Start) -> None:
    engine = start()
    answers(engine, request(PROMPTS[1], A))
    executor = weakref.ref(engine.executor)
    engine.stop()
    gc.collect()
    assert executor() is None
    assert (engine.stats().pages, engine.thread) == (0, None)


def test_stopping_ends_all_who_wait(start: Start) -> None:
    engine = start("batch_size=1", endless=True)

    async def run() -> list[Any]:
        callers = [asyncio.create_task(complete(engine, request(n=LONG))) for _ in range(3)]
        await until(lambda: engine.stats().waiting == 2)
        await asyncio.to_thread(engine.stop)
        return await asyncio.gather(*callers, return_exceptions=True)

    outcomes = asyncio.run(run())
    assert [type(outcome) for outcome in outcomes] == [Unavailable] * 3
    with pytest.raises(Unavailable, match="not running"):
        engine.check_health()


def test_nobody_joins_an_engine_that_is_stopping(start: Start) -> None:
    engine = start()

    async def run() -> None:
        with held(engine) as inside:
            first = asyncio.create_task(complete(engine, request()))
            await asyncio.to_thread(inside.wait, 30)
            stop = asyncio.create_task(asyncio.to_thread(engine.stop))
            await until(lambda: engine.stopping)
            with pytest.raises(Unavailable, match="stopping"):
                await complete(engine, request())
        await stop
        with pytest.raises(Unavailable, match="stopped before"):
            await first

    asyncio.run(run())


# -- memory


def test_the_start_says_what_memory_is_for(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "serving.engine.native.engine")
    engine = start("batch_size=4", "page_tokens=16", "adapters_resident=2")
    (line,) = (record.getMessage() for record in caplog.records if record.getMessage().startswith("engine: "))
    memory = engine.executor.memory
    assert f"weights {memory.weights / 2**20:.0f} MiB, cache {memory.cache / 2**20:.0f} MiB (512 pages" in line
    assert "slots of 2 adapters" in line


def test_more_memory_than_was_reserved_is_refused_in_numbers(start: Start) -> None:
    with pytest.raises(ResourcesShort, match=r"takes \d+ MiB .* reserves 1 MiB"):
        start("memory_bytes=1048576")
