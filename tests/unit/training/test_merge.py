"""A merged model says what base and adapter say together, for every kind of LoRA that a run can train."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.adapter_files import tensors
from cluster.config import ModelConfig
from cluster.errors import BadInput, Mismatch
from cluster.models import identity, load_tokenizer, resolve
from training.merge import add_base_files, merge

IDS = torch.tensor([[5, 80, 99, 7, 200, 31, 64]])
KINDS: dict[str, dict[str, Any]] = {"plain": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}


def load(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def write(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``write(use_dora=True)``: a PEFT directory of a random adapter that changes what the model says."""
    from peft import LoraConfig, get_peft_model

    def write(**settings: Any) -> Path:
        config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", **settings)
        model = get_peft_model(load(tiny_llama), config)
        chance = torch.Generator().manual_seed(3)
        for name, parameter in model.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                parameter.data = torch.randn(parameter.shape, generator=chance) * 0.2
            elif "lora_magnitude" in name:
                parameter.data *= 1 + 0.3 * torch.rand(parameter.shape, generator=chance)
        directory = tmp_path_factory.mktemp("adapter")
        model.save_pretrained(directory)
        return directory

    return write


def says(model: Any) -> tuple[torch.Tensor, list[int]]:
    """Logits of the last position, and the greedy answer."""
    with torch.inference_mode():
        answer = model.generate(
            input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=16, do_sample=False, pad_token_id=2
        )
        return model(input_ids=IDS).logits[0, -1], answer[0, IDS.shape[1] :].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_the_merged_model_says_what_base_and_adapter_say(
    kind: str, write: Callable[..., Path], tiny_llama: Path, tmp_path: Path
) -> None:
    from peft import PeftModel

    directory = write(**KINDS[kind])
    logits, answer = says(PeftModel.from_pretrained(load(tiny_llama), directory).eval())
    merge(tiny_llama, directory, tmp_path / "out", "float32")
    merged_logits, merged_answer = says(load(tmp_path / "out"))
    torch.testing.assert_close(merged_logits, logits, rtol=1e-4, atol=1e-4)
    assert merged_answer == answer
    assert says(load(tiny_llama))[1] != answer, "the adapter changes nothing; this test would prove nothing"


def test_it_is_a_whole_model_of_the_asked_precision_with_the_files_of_its_base(
    write: Callable[..., Path], tiny_llama: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    merge(tiny_llama, write(), out, "bfloat16")
    assert resolve(ModelConfig(source=str(out)), tmp_path) == out
    assert {dtype for _, dtype in tensors(out / "model.safetensors").values()} == {"BF16"}
    assert identity(out) == identity(tiny_llama)
    assert load_tokenizer(out).chat_template == load_tokenizer(tiny_llama).chat_template
    assert sorted(file.name for file in out.iterdir()) == sorted(
        file.name for file in tiny_llama.iterdir() if not file.name.startswith(".")
    )


def test_an_adapter_of_another_base_is_refused(write: Callable[..., Path], tmp_path: Path) -> None:
    other = resolve(ModelConfig(source="tiny:gpt_neox"), tmp_path / "cache")
    with pytest.raises(Mismatch, match=r"which the base in .* does not have"):
        merge(other, write(), tmp_path / "out", "float32")
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_diverged_is_refused(write: Callable[..., Path], tiny_llama: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    directory = write()
    file = directory / "adapter_model.safetensors"
    save_file({name: tensor * float("nan") for name, tensor in load_file(file).items()}, file)
    with pytest.raises(BadInput, match="cannot be merged"):
        merge(tiny_llama, directory, tmp_path / "out", "float32")
    assert not (tmp_path / "out").exists()


def test_a_pickle_is_not_opened(write: Callable[..., Path], tiny_llama: Path, tmp_path: Path) -> None:
    directory = write()
    (directory / "adapter_model.safetensors").rename(directory / "adapter_model.bin")
    with pytest.raises(BadInput, match="is a pickle"):
        merge(tiny_llama, directory, tmp_path / "out", "float32")


def test_files_of_the_base_join_weights_but_replace_nothing(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("mine")
    add_base_files(tiny_llama, tmp_path)
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == ["chat_template.jinja", "config.json", "tokenizer.json", "tokenizer_config.json"]
    assert (tmp_path / "tokenizer.json").read_text() == "mine"
