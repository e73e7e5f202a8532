"""Which directories pass as a plain LoRA adapter, and against which base: files are written by hand, without torch."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from cluster.adapter_files import check_adapter_files, scale, tensors
from cluster.errors import BadInput, MetierError, Mismatch, NotFound

CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
PREFIX = "base_model.model.model.layers.0.self_attn.q_proj"
LORA = {f"{PREFIX}.lora_A.weight": (4, 64), f"{PREFIX}.lora_B.weight": (32, 4)}
BASE = {"model.layers.0.self_attn.q_proj.weight": (32, 64)}


def write_safetensors(file: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        size = 4
        for n in shape:
            size *= n
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    head = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(head)) + head + bytes(end))


def adapter(directory: Path, shapes: dict[str, tuple[int, ...]] = LORA, **config: Any) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    write_safetensors(directory / "adapter_model.safetensors", shapes)
    return directory


def base(directory: Path, shapes: dict[str, tuple[int, ...]] = BASE) -> Path:
    directory.mkdir()
    write_safetensors(directory / "model.safetensors", shapes)
    return directory


def test_a_plain_adapter_passes_and_its_configuration_is_returned(tmp_path: Path) -> None:
    config = check_adapter_files(adapter(tmp_path / "a"), base(tmp_path / "base"))
    assert (config["r"], config["lora_alpha"]) == (4, 8)


def test_headers_hold_shapes_and_types(tmp_path: Path) -> None:
    assert tensors(adapter(tmp_path) / "adapter_model.safetensors")[f"{PREFIX}.lora_A.weight"] == ((4, 64), "F32")


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt", "adapter_model.pkl"])
@pytest.mark.parametrize("alone", [True, False])
def test_a_pickle_is_refused_by_its_name(tmp_path: Path, name: str, alone: bool) -> None:
    directory = adapter(tmp_path)
    (directory / name).touch(mode=0o000)  # Nobody may read it, and nobody has to.
    if alone:
        (directory / "adapter_model.safetensors").unlink()
    with pytest.raises(BadInput, match=f"{name} is a pickle.*save_pretrained"):
        check_adapter_files(directory)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("bias", "all"),
        ("modules_to_save", ["lm_head"]),
        ("rank_pattern", {"q": 2}),
        ("target_parameters", ["experts.up"]),
        ("alora_invocation_tokens", [1, 2]),
    ],
)
def test_what_is_more_than_plain_lora_is_refused_by_setting(tmp_path: Path, setting: str, value: Any) -> None:
    with pytest.raises(BadInput, match=f"{setting} is .* does not serve"):
        check_adapter_files(adapter(tmp_path, **{setting: value}))


def test_dora_is_refused_with_the_way_out_and_passes_where_it_is_merged(tmp_path: Path) -> None:
    directory = adapter(tmp_path / "a", LORA | {f"{PREFIX}.lora_magnitude_vector": (32,)}, use_dora=True)
    with pytest.raises(BadInput, match=r"DoRA is not served as an adapter; merge it into its base .*publish=model"):
        check_adapter_files(directory)
    assert check_adapter_files(directory, base(tmp_path / "base"), merging=True)["r"] == 4
    with pytest.raises(BadInput, match="lora_magnitude_vector"):
        check_adapter_files(adapter(tmp_path / "a", LORA | {f"{PREFIX}.lora_magnitude_vector": (32,)}))


def test_rslora_passes_and_scales_by_the_root_of_the_rank(tmp_path: Path) -> None:
    assert scale(check_adapter_files(adapter(tmp_path))) == 2
    assert scale(check_adapter_files(adapter(tmp_path, use_rslora=True))) == 4


@pytest.mark.parametrize("init", ["pissa_niter_16", "olora", "loftq"])
def test_an_adapter_that_comes_with_a_changed_base_is_refused(tmp_path: Path, init: str) -> None:
    with pytest.raises(BadInput, match=f"init_lora_weights is '{init}', which also changes the base"):
        check_adapter_files(adapter(tmp_path, init_lora_weights=init))
    assert check_adapter_files(adapter(tmp_path, init_lora_weights="gaussian"))


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("{", BadInput),
        ("[]", BadInput),
        ('{"peft_type": "IA3"}', BadInput),
        ('{"peft_type": "LORA"}', BadInput),
        (None, NotFound),
    ],
)
def test_a_bad_configuration_is_one_sentence(tmp_path: Path, text: str | None, kind: type[MetierError]) -> None:
    file = adapter(tmp_path) / "adapter_config.json"
    file.unlink()
    if text is not None:
        file.write_text(text)
    with pytest.raises(kind, match=r"adapter_config\.json") as caught:
        check_adapter_files(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_a_file_cut_short_is_refused(tmp_path: Path, size: int) -> None:
    file = adapter(tmp_path) / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(BadInput, match="copy it again"):
        check_adapter_files(tmp_path)


def test_missing_weights_are_not_found(tmp_path: Path) -> None:
    (adapter(tmp_path) / "adapter_model.safetensors").unlink()
    with pytest.raises(NotFound, match=r"adapter_model\.safetensors"):
        check_adapter_files(tmp_path)


def test_a_tensor_that_is_not_lora_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"lm_head\.weight"):
        check_adapter_files(adapter(tmp_path, LORA | {"base_model.model.lm_head.weight": (10, 64)}))


def test_half_a_pair_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="has lora_A only"):
        check_adapter_files(adapter(tmp_path, {f"{PREFIX}.lora_A.weight": (4, 64)}))


def test_the_rank_of_the_tensors_must_be_that_of_the_configuration(tmp_path: Path) -> None:
    with pytest.raises(Mismatch, match=r"q_proj\.lora_A has shape \(4, 64\), but r is 8"):
        check_adapter_files(adapter(tmp_path, r=8))


def test_another_base_is_noticed_by_tensor_and_both_shapes(tmp_path: Path) -> None:
    directory = adapter(tmp_path / "a")
    wider = base(tmp_path / "wider", {"model.layers.0.self_attn.q_proj.weight": (32, 128)})
    with pytest.raises(Mismatch, match=r"q_proj\.lora_A has shape \(4, 64\).*\(4, 128\)"):
        check_adapter_files(directory, wider)
    with pytest.raises(Mismatch, match=r"changes model\.layers\.0\.self_attn\.q_proj.*does not have"):
        check_adapter_files(directory, base(tmp_path / "other", {"h.0.attn.weight": (32, 64)}))


def test_a_base_in_shards_is_read_through_its_index(tmp_path: Path) -> None:
    shards = tmp_path / "base"
    shards.mkdir()
    write_safetensors(shards / "model-1.safetensors", BASE)
    index = {"weight_map": dict.fromkeys(BASE, "model-1.safetensors")}
    (shards / "model.safetensors.index.json").write_text(json.dumps(index))
    check_adapter_files(adapter(tmp_path / "a"), shards)
