"""What a run is refused for before it starts: by the base's configuration alone, no weights are written here."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.config import Config
from cluster.errors import ConfigError, MetierError, Mismatch
from cluster.servable import check_servable

Make = Callable[..., Config]
SMALL = {
    "vocab_size": 259,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}


@pytest.fixture
def base(tmp_path: Path) -> Callable[..., Path]:
    """``base("qwen2", sliding_window=8)``: a directory that holds the configuration of a small model of that kind."""

    def write(kind: str, **settings: Any) -> Path:
        (tmp_path / "base").mkdir()
        (tmp_path / "base" / "config.json").write_text(json.dumps({"model_type": kind, **SMALL, **settings}))
        return tmp_path / "base"

    return write


def refused(config: Config, directory: Path, kind: type[MetierError]) -> str:
    with pytest.raises(kind) as caught:
        check_servable(config, directory)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_base_of_the_tests_passes_with_all_and_with_named_modules(make_config: Make, tiny_llama: Path) -> None:
    check_servable(make_config(), tiny_llama)
    check_servable(make_config("training.lora.target_modules=[q_proj, mlp.down_proj]"), tiny_llama)
    check_servable(make_config("training.lora.target_modules=[model.layers.0.self_attn.q_proj]"), tiny_llama)


def test_it_reads_no_weights(make_config: Make, tiny_llama: Path, tmp_path: Path) -> None:
    shutil.copyfile(tiny_llama / "config.json", tmp_path / "config.json")
    check_servable(make_config(), tmp_path)


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("q_porj", "tiny:llama has no module 'q_porj'; did you mean q_proj?"),
        ("c_attn", "its linear layers are down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"),
        ("_proj", "has no module '_proj'"),
        ("self_attn", r"'self_attn' is no linear layer (model.layers.0.self_attn is a LlamaAttention)"),
        ("lm_head", "'lm_head' is the base's embedding or output layer (lm_head), which is not adapted"),
        ("embed_tokens", "'embed_tokens' is the base's embedding or output layer (model.embed_tokens)"),
    ],
)
@pytest.mark.parametrize("publish", ["adapter", "model"])
def test_a_module_that_cannot_be_adapted_is_named(
    make_config: Make, tiny_llama: Path, target: str, said: str, publish: str
) -> None:
    config = make_config(f"training.lora.target_modules=[q_proj, {target}]", f"training.publish={publish}")
    assert said in refused(config, tiny_llama, ConfigError)


def test_full_tuning_has_no_modules_to_name(make_config: Make, tiny_llama: Path) -> None:
    settings = ("training.method=full", "training.publish=model", "training.lora.target_modules=[nothing]")
    check_servable(make_config(*settings), tiny_llama)


def test_more_context_than_the_base_has_is_refused_with_the_number(make_config: Make, tiny_llama: Path) -> None:
    said = refused(make_config("base.context_tokens=2049", "training.publish=model"), tiny_llama, ConfigError)
    assert said == (
        "base.context_tokens (2049) is more than the 2048 positions that tiny:llama was made for; "
        "set base.context_tokens=2048 or less"
    )


def test_a_stretched_context_counts_as_stretched(make_config: Make, base: Callable[..., Path]) -> None:
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096, "rope_theta": 10000.0}
    directory = base("qwen2", rope_parameters=rope)
    check_servable(make_config("base.context_tokens=16384"), directory)
    assert "16384 positions" in refused(make_config("base.context_tokens=16385"), directory, ConfigError)


@pytest.mark.parametrize(
    ("kind", "settings", "said"),
    [
        ("gemma3n_text", {"head_dim": 16, "num_kv_shared_layers": 1}, "shares keys and values between layers"),
        ("bloom", {}, "(bloom) computes its attention itself"),
        ("deepseek_v3", {"n_routed_experts": 4, "first_k_dense_replace": 2}, "keeps compressed keys and values"),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, "has layers of the kind conv"),
    ],
)
def test_a_base_that_the_engine_does_not_run_is_refused_for_adapters_only(
    make_config: Make, base: Callable[..., Path], kind: str, settings: dict[str, Any], said: str
) -> None:
    directory = base(kind, **settings)
    message = refused(make_config(), directory, Mismatch)
    assert said in message and "training.publish=model" in message
    check_servable(make_config("training.publish=model"), directory)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        *((kind, {}) for kind in ("qwen3", "mixtral", "phi3", "gemma", "granite", "smollm3", "olmo2", "starcoder2")),
        *((kind, {}) for kind in ("gpt_neox", "opt")),
        ("mistral", {"sliding_window": 64}),
        ("gemma2", {"attn_logit_softcapping": 50.0, "sliding_window": 64}),
        ("gemma3_text", {"sliding_window": 64}),
        ("gpt_oss", {"num_local_experts": 4, "sliding_window": 64}),
    ],
)
def test_common_kinds_pass(make_config: Make, base: Callable[..., Path], kind: str, settings: dict[str, Any]) -> None:
    check_servable(make_config(), base(kind, **{"head_dim": 16, "pad_token_id": 0, **settings}))


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
    "factor": 4.0,
    "original_max_position_embeddings": 1024,
}


@pytest.mark.parametrize(
    ("kind", "settings", "said"),
    [
        ("phimoe", {"sliding_window": 1024, "num_local_experts": 4}, "sliding_window"),
        (
            "phi3",
            {"rope_parameters": LONGROPE, "original_max_position_embeddings": 1024, "pad_token_id": 0},
            "longrope rotary positions",
        ),
        ("llama4_text", {"attention_chunk_size": 1024, "num_local_experts": 2}, "attention_chunk_size"),
    ],
)
def test_a_context_beyond_what_the_engine_runs_exactly_is_refused_with_the_number(
    make_config: Make, base: Callable[..., Path], kind: str, settings: dict[str, Any], said: str
) -> None:
    directory = base(kind, **settings)
    check_servable(
        make_config("base.context_tokens=1024", "prompt.passage_tokens=256", "training.max_tokens=512"), directory
    )
    message = refused(make_config(), directory, ConfigError)
    assert f"more than the 1024 tokens to which the native engine runs tiny:llama as it was trained ({said})" in message
    assert "set base.context_tokens=1024 or less" in message


def test_a_window_that_no_layer_uses_does_not_count(make_config: Make, base: Callable[..., Path]) -> None:
    check_servable(make_config(), base("qwen2", sliding_window=64, use_sliding_window=False))
