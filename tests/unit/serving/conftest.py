"""Random PEFT adapters of the tiny llama, large enough to change what it says."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

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
    """Digest -> directory of a PEFT adapter; neither side of it is zero."""
    import torch
    from peft import LoraConfig, get_peft_model

    made = {}
    for number, (digest, shape) in enumerate(ADAPTERS.items()):
        config = LoraConfig(lora_alpha=2 * shape["r"], task_type="CAUSAL_LM", **shape)
        model = get_peft_model(copy.deepcopy(base_model), config)
        chance = torch.Generator().manual_seed(number)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn(parameter.shape, generator=chance) * 0.2
        made[digest] = tmp_path_factory.mktemp("adapters") / digest[:1]
        model.save_pretrained(made[digest])
    return made
