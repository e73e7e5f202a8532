"""What every engine has to do, as cases that a test of any engine can run.

A case is a coroutine over a :class:`Subject`; it fails by assertion. Nothing here needs pytest, so that an engine whose
libraries live in an environment of their own can be asked there: ``for case in CASES: asyncio.run(case(subject))``.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cluster.errors import BadInput, ContextTooLong, DeadlineExceeded, MetierError, NotFound
from serving.engine.base import Delta, Engine, GenerateRequest, Sampling


@dataclass(frozen=True)
class Subject:
    """A started engine and what is known of its answers."""

    engine: Engine
    prompts: Sequence[tuple[int, ...]]
    """At least six, of different lengths, each of at least 12 tokens."""
    adapters: dict[str, Path]
    """At least two by digest, which the engine was told of; one more is told to it by a case."""
    spare: tuple[str, Path]
    """An adapter that the engine was not told of."""
    expected: Callable[[tuple[int, ...], str | None, int], list[int]]
    """(prompt, adapter, tokens) -> the greedy answer's ids, by another implementation that ignores ends of turns."""
    context: int
    """Tokens of prompt and answer together."""
    samples: bool = True
    """Whether temperature does anything."""


@dataclass
class Whole:
    """An answer put together."""

    ids: list[int] = field(default_factory=list)
    reason: str | None = None
    deltas: list[Delta] = field(default_factory=list)


async def collect(engine: Engine, request: GenerateRequest) -> list[Whole]:
    """All answers to `request`; checks that each ends once, and says nothing after that."""
    answers: defaultdict[int, Whole] = defaultdict(Whole)
    async for delta in engine.generate(request):
        answer = answers[delta.index]
        assert answer.reason is None, "an answer went on after its end"
        answer.deltas.append(delta)
        answer.ids.extend(delta.token_ids)
        answer.reason = delta.finish_reason
    assert sorted(answers) == list(range(request.sampling.n))
    assert all(answer.reason for answer in answers.values()), "an answer has no end"
    return [answers[index] for index in sorted(answers)]


def ask(
    prompt: tuple[int, ...], tokens: int = 8, adapter: str | None = None, answers: int = 1, **sampling: Any
) -> GenerateRequest:
    """A greedy request for `answers` answers of exactly so many tokens."""
    return GenerateRequest("r", prompt, Sampling(tokens, n=answers, ignore_eos=True, **sampling), adapter)


async def ids(subject: Subject, *requests: GenerateRequest) -> list[list[int]]:
    """First answers of `requests`, asked for at once."""
    wholes = await asyncio.gather(*(collect(subject.engine, request) for request in requests))
    return [whole[0].ids for whole in wholes]


async def fails(kind: type[MetierError], awaited: Awaitable[Any], words: str = "") -> None:
    try:
        await awaited
    except kind as error:
        assert words in str(error), str(error)
        return
    raise AssertionError(f"no {kind.__name__}")


async def idle(subject: Subject) -> None:
    """Wait until nothing runs or waits, and all pages are back."""
    async with asyncio.timeout(60):
        while (stats := subject.engine.stats()).running or stats.waiting or stats.free_pages < stats.pages:
            await asyncio.sleep(0.001)
    assert stats.waiting_tokens == 0


# -- cases


async def says_what_the_reference_says(subject: Subject) -> None:
    for prompt in subject.prompts[:3]:
        (whole,) = await collect(subject.engine, ask(prompt))
        assert (whole.ids, whole.reason) == (subject.expected(prompt, None, 8), "length")


async def rows_of_different_lengths_keep_to_themselves(subject: Subject) -> None:
    counts = [3 + place for place, _ in enumerate(subject.prompts)]
    got = await ids(subject, *(ask(prompt, n) for prompt, n in zip(subject.prompts, counts, strict=True)))
    assert got == [subject.expected(prompt, None, n) for prompt, n in zip(subject.prompts, counts, strict=True)]


async def base_and_adapters_in_one_batch_speak_as_each_alone(subject: Subject) -> None:
    asked = [(prompt, adapter) for prompt in subject.prompts[:3] for adapter in (None, *subject.adapters)]
    got = await ids(subject, *(ask(prompt, adapter=adapter) for prompt, adapter in asked))
    assert got == [subject.expected(prompt, adapter, 8) for prompt, adapter in asked]


async def one_prompt_under_adapters_in_turns_is_never_another_ones(subject: Subject) -> None:
    prompt = max(subject.prompts, key=len)
    for adapter in (None, *subject.adapters, None, *reversed(subject.adapters)):
        assert await ids(subject, ask(prompt, adapter=adapter)) == [subject.expected(prompt, adapter, 8)]


async def an_answer_ends_at_max_tokens(subject: Subject) -> None:
    for n in (1, 5):
        (whole,) = await collect(subject.engine, ask(subject.prompts[0], n))
        assert (len(whole.ids), whole.reason) == (n, "length")


async def several_answers_each_end(subject: Subject) -> None:
    wholes = await collect(subject.engine, ask(subject.prompts[1], 6, answers=3))
    assert [whole.ids for whole in wholes] == [subject.expected(subject.prompts[1], None, 6)] * 3


async def who_does_not_read_along_gets_the_same(subject: Subject) -> None:
    request = replace(ask(subject.prompts[2]), stream=False)
    assert await ids(subject, request) == [subject.expected(subject.prompts[2], None, 8)]


