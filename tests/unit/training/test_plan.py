"""The plan against what it plans: parameters, adapters, four-bit weights and activations of real (small) models."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.config import Config
from cluster.errors import BadInput, NotFound
from training.model_shape import Linear, Shape, find, names, shape_of
from training.plan import (
    Settings,
    advice,
    estimate,
    explain_out_of_memory,
    fewest_gpus,
    four_bit_bytes,
    kept_activations,
    of,
    settings_of,
    usable,
)

Make = Callable[..., Config]
SMALL: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 32},
    "gpt_neox": {},
}
WIDTHS = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 4}


def small(kind: str, layers: int = 2) -> dict[str, Any]:
    """A ``config.json`` of a small model."""
    return {
        "model_type": kind,
        **WIDTHS,
        **SMALL[kind],
        "num_hidden_layers": layers,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


@pytest.fixture(scope="module")
def llama_8b() -> Shape:
    return shape_of(find("llama-3.1-8b", "nowhere"))


@pytest.fixture(scope="module")
def llama_70b() -> Shape:
    return shape_of(find("llama-3.1-70b", "nowhere"))


# -- shapes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("smollm2-135m", 134_515_008),
        ("llama-3.1-8b", 8_030_261_248),
        ("qwen2.5-7b", 7_615_616_512),
        ("mixtral-8x7b", 46_702_792_704),
    ],
)
def test_known_models_have_their_published_number_of_parameters(name: str, parameters: int) -> None:
    assert shape_of(find(name, "nowhere")).parameters == parameters


def test_every_shape_that_comes_with_metier_says_a_model_type_and_nothing_but_numbers() -> None:
    assert "llama-3.1-70b" in names()
    for name in names():
        assert not [value for value in find(name, "nowhere").values() if isinstance(value, (list, dict))]


def test_a_shape_tells_gated_from_plain_tied_from_untied_and_norms_of_queries() -> None:
    llama, neox, qwen = (shape_of(small(kind)) for kind in ("llama", "gpt_neox", "qwen3"))
    assert (llama.gated, neox.gated) == (True, False)
    assert (llama.upcast_norms, neox.upcast_norms) == (True, False)
    assert llama.norms == 2 * 64
    assert qwen.norms == 2 * 64 + 4 * 32 + 2 * 32
    assert shape_of({**small("llama"), "tie_word_embeddings": True}).tied
    assert not llama.tied


def test_target_modules_match_as_in_peft_and_an_unknown_one_is_named() -> None:
    shape = shape_of(small("llama"))
    assert {linear.path for linear in shape.adapted(("q_proj", "mlp.up_proj"))} == {
        "model.layers.*.self_attn.q_proj",
        "model.layers.*.mlp.up_proj",
    }
    with pytest.raises(BadInput, match="no linear layer 'query'; it has down_proj, gate_proj"):
        shape.adapted(("query",))


def test_find_reads_a_file_a_directory_and_a_tiny_model(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(small("llama")))
    assert find(str(file), tmp_path) == find(str(tmp_path), tmp_path) == small("llama")
    assert find("tiny:llama", tmp_path / "models")["model_type"] == "llama"


def test_what_is_no_model_is_refused_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"'llama-9' is no shape that metier knows.*give the path of a config\.json"):
        find("llama-9", tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BadInput, match="it has no model_type"):
        find(str(tmp_path), tmp_path)
    with pytest.raises(BadInput, match="of type 'no-such'"):
        shape_of({"model_type": "no-such"})


# -- against real models -----------------------------------------------------------------------------------------


def model_of(config: Config, config_json: dict[str, Any]) -> Any:
    """A random model of `config_json` as a CPU worker would hold it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from training.base import with_lora

    dtype = getattr(torch, config.base.dtype)
    known = AutoConfig.for_model(**config_json)
    model = AutoModelForCausalLM.from_config(known, attn_implementation="eager").to(dtype)
    return model if config.training.method == "full" else with_lora(config, model)


