"""Random PEFT adapters of the tiny llama, large enough to change what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.decoders import random_adapter

ADAPTERS: dict[str, dict[str, Any]] = {
    "a" * 64: {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "b" * 64: {"r": 2, "target_modules": "all-linear"},
    "c" * 64: {"r": 8, "target_modules": ["o_proj", "gate_proj"]},
}
"""Digest -> shape; they adapt different modules at different ranks."""


@pytest.fixture(scope="session")
def base_model(tiny_llama: Path) -> Any:
    """The tiny llama as transformers loads it; tests leave it as it is."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def adapters(base_model: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Digest -> directory of a PEFT adapter."""
    made = {}
    for number, (digest, shape) in enumerate(ADAPTERS.items()):
        made[digest] = tmp_path_factory.mktemp("adapters") / digest[:1]
        random_adapter(base_model, made[digest], seed=number, lora_alpha=2 * shape["r"], **shape)
    return made
