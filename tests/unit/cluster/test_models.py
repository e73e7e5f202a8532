"""tiny: models, local directories, identities and GGUF. Sources with a network behind them: tests/contract."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster.config import BaseModelConfig, ModelConfig
from cluster.errors import BadInput, ConfigError, NotFound
from cluster.materialize import MARKER
from cluster.models import base_ref, dequantize, identity, load_tokenizer, resolve


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def tiny(kind: str, cache: Path) -> Path:
    return resolve(ModelConfig(source=f"tiny:{kind}"), cache)


# -- which source it is


@pytest.mark.parametrize(
    "source", ["tiny:gpt9", "s3://bucket/model", "just-a-name", "pypi:--index-url==1", "hub:a/b/c", "hub:../x"]
)
def test_an_unknown_source_is_a_configuration_error_that_lists_the_kinds(source: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"org/name .* \./directory, pypi:PACKAGE==VERSION, .*tiny:llama"):
        resolve(ModelConfig(source=source), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_local_directory_is_used_in_place(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama", cache)
    assert resolve(ModelConfig(source=str(model)), tmp_path) == model
    monkeypatch.chdir(model.parent)
    assert resolve(ModelConfig(source=f"./{model.name}"), tmp_path) == model
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_is_no_model_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"it has no config\.json, no \*\.safetensors, no tokenizer\.json"):
        resolve(ModelConfig(source=str(tmp_path)), tmp_path / "cache")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(NotFound, match=r"it has no \*\.safetensors$"):
        resolve(ModelConfig(source=str(tmp_path)), tmp_path / "cache")


def test_a_lost_shard_is_missed(tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "model-1.safetensors"):
        (tmp_path / name).write_text("{}")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(NotFound, match=r"no model-2\.safetensors"):
        resolve(ModelConfig(source=str(tmp_path)), tmp_path / "cache")


# -- tiny models


def test_a_tiny_model_is_the_same_every_time(cache: Path, tmp_path: Path) -> None:
    first, second = tiny("llama", cache), tiny("llama", tmp_path)
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
    assert identity(first) == identity(second)
    assert json.loads((first / MARKER).read_text())["source"] == "tiny:llama"


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt_neox"])
def test_a_tiny_language_model_talks_chatml(kind: str, cache: Path) -> None:
    from transformers import AutoModelForCausalLM

    directory = tiny(kind, cache)
    tokenizer = load_tokenizer(directory)
    assert tokenizer.encode("<|im_end|>") == [tokenizer.eos_token_id]
    assert tokenizer.decode(tokenizer.encode("Grüße, 東京 🚚")) == "Grüße, 東京 🚚"
    messages = [{"role": "user", "content": "hi"}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert model.config.model_type == kind
    ids = tokenizer(text, return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=8, do_sample=False)
    assert out.shape[1] > ids["input_ids"].shape[1]


def test_a_tiny_embedder_is_a_sentence_transformer(cache: Path) -> None:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(tiny("bert", cache)), device="cpu")
    vectors = model.encode(["a trailer", "a trailer", "something else entirely"], normalize_embeddings=True)
    assert vectors.shape == (3, 32)
    assert model.max_seq_length == 256
    assert vectors[0] @ vectors[1] == pytest.approx(1.0, abs=1e-5)
    assert vectors[0] @ vectors[2] < 0.9999


# -- identity


def test_identity_sees_tokenizer_template_and_shape_apart(cache: Path, tmp_path: Path) -> None:
    import shutil

    before = identity(tiny("llama", cache))
    assert identity(tiny("qwen2", cache)).tokenizer == before.tokenizer
    assert identity(tiny("qwen2", cache)).architecture != before.architecture
    assert identity(tiny("bert", cache)).chat_template == ""
    other = shutil.copytree(tiny("llama", cache), tmp_path / "other")
    (other / "chat_template.jinja").write_text("{{ messages }}")
    after = identity(other)
    assert (after.tokenizer, after.architecture) == (before.tokenizer, before.architecture)
    assert after.chat_template != before.chat_template


def test_a_template_counts_the_same_in_either_file(cache: Path, tmp_path: Path) -> None:
    import shutil

    old_style = shutil.copytree(tiny("llama", cache), tmp_path / "old")
    template = (old_style / "chat_template.jinja").read_text()
    (old_style / "chat_template.jinja").unlink()
    settings = json.loads((old_style / "tokenizer_config.json").read_text())
    (old_style / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
    assert identity(old_style) == identity(tiny("llama", cache))


def test_base_ref_holds_the_identity(cache: Path) -> None:
    directory = tiny("llama", cache)
    ref = base_ref(BaseModelConfig(source="tiny:llama", dtype="float32"), directory)
    known = identity(directory)
    assert (ref.source, ref.dtype, ref.revision) == ("tiny:llama", "float32", None)
    assert (ref.tokenizer, ref.chat_template, ref.architecture) == (
        known.tokenizer,
        known.chat_template,
        known.architecture,
    )


def test_a_model_without_a_chat_template_is_refused(cache: Path) -> None:
    with pytest.raises(BadInput, match="has no chat template"):
        load_tokenizer(tiny("bert", cache))


# -- GGUF


def write_gguf(directory: Path, file: Path) -> None:
    """The model in `directory` as a GGUF file with 8-bit blocks, as llama.cpp's converter would write it."""
    import gguf
    import numpy as np
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    config: Any = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    tokens[-1] = "ab"  # The one merge that the format insists on.
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(tokenizer.chat_template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        array = tensor.numpy()
        n_heads = heads.get(name.split(".")[-2])
        if n_heads:  # llama.cpp rotates pairs of neighbours, transformers halves.
            array = array.reshape(n_heads, 2, array.shape[0] // n_heads // 2, -1).swapaxes(1, 2).reshape(array.shape)
        if array.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            array = gguf.quants.quantize(np.ascontiguousarray(array), kind)
            writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), array, raw_dtype=kind)
        else:
            writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_becomes_a_plain_model(cache: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    original = tiny("llama", cache)
    write_gguf(original, tmp_path / "tiny.gguf")
    out = tmp_path / "out"
    out.mkdir()
    dequantize(tmp_path / "tiny.gguf", out)

    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config
    assert (config["dtype"], config["tie_word_embeddings"]) == ("bfloat16", False)
    ours = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).state_dict()
    for name, tensor in AutoModelForCausalLM.from_pretrained(original).state_dict().items():
        assert (ours[name] - tensor).abs().max() < 0.02 * tensor.abs().max(), name

    tokenizer = load_tokenizer(out)
    assert tokenizer.chat_template == load_tokenizer(original).chat_template
    assert tokenizer.encode("<|im_end|>") == [tokenizer.eos_token_id]
    assert tokenizer.model_max_length == 2048
    pieces = [piece for piece, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("in\n\n2024")]
    assert pieces == ["in", "ĊĊ", "2", "0", "2", "4"]


AS_SECOND_RANK = """
import sys, torch.distributed
from torch.testing._internal.distributed.fake_pg import FakeStore
torch.distributed.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
from cluster.config import ModelConfig
from cluster.models import resolve
print(resolve(ModelConfig(source="tiny:llama"), sys.argv[1]))
"""


def test_a_worker_of_any_rank_makes_a_whole_model(tmp_path: Path) -> None:
    """The first worker of another node is not rank 0, and transformers lets only that one write."""
    made = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", AS_SECOND_RANK, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert made.returncode == 0, made.stderr
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        file.name for file in Path(made.stdout.splitlines()[-1]).iterdir()
    }