@pytest.mark.parametrize("target_modules", ["all-linear", "[q_proj,down_proj]"])
def test_adapters_are_counted_as_peft_makes_them(make_config: Make, target_modules: str) -> None:
    config = make_config("training.lora.rank=4", f"training.lora.target_modules={target_modules}")
    model = model_of(config, small("llama"))
    made = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert of(config, shape_of(small("llama"))).adapters == 4 * made


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("kind", sorted(SMALL))
def test_activations_are_what_autograd_keeps(make_config: Make, kind: str, method: str, dtype: str) -> None:
    import torch

    publish = "model" if method == "full" else "adapter"
    config = make_config(
        f"base.dtype={dtype}",
        f"training.method={method}",
        f"training.publish={publish}",
        "training.batch_size=2",
        "training.max_tokens=96",
    )
    kept = []
    for layers in (2, 3):  # the difference is one layer, whatever stands around the layers
        model = model_of(config, small(kind, layers)).train()
        weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        found: dict[int, tuple[int, torch.Tensor]] = {}

        def keep(tensor: torch.Tensor, found: Any = found, weights: Any = weights) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                found[storage.data_ptr()] = (storage.nbytes(), tensor)
            return tensor

        ids = torch.zeros(2, 96, dtype=torch.long)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        kept.append(sum(size for size, _ in found.values()))
    planned = [kept_activations(shape_of(small(kind, layers)), settings_of(config)) for layers in (2, 3)]
    assert planned[1] - planned[0] == pytest.approx(kept[1] - kept[0], rel=0.06)


@pytest.mark.parametrize("double", [True, False])
def test_four_bit_weights_take_what_bitsandbytes_makes(double: bool) -> None:
    import torch
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(torch.randn(192, 640), compress_statistics=double, quant_type="nf4")
    scales = [state.absmax, state.state2.absmax] if double else [state.absmax]
    assert four_bit_bytes(192 * 640, double) == packed.nbytes + sum(scale.nbytes for scale in scales)


# -- ZeRO --------------------------------------------------------------------------------------------------------


