"""The engine without a model: the whole seam, exactly."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import BadInput, ContextTooLong, DeadlineExceeded, NotFound
from serving.engine.base import Delta, EngineStats, GenerateRequest, Grammar, Sampling, TokenLogprob
from serving.engine.echo import EchoEngine

REQUEST = GenerateRequest("r", (1, 2, 3, 4), Sampling(3))


def collect(engine: EchoEngine, request: GenerateRequest = REQUEST, **sampling: Any) -> list[Delta]:
    async def run() -> list[Delta]:
        asked = replace(request, sampling=replace(request.sampling, **sampling))
        return [delta async for delta in engine.generate(asked)]

    return asyncio.run(run())


def test_the_answer_is_the_end_of_the_prompt_a_token_a_step() -> None:
    assert collect(EchoEngine()) == [Delta((2,)), Delta((3,)), Delta((4,)), Delta((), "length")]
    assert collect(EchoEngine(), max_tokens=9)[-1] == Delta((), "stop")


def test_what_nobody_reads_along_comes_at_once() -> None:
    assert collect(EchoEngine(), replace(REQUEST, stream=False)) == [Delta((2, 3, 4), "length")]


def test_several_answers_are_alike() -> None:
    deltas = collect(EchoEngine(), n=3)
    for index in range(3):
        mine = [delta for delta in deltas if delta.index == index]
        assert [token for delta in mine for token in delta.token_ids] == [2, 3, 4]
        assert [delta.finish_reason for delta in mine] == [None, None, None, "length"]


def test_log_probabilities_are_those_of_certainty() -> None:
    first, *_ = collect(EchoEngine(), logprobs=2)
    assert first.logprobs == (TokenLogprob(2, 0.0, ((2, 0.0),)),)


@pytest.mark.parametrize(
    "asked", [{"stop": ("x",)}, {"grammar": Grammar("json_object")}, {"temperature": 3.0}], ids=str
)
def test_what_it_cannot_do_is_refused(asked: dict[str, Any]) -> None:
    with pytest.raises(BadInput) as refused:
        collect(EchoEngine(), **asked)
    assert refused.value.param in ("stop", "response_format", "temperature")


def test_the_context_is_that_of_the_configuration(make_config: Any) -> None:
    with pytest.raises(ContextTooLong):
        collect(EchoEngine(make_config("base.context_tokens=1536")), max_tokens=1533)


def test_adapters_are_known_until_they_are_dropped() -> None:
    engine = EchoEngine()
    with pytest.raises(NotFound):
        collect(engine, replace(REQUEST, adapter="a" * 64))
    with pytest.raises(NotFound):
        engine.preload("a" * 64)
    engine.add_adapter("a" * 64, Path())
    engine.preload("a" * 64, pin=True)
    assert collect(engine, replace(REQUEST, adapter="a" * 64))[-1].finish_reason == "length"
    assert engine.stats().resident == ("a" * 64,)
    engine.drop_adapter("a" * 64)
    with pytest.raises(NotFound):
        collect(engine, replace(REQUEST, adapter="a" * 64))


def test_the_numbers_tell_what_runs_and_what_was_done() -> None:
    engine = EchoEngine()

    async def run() -> EngineStats:
        stream = engine.generate(replace(REQUEST, sampling=Sampling(3, n=2)))
        await anext(stream)
        during = engine.stats()
        await stream.aclose()  # type: ignore[attr-defined]
        return during

    during = asyncio.run(run())
    assert (during.running, during.waiting_tokens, during.answer_tokens) == (2, 5, 1)
    assert engine.stats() == EngineStats(prompt_tokens=4, answer_tokens=1)


def test_a_request_that_is_late_is_given_up() -> None:
    with pytest.raises(DeadlineExceeded):
        collect(EchoEngine(), replace(REQUEST, deadline_s=0.0))
