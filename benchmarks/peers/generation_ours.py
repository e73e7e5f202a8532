"""Our engine as an arm of ``benchmarks.generation``: ``NativeEngine`` through its seam, all requests at once on one event loop.

Runs in our environment. Adapters are loaded before the first case.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.peers.generation_turns import Case, aside, serve, task, timed

answers = aside()

import asyncio  # noqa: E402

from cluster.config import load  # noqa: E402
from serving.engine.base import GenerateRequest, Sampling  # noqa: E402
from serving.engine.native.engine import NativeEngine  # noqa: E402


def main() -> None:
    asked: Case = task()
    engine = NativeEngine(load(None, asked["settings"]), Path(asked["model"]))
    engine.start()
    digests = [f"{number:064x}" for number, _ in enumerate(asked["adapters"])]
    for digest, directory in zip(digests, asked["adapters"], strict=True):
        engine.add_adapter(digest, Path(directory))
        engine.preload(digest)

    async def one(prompt: list[int], adapter: int | None, new: int) -> list[int]:
        sampling = Sampling(max_tokens=new, ignore_eos=True)
        request = GenerateRequest(
            "r", tuple(prompt), sampling, None if adapter is None else digests[adapter], stream=False
        )
        return [token async for delta in engine.generate(request) for token in delta.token_ids]

    def run(prompts: list[list[int]], whose: list[int | None], new: int) -> list[list[int]]:
        async def together() -> list[list[int]]:
            return await asyncio.gather(*(one(prompt, each, new) for prompt, each in zip(prompts, whose, strict=True)))

        return asyncio.run(together())

    try:
        serve(answers, lambda case: timed(case, run))
    finally:
        engine.stop()


if __name__ == "__main__":
    main()
