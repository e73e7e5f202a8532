"""What is loaded for each method: what is trained, in which precision, and how much room the frozen base takes."""

from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.config import Config
from training import base

LINEAR = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def load(make_config: Any, tiny_llama: Path) -> Any:
    def made(*overrides: str) -> Any:
        config: Config = make_config("training.lora.rank=4", *overrides)
        return base.load(config, tiny_llama)

    return made


def trained(model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_lora_trains_its_matrices_in_the_precision_of_the_base(load: Any) -> None:
    model = load("base.dtype=bfloat16")
    assert trained(model) and all(".lora_" in name for name in trained(model))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not any("lm_head" in name for name in trained(model))


def test_full_trains_everything(load: Any) -> None:
    model = load("training.method=full", "training.publish=model")
    assert trained(model) == {name for name, _ in model.named_parameters()}


def test_qlora_holds_the_base_in_four_bits_in_elements_that_zero_3_can_shard(load: Any) -> None:
    plain, model = load("base.dtype=bfloat16"), load("base.dtype=bfloat16", "training.method=qlora")
    weight = model.get_base_model().get_submodule(LINEAR).base_layer.weight
    before = plain.get_base_model().get_submodule(LINEAR).base_layer.weight
    assert (weight.dtype, weight.quant_type) == (torch.bfloat16, "nf4")
    assert weight.numel() * 4 == before.numel(), "four values of four bits to an element of sixteen"
    assert weight.quant_state.nested, "the scales are quantized as well"
    assert all(".lora_" in name for name in trained(model))


def test_four_bits_compute_something_near_and_nf4_is_nearer(load: Any) -> None:
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        plain = load("base.dtype=float32")(input_ids=ids).logits
        four, fp4 = (
            load("base.dtype=float32", "training.method=qlora", f"training.quantization.type={kind}")(
                input_ids=ids
            ).logits
            for kind in ("nf4", "fp4")
        )
    error = [float((other - plain).norm() / plain.norm()) for other in (four, fp4)]
    assert 0 < error[0] < error[1] < 1, error  # NF4 is made for weights that are normally distributed, as these are


@pytest.mark.parametrize(
    ("variant", "extra"), [("plain", set()), ("rslora", set()), ("dora", {"lora_magnitude_vector"})]
)
def test_variants_are_those_of_peft(load: Any, variant: str, extra: set[str]) -> None:
    model = load(f"training.lora.variant={variant}", "training.publish=model")
    kinds = {part for name in trained(model) for part in name.split(".") if part.startswith("lora_")}
    assert kinds == {"lora_A", "lora_B"} | extra
    assert model.peft_config["default"].use_rslora == (variant == "rslora")
    scaling = model.get_base_model().get_submodule(LINEAR).scaling["default"]
    assert scaling == pytest.approx(32 / 2 if variant == "rslora" else 32 / 4)


def test_only_named_modules_are_adapted(load: Any) -> None:
    names = trained(load("training.lora.target_modules=[q_proj, v_proj]"))
    assert names and all(".q_proj." in name or ".v_proj." in name for name in names)
