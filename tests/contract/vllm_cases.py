"""The contract suite of the engines on vLLM, run by the interpreter of vLLM's own environment.

``python -m tests.contract.vllm_cases TASK.json``: one started engine, all of :data:`tests.contract.engine_cases.CASES` and then the
cases below, which are about what only vLLM does or has another name for. A line of JSON a case goes to the file that TASK.json
names as ``out``: its name and, if it failed, how. Expected ids come from transformers, with TASK.json.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.config import load
from cluster.errors import BadInput, Mismatch, Overloaded, ResourcesShort, Unavailable
from serving.engine.base import GenerateRequest, Grammar, Sampling
from serving.engine.vllm import VllmEngine
from tests.contract.engine_cases import CASES, Case, Subject, ask, collect, fails, ids, says_what_the_reference_says

TASK: dict[str, Any] = {}


async def stop_strings_end_an_answer_and_keep_their_ids(subject: Subject) -> None:
    whole = subject.expected(subject.prompts[0], None, 8)
    text = TASK["letters"][str(whole[4])]
    (got,) = await collect(subject.engine, ask(subject.prompts[0], 8, stop=(text,)))
    assert (got.ids, got.reason) == (whole[: whole.index(whole[4]) + 1], "stop")


async def an_end_of_turn_ends_an_answer_and_is_not_in_it(subject: Subject) -> None:

    def forced(**sampling: Any) -> GenerateRequest:
        return GenerateRequest("r", subject.prompts[0], Sampling(8, logit_bias=((TASK["eos"], 100.0),), **sampling))

    (got,) = await collect(subject.engine, forced(logprobs=0))
    assert (got.ids, got.reason) == ([], "stop"), got
    (got,) = await collect(subject.engine, forced(ignore_eos=True))
    assert (got.ids, got.reason) == ([TASK["eos"]] * 8, "length")
    (got,) = await collect(subject.engine, forced(min_tokens=3))
    assert (len(got.ids), got.reason) == (3, "stop"), got


async def logprobs_are_those_of_the_reference(subject: Subject) -> None:
    (got,) = await collect(subject.engine, ask(subject.prompts[0], 4, logprobs=3, repetition_penalty=1.0))
    logprobs = [each for delta in got.deltas for each in delta.logprobs]
    assert [each.token for each in logprobs] == got.ids
    for each, expected in zip(logprobs, TASK["logprobs"], strict=True):
        assert [token for token, _ in each.top] == [token for token, _ in expected]
        assert all(abs(a - b) < 1e-4 for (_, a), (_, b) in zip(each.top, expected, strict=True))
        assert each.logprob == each.top[0][1]


async def a_repeated_prompt_is_read_from_the_cache(subject: Subject) -> None:
    prompt = tuple((3 * k) % 250 + 3 for k in range(TASK["block"] + 10))
    for adapter, cached in ((None, 0), (None, TASK["block"]), (next(iter(subject.adapters)), 0)):
        (got,) = await collect(subject.engine, ask(prompt, 2, adapter))
        assert [delta.cached_tokens for delta in got.deltas] == [cached, 0], (adapter, got.deltas)


async def an_answer_keeps_to_its_grammar(subject: Subject) -> None:
    # a byte is a token: the model knows nothing, so only the grammar makes these words
    grammar = Grammar("regex", "(yes|no) [0-9]{3}")
    sampling = Sampling(16, temperature=1.0, seed=5, grammar=grammar)
    (got,) = await collect(subject.engine, GenerateRequest("r", subject.prompts[0], sampling))
    text = "".join(TASK["letters"][str(token)] for token in got.ids)
    assert got.reason == "stop" and text[:-4] in ("yes", "no") and text[-3:].isdigit(), text
    await fails(BadInput, collect(subject.engine, ask(subject.prompts[0], grammar=Grammar("regex", "(a"))))
    await says_what_the_reference_says(subject)


async def adapters_that_cannot_be_served_are_refused_and_hurt_nobody(subject: Subject) -> None:
    for name, (kind, words) in {
        "large": (Mismatch, "r "),
        "pickle": (BadInput, "pickle"),
        "cut": (BadInput, "copy it"),
    }.items():
        subject.engine.add_adapter(name * 10, Path(TASK["broken"][name]))
        await fails(kind, collect(subject.engine, ask(subject.prompts[0], adapter=name * 10)), words)
        await fails(kind, asyncio.to_thread(subject.engine.preload, name * 10), words)
        subject.engine.drop_adapter(name * 10)
    await says_what_the_reference_says(subject)


async def what_is_pinned_leaves_a_slot(subject: Subject) -> None:
    first, second = subject.adapters
    await asyncio.to_thread(subject.engine.preload, first, True)
    assert first in subject.engine.stats().resident
    await fails(ResourcesShort, asyncio.to_thread(subject.engine.preload, second, True), "adapters_resident")
    assert await ids(subject, ask(subject.prompts[0], adapter=second)) == [
        subject.expected(subject.prompts[0], second, 8)
    ]


async def a_full_queue_says_so(subject: Subject) -> None:
    asked = [collect(subject.engine, ask(subject.prompts[0], 32)) for _ in range(TASK["places"] + 3)]
    got = await asyncio.gather(*asked, return_exceptions=True)
    assert [isinstance(each, Overloaded) for each in got].count(True) == 3


async def a_dead_engine_is_unwell_and_says_so_to_who_waits(subject: Subject) -> None:
    import psutil

    async def kill() -> None:
        for child in psutil.Process().children(recursive=True):
            if "EngineCore" in " ".join(child.cmdline()):
                os.kill(child.pid, signal.SIGKILL)

    stream = subject.engine.generate(ask(subject.prompts[0], 60))
    await anext(stream)
    await kill()

    async def rest() -> None:
        async for _ in stream:
            pass

    await fails(Unavailable, rest())
    try:
        subject.engine.check_health()
    except Unavailable:
        return
    raise AssertionError("it says it is well")


OWN: tuple[Case, ...] = (
    stop_strings_end_an_answer_and_keep_their_ids,
    an_end_of_turn_ends_an_answer_and_is_not_in_it,
    logprobs_are_those_of_the_reference,
    a_repeated_prompt_is_read_from_the_cache,
    an_answer_keeps_to_its_grammar,
    adapters_that_cannot_be_served_are_refused_and_hurt_nobody,
    what_is_pinned_leaves_a_slot,
    a_full_queue_says_so,
    a_dead_engine_is_unwell_and_says_so_to_who_waits,
)
"""In this order: the last one leaves nothing to ask."""


def main() -> None:
    TASK.update(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    config = load(None, TASK["settings"])
    engine = VllmEngine(config, Path(TASK["model"]))
    engine.start()
    try:
        directories = {digest: Path(directory) for digest, directory in TASK["adapters"].items()}
        *told, spare = directories
        for digest in told:
            engine.add_adapter(digest, directories[digest])
        answers: dict[str, list[int]] = TASK["expected"]

        def expected(prompt: tuple[int, ...], adapter: str | None, tokens: int) -> list[int]:
            return answers[f"{TASK['prompts'].index(list(prompt))} {adapter}"][:tokens]

        subject = Subject(
            engine,
            tuple(map(tuple, TASK["prompts"])),
            {digest: directories[digest] for digest in told},
            (spare, directories[spare]),
            expected,
            config.base.context_tokens,
        )
        with Path(TASK["out"]).open("w", encoding="utf-8") as out:
            for case in (*CASES, *OWN):
                print(json.dumps({"case": case.__name__, "failed": failure(case, subject)}), file=out, flush=True)
    finally:
        engine.stop()


def failure(case: Callable[[Subject], Any], subject: Subject) -> str | None:
    """What went wrong, or nothing."""

    async def limited() -> None:
        async with asyncio.timeout(120):
            await case(subject)

    try:
        asyncio.run(limited())
    except Exception:
        return traceback.format_exc()
    return None


if __name__ == "__main__":
    main()