async def a_seed_gives_the_same_answer_in_any_company(subject: Subject) -> None:
    seeded = ask(subject.prompts[2], 12, temperature=1.0, seed=11)
    (alone,) = await ids(subject, seeded)
    company = [ask(prompt, 12, temperature=1.0) for prompt in subject.prompts]
    assert (await ids(subject, *company, seeded))[-1] == alone
    if subject.samples:
        others = await ids(subject, *(ask(subject.prompts[2], 12, temperature=1.5, seed=seed) for seed in range(4)))
        assert len({tuple(other) for other in others}) > 1


async def an_adapter_nobody_added_is_not_found(subject: Subject) -> None:
    for _ in range(2):
        await fails(NotFound, collect(subject.engine, ask(subject.prompts[0], adapter="f" * 64)), "f" * 12)
    await says_what_the_reference_says(subject)


async def an_adapter_comes_and_goes(subject: Subject) -> None:
    digest, directory = subject.spare
    request = ask(subject.prompts[1], adapter=digest)
    subject.engine.add_adapter(digest, directory)
    await asyncio.to_thread(subject.engine.preload, digest)
    assert await ids(subject, request) == [subject.expected(subject.prompts[1], digest, 8)]
    subject.engine.drop_adapter(digest)
    await fails(NotFound, collect(subject.engine, request))


async def an_adapter_dropped_in_use_is_used_to_the_end(subject: Subject) -> None:
    digest, directory = subject.spare
    subject.engine.add_adapter(digest, directory)
    got: list[int] = []
    async for delta in subject.engine.generate(ask(subject.prompts[3], 24, adapter=digest)):
        if not got:
            subject.engine.drop_adapter(digest)
        got.extend(delta.token_ids)
    assert got == subject.expected(subject.prompts[3], digest, 24)
    await fails(NotFound, collect(subject.engine, ask(subject.prompts[3], adapter=digest)))


async def what_is_too_long_is_refused(subject: Subject) -> None:
    await fails(ContextTooLong, collect(subject.engine, ask((5,) * (subject.context - 3), 4)), str(subject.context - 3))


async def values_that_mean_nothing_are_refused(subject: Subject) -> None:
    bad = [
        {"temperature": float("nan")},
        {"temperature": -1.0},
        {"top_p": float("inf")},
        {"top_p": 0.0},
        {"min_p": 2.0},
        {"presence_penalty": float("nan")},
        {"repetition_penalty": 0.0},
        {"stop": ("x",) * 10_000},
        {"logit_bias": ((10**9, 1.0),)},
    ]
    for values in bad:
        await fails(BadInput, collect(subject.engine, ask(subject.prompts[0], **values)), next(iter(values)))
    for tokens in (0, 10**9):
        await fails(BadInput, collect(subject.engine, ask(subject.prompts[0], tokens)), "max_tokens")
    await fails(BadInput, collect(subject.engine, ask(subject.prompts[0], answers=10**6)), "n")
    await fails(BadInput, collect(subject.engine, ask(())))


async def a_deadline_ends_it(subject: Subject) -> None:
    request = replace(ask(subject.prompts[0], 64), deadline_s=1e-6)
    await fails(DeadlineExceeded, collect(subject.engine, request))
    await idle(subject)


async def who_leaves_frees_the_place(subject: Subject) -> None:
    for adapter in (None, *subject.adapters):
        async with aclosing(subject.engine.generate(ask(subject.prompts[0], 64, adapter))) as stream:
            await anext(stream)
    await idle(subject)
    await says_what_the_reference_says(subject)


async def cancelled_tasks_leave_nothing(subject: Subject) -> None:
    async def once(place: int) -> None:
        adapter = [None, *subject.adapters][place % (1 + len(subject.adapters))]
        task = asyncio.create_task(collect(subject.engine, ask(subject.prompts[place % 6], 64, adapter)))
        for _ in range(place % 4):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    for place in range(50):
        await once(place)
    await idle(subject)
    assert len(asyncio.all_tasks()) == 1
    await says_what_the_reference_says(subject)


async def the_counts_add_up(subject: Subject) -> None:
    before = subject.engine.stats()
    await ids(subject, *(ask(prompt, 5) for prompt in subject.prompts))
    await idle(subject)
    after = subject.engine.stats()
    assert after.prompt_tokens - before.prompt_tokens == sum(map(len, subject.prompts))
    assert after.answer_tokens - before.answer_tokens == 5 * len(subject.prompts)
    assert before.cached_tokens <= after.cached_tokens <= after.prompt_tokens


async def it_is_well(subject: Subject) -> None:
    subject.engine.check_health()


Case = Callable[[Subject], Coroutine[Any, Any, None]]
CASES: tuple[Case, ...] = (
    says_what_the_reference_says,
    rows_of_different_lengths_keep_to_themselves,
    base_and_adapters_in_one_batch_speak_as_each_alone,
    one_prompt_under_adapters_in_turns_is_never_another_ones,
    an_answer_ends_at_max_tokens,
    several_answers_each_end,
    who_does_not_read_along_gets_the_same,
    a_seed_gives_the_same_answer_in_any_company,
    an_adapter_nobody_added_is_not_found,
    an_adapter_comes_and_goes,
    an_adapter_dropped_in_use_is_used_to_the_end,
    what_is_too_long_is_refused,
    values_that_mean_nothing_are_refused,
    a_deadline_ends_it,
    who_leaves_frees_the_place,
    cancelled_tasks_leave_nothing,
    the_counts_add_up,
    it_is_well,
)
