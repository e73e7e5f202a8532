"""One suite over all engines; :mod:`tests.contract.engine_cases` holds it.

vLLM runs it in an environment of its own, in ``test_vllm_engine``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.config import Config
from tests.contract.engine_cases import CASES, Case, Subject
from tests.decoders import random_adapter

PROMPTS = tuple(tuple((7 * n + 31 * k) % 250 + 3 for k in range(12 + 9 * n)) for n in range(6))
SHAPES: dict[str, dict[str, Any]] = {
    "a" * 64: {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "b" * 64: {"r": 2, "target_modules": "all-linear"},
    "c" * 64: {"r": 8, "target_modules": ["o_proj", "gate_proj"], "use_rslora": True},
}
"""Digest -> shape; they adapt different modules at different ranks. The last one is told to engines by a case."""
CONTEXT = 128
SMALL = (
    f"base.context_tokens={CONTEXT}",
    "training.max_tokens=64",
    "prompt.passage_tokens=32",
    "serving.max_tokens=64",
)
"""Hardly any cache holds one such context."""
Expected = Callable[[tuple[int, ...], str | None, int], list[int]]


@pytest.fixture(scope="module")
def models(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Path], dict[str | None, Any]]:
    """Directories of the adapters, and the model that transformers and PEFT make of each (``None``: of none)."""
    import torch
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    base.generation_config.eos_token_id = None  # the cases ignore ends of turns
    directories: dict[str, Path] = {}
    alone: dict[str | None, Any] = {None: base}
    for number, (digest, shape) in enumerate(SHAPES.items()):
        directories[digest] = tmp_path_factory.mktemp("adapters") / digest[:1]
        alone[digest] = random_adapter(base, directories[digest], seed=number, lora_alpha=2 * shape["r"], **shape)
    return directories, alone


@pytest.fixture(scope="module")
def expected(models: Any) -> Expected:
    """Greedy ids of transformers' ``generate``."""
    import torch

    def generate(prompt: tuple[int, ...], adapter: str | None, tokens: int) -> list[int]:
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            out = models[1][adapter].generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                do_sample=False,
                pad_token_id=2,
            )
        answer: list[int] = out[0, len(prompt) :].tolist()
        return answer

    return generate


def cache_bytes(model: Path, tokens: int, page_tokens: int) -> int:
    """What a cache of so many tokens takes in float32."""
    import torch
    from transformers import AutoConfig

    from serving.engine.native.cache import page_bytes

    return tokens // page_tokens * page_bytes(AutoConfig.from_pretrained(model), page_tokens, torch.float32)


@pytest.fixture(params=["echo", "native", "native with modules", "native with hardly any cache"])
def subject(
    request: pytest.FixtureRequest,
    make_config: Callable[..., Config],
    tiny_llama: Path,
    models: Any,
    expected: Expected,
) -> Iterator[Subject]:
    directories: dict[str, Path] = models[0]
    *told, spare = directories
    if request.param == "echo":
        from serving.engine.echo import EchoEngine

        config = make_config(*SMALL, "serving.generator.engine=echo")
        engine: Any = EchoEngine(config)

        def says(prompt: tuple[int, ...], adapter: str | None, tokens: int) -> list[int]:
            return list(prompt[-tokens:])
    else:
        from serving.engine.native.engine import NativeEngine

        settings = ["threads=1", "adapters_resident=2", "batch_size=8", "prefill_tokens=32", "page_tokens=4"]
        if request.param == "native with modules":
            settings.append("kernels='off'")
        if request.param == "native with hardly any cache":
            settings.append(f"cache_bytes={cache_bytes(tiny_llama, CONTEXT, page_tokens=4)}")
        overrides = [f"serving.generator.{setting}" for setting in settings]
        config, says = make_config(*SMALL, *overrides), expected
        engine = NativeEngine(config, tiny_llama)
    engine.start()
    for digest in told:
        engine.add_adapter(digest, directories[digest])
    yield Subject(
        engine,
        PROMPTS,
        {digest: directories[digest] for digest in told},
        (spare, directories[spare]),
        says,
        config.base.context_tokens,
        samples=request.param != "echo",
    )
    engine.stop()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_engine(case: Case, subject: Subject) -> None:
    asyncio.run(case(subject))