def test_each_stage_shards_one_thing_more(llama_8b: Shape) -> None:
    plans = [estimate(llama_8b, Settings(method="full", zero_stage=stage, workers=8)) for stage in (0, 1, 2, 3)]
    parameters = llama_8b.parameters
    assert [plan.optimizer for plan in plans] == [12 * parameters] + 3 * [12 * parameters // 8]
    assert [plan.gradients for plan in plans] == 2 * [2 * parameters] + 2 * [2 * parameters // 8]
    assert [plan.weights for plan in plans] == 3 * [2 * parameters] + [2 * parameters // 8]


def test_over_fp32_weights_only_zero_1_and_2_keep_a_second_copy(llama_8b: Shape) -> None:
    full = Settings(method="full", dtype_bytes=4)
    states = [estimate(llama_8b, replace(full, zero_stage=stage)).optimizer for stage in (0, 1, 2, 3)]
    assert [count / llama_8b.parameters for count in states] == [8, 12, 12, 8]


def test_lora_trains_little_and_qlora_quarters_the_linear_layers(llama_8b: Shape) -> None:
    full, lora, qlora = (estimate(llama_8b, Settings(method=method)) for method in ("full", "lora", "qlora"))
    assert lora.weights == full.weights
    assert lora.optimizer < full.optimizer / 100
    quantized = sum(linear.parameters for linear in llama_8b.linears)
    assert qlora.weights == pytest.approx(2 * (llama_8b.parameters - quantized) + quantized * 4.127 / 8, rel=1e-4)


def test_experts_are_not_quantized_and_not_adapted() -> None:
    shape = shape_of(find("mixtral-8x7b", "nowhere"))
    lora, qlora = (estimate(shape, Settings(method=method)) for method in ("lora", "qlora"))
    assert (shape.experts, shape.active_experts) == (8, 2)
    assert qlora.weights > 0.95 * lora.weights


def test_offload_moves_to_the_node_what_leaves_the_gpu(llama_8b: Shape) -> None:
    on = estimate(llama_8b, Settings(method="full", zero_stage=3, workers=4))
    off = estimate(
        llama_8b, Settings(method="full", zero_stage=3, workers=4, offload_optimizer=True, offload_parameters=True)
    )
    assert (off.weights, off.optimizer, off.gradients) == (0, 0, 0)
    assert off.host > on.weights + on.optimizer
    assert on.host == 0
    assert off.total < on.total


def test_checkpointing_keeps_one_hidden_state_a_layer(llama_8b: Shape) -> None:
    settings = Settings(batch_size=2, tokens=100)
    per_token = 2 * llama_8b.hidden * llama_8b.layers + 4 * llama_8b.hidden
    assert kept_activations(llama_8b, settings) == 200 * per_token
    assert kept_activations(llama_8b, replace(settings, gradient_checkpointing=False)) > 10 * 200 * per_token


def test_logits_dominate_on_the_cpu_and_are_one_tile_on_gpus(llama_8b: Shape) -> None:
    settings = Settings(batch_size=4, tokens=2048)
    assert estimate(llama_8b, replace(settings, on_gpu=False)).logits == 12 * 4 * 2048 * 128256
    assert estimate(llama_8b, settings).logits < 2**30


@given(
    method=st.sampled_from(("full", "lora", "qlora")),
    stage=st.integers(0, 3),
    workers=st.integers(1, 64),
    on_gpu=st.booleans(),
    checkpointing=st.booleans(),
    batch=st.integers(1, 8),
)
def test_no_more_workers_shorter_rows_or_checkpoints_ever_take_more(
    method: Any, stage: int, workers: int, on_gpu: bool, checkpointing: bool, batch: int
) -> None:
    shape = Shape(10_000_000, (Linear("up", 256, 1024, 8),), 4, 256, 1024, True, 4, 2, 64, 8000, True, 512, True)
    settings = Settings(
        method=method,
        zero_stage=stage,
        workers=workers,
        on_gpu=on_gpu,
        gradient_checkpointing=checkpointing,
        batch_size=batch,
    )
    now = estimate(shape, settings)
    assert estimate(shape, replace(settings, workers=workers + 1)).total <= now.total
    assert estimate(shape, replace(settings, tokens=settings.tokens // 2)).total <= now.total
    assert estimate(shape, replace(settings, batch_size=batch + 1)).total >= now.total
    assert now.total <= sum((now.weights, now.adapters, now.gradients, now.optimizer, now.activations)) + sum(
        (now.logits, now.step, now.buffers, now.host, 2 * shape.embedding)
    )


# -- what fits ---------------------------------------------------------------------------------------------------


def test_the_fewest_80_gb_gpus_for_70b(llama_70b: Shape) -> None:
    capacity = usable(80)
    count = {
        method: fewest_gpus(llama_70b, Settings(method=method, zero_stage=3), capacity)
        for method in ("full", "lora", "qlora")
    }
    assert count["lora"] == 3
    assert count["qlora"] == 1
    assert count["full"] is not None and 15 <= count["full"] <= 24
    for method, number in count.items():
        assert number is not None
        fewer = Settings(method=method, zero_stage=3, workers=number - 1)  # type: ignore[arg-type]
        assert number == 1 or estimate(llama_70b, fewer).total > capacity


def test_without_sharded_weights_more_gpus_do_not_help(llama_70b: Shape) -> None:
    assert fewest_gpus(llama_70b, Settings(zero_stage=2), usable(80)) is None


def test_a_vendors_gigabyte_is_ten_to_the_ninth() -> None:
    assert usable(80, margin=0) == 80_000_000_000
    assert usable(80) == 76_000_000_000


def test_advice_is_cheapest_first_and_each_line_fits(llama_8b: Shape) -> None:
    settings = Settings(zero_stage=2, workers=2, batch_size=8, tokens=2048, gradient_checkpointing=False)
    lines = advice(llama_8b, settings, usable(40))
    assert lines[0].startswith("training.gradient_checkpointing=true: ")
    assert lines[1].startswith("training.batch_size=")
    assert all(float(line.rpartition(": ")[2].removesuffix(" GiB")) <= usable(40) / 2**30 for line in lines)
    assert advice(llama_8b, settings, usable(1000)) == []


def test_advice_adds_changes_up_when_none_is_enough(llama_8b: Shape) -> None:
    settings = Settings(zero_stage=0, workers=1, batch_size=16, tokens=4096, gradient_checkpointing=False)
    first, *_ = advice(llama_8b, settings, usable(24))
    assert first.startswith("training.gradient_checkpointing=true and training.batch_size=")


def test_advice_ends_with_the_number_of_gpus(llama_70b: Shape) -> None:
    last = advice(llama_70b, Settings(method="full", workers=8), usable(80))[-1]
    assert last.startswith("training.workers=")
    assert "training.deepspeed.zero_stage=3" in last


def test_a_run_out_of_memory_is_explained_with_numbers_and_a_setting(make_config: Make, llama_8b: Shape) -> None:
    config = make_config("base.dtype=bfloat16", "training.gpus_per_worker=1", "training.gradient_checkpointing=false")
    said = explain_out_of_memory(config, llama_8b)
    assert said.startswith("by plan each takes ")
    assert "GiB with 4 × 768 tokens (activations " in said or "(weights and adapters 15.0" in said
    assert "Set training.gradient_checkpointing=true, which takes " in said


def test_on_the_cpu_nothing_is_offloaded(make_config: Make, llama_8b: Shape) -> None:
    said = explain_out_of_memory(make_config("training.batch_size=1"), llama_8b)
    assert "offload" not in said
    assert "training.gradient_checkpointing=true" in said
