"""A name is published anew, and an alias moved, while many ask for it: nobody ever gets old weights or an old cache.

Through everything that has a part in it: registry, names, the replica with its disk, residency, prefix cache, engine.
Two sets of weights take turns under one name; each publication is a version, and so a digest, of its own. All ask
the same few prompts, so that the prefix cache is hot, and there are fewer slots than digests in use at a time. An answer must be,
to the token, that of the weights behind the digest its name was resolved to.
"""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.config import Config, to_json
from cluster.models import base_ref, resolve
from cluster.registry import AdapterVersion
from serving.engine.base import EngineStats, GenerateRequest, Sampling
from serving.generator import GeneratorReplica
from serving.names import Names
from tests import trade

REQUESTS = 1200
IN_FLIGHT = 48
EVERY = 40
"""Requests between two swaps of each kind."""
TOKENS = 8
PROMPTS = [tuple((7 * n + 31 * k) % 250 + 3 for k in range(40 + 10 * n)) for n in range(3)]
WEIGHTS = ("old", "new")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return trade.configure(
        tmp_path_factory.mktemp("swap"),
        "serving.generator.threads=1",
        "serving.generator.batch_size=16",
        "serving.generator.adapters_resident=2",
    )


@pytest.fixture(scope="module")
def directories(config: Config, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("weights")
    return {name: trade.write_adapter(config, out / name, seed=seed) for seed, name in enumerate(WEIGHTS, 1)}


@pytest.fixture(scope="module")
def expected(config: Config, directories: dict[str, Path]) -> dict[tuple[str | None, int], list[int]]:
    """(weights, prompt) -> what plain PEFT answers, greedily; all weights say something else to every prompt."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    found: dict[tuple[str | None, int], list[int]] = {}
    for name in (None, *WEIGHTS):
        model: Any = AutoModelForCausalLM.from_pretrained(
            resolve(config.base, config.models_cache), dtype=torch.float32
        )
        if name is not None:
            model = PeftModel.from_pretrained(model, directories[name])
        for number, prompt in enumerate(PROMPTS):
            ids = torch.tensor([prompt])
            with torch.inference_mode():
                out = model.eval().generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=TOKENS,
                    min_new_tokens=TOKENS,
                    do_sample=False,
                    pad_token_id=2,
                )
            found[name, number] = out[0, len(prompt) :].tolist()
    for number in range(len(PROMPTS)):
        assert len({tuple(found[name, number]) for name in (None, *WEIGHTS)}) == 3
    return found


class Load:
    """Requests by name, and two who swap what the names mean."""

    def __init__(self, config: Config, directories: dict[str, Path]) -> None:
        self.config, self.directories = config, directories
        self.replica = GeneratorReplica(to_json(config))
        self.names = Names(
            config, trade.registry(config), base_ref(config.base, resolve(config.base, config.models_cache))
        )
        self.weights: dict[str | None, str | None] = {None: None}
        """Digest -> whose weights it has."""
        self.versions = 0
        fixed = [self.publish(f"fixed-{name}", name) for name in WEIGHTS]
        self.releases = itertools.cycle([trade.release(config, version) for version in fixed])
        self.republished = self.promoted = 0
        self.seen: set[tuple[str, str | None]] = set()
        self.republish()
        self.promote()

    def publish(self, name: str, weights: str) -> AdapterVersion:
        """The same weights for another number of tokens a row are another adapter."""
        self.versions += 1
        made = trade.publish(self.config, self.directories[weights], name, max_tokens=self.versions)
        self.weights[made.digest] = weights
        return made

    def republish(self) -> None:
        self.republished += 1
        made = self.publish("trade", WEIGHTS[self.republished % 2])
        assert made.version == self.republished, "not a version of its own"

    def promote(self) -> None:
        self.promoted += 1
        trade.registry(self.config).promote(self.config.name, next(self.releases).ref)

    async def ask(self, number: int, expected: dict[tuple[str | None, int], list[int]]) -> None:
        base = self.config.base.served_name
        model = (f"{base}:trade", self.config.name, f"{base}:trade", self.config.name, base)[number % 5]
        digest = (await asyncio.to_thread(self.names.resolve, model)).adapter
        prompt = number // 5 % len(PROMPTS)
        sampling = Sampling(TOKENS, min_tokens=TOKENS)
        request = GenerateRequest(f"r{number}", PROMPTS[prompt], sampling, digest, stream=number % 2 == 0)
        got = [token async for delta in self.replica.generate(request) for token in delta.token_ids]
        weights = self.weights[digest]
        assert got == expected[weights, prompt], f"{model} was {weights} ({digest}) and answered otherwise"
        self.seen.add((model, weights))

    async def run(self, expected: dict[tuple[str | None, int], list[int]]) -> None:
        numbers, one_at_a_time = iter(range(REQUESTS)), asyncio.Lock()

        async def work() -> None:
            for number in numbers:
                if number % (EVERY // 2) == 0:
                    async with one_at_a_time:
                        await asyncio.to_thread(self.promote if number % EVERY else self.republish)
                await self.ask(number, expected)

        async with asyncio.TaskGroup() as workers:
            for _ in range(IN_FLIGHT):
                workers.create_task(work())


@pytest.mark.parametrize(
    ("host_bytes", "kernels"),
    [(1 << 30, "off"), (0, "off"), (1 << 30, "auto")],
    ids=["much host memory", "none", "our kernels"],
)
def test_each_answer_is_of_the_digest_its_name_was_resolved_to(
    host_bytes: int,
    kernels: str,
    config: Config,
    directories: dict[str, Path],
    expected: dict[tuple[str | None, int], list[int]],
) -> None:
    generator = config.serving.generator.model_copy(update={"adapters_host_bytes": host_bytes, "kernels": kernels})
    serving = config.serving.model_copy(update={"generator": generator})
    storage = config.storage.model_copy(update={"url": f"{config.storage.url}-{host_bytes}-{kernels}"})
    load = Load(config.model_copy(update={"serving": serving, "storage": storage}), directories)
    try:
        asyncio.run(load.run(expected))
        stats: EngineStats = load.replica.stats()
    finally:
        load.replica.engine.stop()
    assert load.republished > 20
    assert load.promoted > 20
    base, name = config.base.served_name, config.name
    assert load.seen == {(base, None), *((model, weights) for model in (f"{base}:trade", name) for weights in WEIGHTS)}
    assert stats.cached_tokens > stats.prompt_tokens / 4, "the prefix cache was not hot"
    assert stats.adapter_loads >= load.republished, "each digest was loaded for itself"
    assert len(stats.resident) <= 2
    assert stats.running == stats.waiting == 0
