"""vLLM's rules on adapter files, as far as files show them; vLLM itself does not run here."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import BadInput
from cluster.vllm_files import vllm_max_lora_rank

MODULE = "base_model.model.model.layers.0.self_attn.q_proj"


def adapter(directory: Path, rank: int = 4, name: str = f"{MODULE}.lora_{{}}.weight", **config: Any) -> Path:
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": ["q_proj"]} | config
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    size = 4 * 8 * rank
    entries = {
        name.format("A"): {"dtype": "F32", "shape": [rank, 8], "data_offsets": [0, size]},
        name.format("B"): {"dtype": "F32", "shape": [8, rank], "data_offsets": [size, 2 * size]},
    }
    head = json.dumps(entries).encode()
    (directory / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + bytes(2 * size))
    return directory


@pytest.mark.parametrize(("rank", "most"), [(1, 8), (8, 8), (9, 16), (64, 64), (257, 320), (512, 512)])
def test_the_least_rank_that_holds_the_adapter(tmp_path: Path, rank: int, most: int) -> None:
    assert vllm_max_lora_rank(adapter(tmp_path, rank)) == most


def test_rslora_is_known_there_as_here(tmp_path: Path) -> None:
    assert vllm_max_lora_rank(adapter(tmp_path, use_rslora=True)) == 8


def test_a_rank_beyond_its_largest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="rank 513 is more than vLLM's largest, 512"):
        vllm_max_lora_rank(adapter(tmp_path, 513))


@pytest.mark.parametrize(
    "name",
    ["model.layers.0.self_attn.q_proj.lora_{}.weight", f"{MODULE}.lora_{{}}.default.weight"],
    ids=["no prefix", "with adapter name"],
)
def test_names_that_only_metier_reads_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(BadInput, match=r"vLLM does not know .*lora_A.* save it again"):
        vllm_max_lora_rank(adapter(tmp_path, name=name))


@pytest.mark.parametrize("module", ["lm_head", "model.embed_tokens"])
def test_layers_outside_the_blocks_are_refused(tmp_path: Path, module: str) -> None:
    with pytest.raises(BadInput, match=f"does not take LoRA on {module}"):
        vllm_max_lora_rank(adapter(tmp_path, name=f"base_model.model.{module}.lora_{{}}.weight"))


@pytest.mark.parametrize(
    ("setting", "value"), [("use_dora", True), ("modules_to_save", ["lm_head"]), ("bias", "all"), ("lora_bias", True)]
)
def test_settings_it_refuses_or_ignores_are_refused(tmp_path: Path, setting: str, value: Any) -> None:
    with pytest.raises(BadInput, match=setting):
        vllm_max_lora_rank(adapter(tmp_path, **{setting: value}))
