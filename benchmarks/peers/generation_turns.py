"""How an arm of ``benchmarks.generation`` is asked: a line of JSON a case on stdin, a line of JSON back on stdout.

Imported by scripts that run in other environments: no import of ours. The first line an arm writes says that it is
ready and how long that took; then it answers cases until its stdin ends. Whatever libraries print goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

BEGAN = time.perf_counter()
"""This file is what every arm imports first."""
Case = dict[str, Any]
"""``prompts`` (token ids each), ``adapters`` (a number or null for each of them), ``new`` (tokens to make) and
``apart`` (one after another instead of together)."""
Answer = dict[str, Any]
"""``seconds``, ``tokens`` (ids made for each prompt), and with ``apart`` the ``first_s`` of each prompt."""


def task() -> Case:
    """What the arm is to be: ``model``, ``adapters`` (directories), ``rank``, ``batch``, ``context``, ``threads``, …"""
    read: Case = json.loads(sys.argv[1])
    return read


def aside() -> int:
    """Send what is printed from here on to stderr; returns the descriptor for answers."""
    answers = os.dup(1)
    os.dup2(2, 1)
    return answers


def serve(answers: int, run: Callable[[Case], Answer], **about: Any) -> None:
    """Say that the arm is ready, then answer every case with `run`."""
    with os.fdopen(answers, "w", encoding="utf-8") as out:
        print(json.dumps({"ready_s": time.perf_counter() - BEGAN, **about}), file=out, flush=True)
        for line in sys.stdin:
            print(json.dumps(run(json.loads(line))), file=out, flush=True)


def timed(case: Case, run: Callable[[list[list[int]], list[Any], int], list[list[int]]]) -> Answer:
    """A case for arms that take prompts, adapters and a number of tokens, and answer when all is made.

    Apart, each prompt is asked for one token only, so that its seconds are those to the first token.
    """
    if case["apart"]:
        first, tokens = [], []
        for prompt, adapter in zip(case["prompts"], case["adapters"], strict=True):
            began = time.perf_counter()
            tokens += run([prompt], [adapter], 1)
            first.append(time.perf_counter() - began)
        return {"seconds": sum(first), "first_s": first, "tokens": tokens}
    began = time.perf_counter()
    made = run(case["prompts"], case["adapters"], case["new"])
    return {"seconds": time.perf_counter() - began, "tokens": made}
