"""Whether a directory is a plain PEFT LoRA adapter, and whether it fits a base: by headers, without torch.

This is the door for adapters trained elsewhere and the check of our own before they are published. Only safetensors
pass: a pickle is refused by its name. Only plain LoRA and rsLoRA pass, because that is what the generator applies; DoRA
passes where it is about to be merged.

Not covered: whether the weights are any good, and whether the base is the one they were trained on (shapes say no
more than that it could be).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.errors import BadInput, Mismatch, NotFound

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PEFT_FILES = (CONFIG_FILE, WEIGHTS_FILE)
"""What is published and fetched; whatever else lies beside them stays there."""

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
PLAIN: dict[str, Any] = {
    "lora_bias": False,
    "fan_in_fan_out": False,
    "bias": "none",
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "layer_replication": None,
    "trainable_token_indices": None,
    "target_parameters": None,
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "kasa_config": None,
    "use_bdlora": None,
    "use_qalora": False,
}
"""Settings of PEFT that change what the weights mean, and the value with which they do not."""
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Beginnings of ``init_lora_weights`` with which PEFT also changes the base, so that the adapter alone says little."""

HEADER_LIMIT = 100_000_000
"""Bytes; safetensors itself allows no longer header."""
TENSOR = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])\.(?:default\.)?weight")
MAGNITUDE = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_magnitude_vector(?:\.default)?(?:\.weight)?")


def check_adapter_files(
    directory: str | Path, base_directory: str | Path | None = None, *, merging: bool = False
) -> dict[str, Any]:
    """Check the adapter in `directory`; with `base_directory`, also against the shapes of that model's weights.

    Args:
        merging: let DoRA pass.

    Returns:
        The adapter's ``adapter_config.json``.

    Raises:
        NotFound: a file is missing.
        BadInput: a file is damaged, a pickle, or neither plain LoRA nor rsLoRA.
        Mismatch: a tensor has another shape than the adapter's rank or the base say.
    """
    directory = Path(directory)
    config = _config(directory, merging)
    shapes = {name: shape for name, (shape, _) in tensors(directory / WEIGHTS_FILE).items()}
    modules: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        if config.get("use_dora") and MAGNITUDE.fullmatch(name):
            continue
        match = TENSOR.fullmatch(name)
        if match is None or len(shape) != 2:
            raise BadInput(
                f"{directory / WEIGHTS_FILE}: {name} {shape} is not a LoRA matrix of a linear layer; train with plain LoRA"
            )
        modules.setdefault(match["module"], {})[match["side"]] = shape
    for module, sides in modules.items():
        if len(sides) != 2:
            raise BadInput(
                f"{directory / WEIGHTS_FILE}: {module} has lora_{next(iter(sides))} only; the file is not whole"
            )
        for side, rank in (("A", sides["A"][0]), ("B", sides["B"][1])):
            if rank != config["r"]:
                raise Mismatch(f"{module}.lora_{side} has shape {sides[side]}, but r is {config['r']} in {CONFIG_FILE}")
    if not modules:
        raise BadInput(f"{directory / WEIGHTS_FILE} holds no tensors")
    if base_directory is not None:
        _check_base(modules, Path(base_directory))
    return config


def tensors(file: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of every tensor in a safetensors `file`, from its header.

    Raises:
        NotFound, BadInput: no such file; not safetensors, or cut short.
    """
    try:
        with file.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            header = json.loads(handle.read(length)) if 0 < length <= HEADER_LIMIT else None
            size = handle.seek(0, 2)
        if not isinstance(header, dict):
            raise ValueError("no header")
        header.pop("__metadata__", None)
        found = {name: (tuple(entry["shape"]), str(entry["dtype"])) for name, entry in header.items()}
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except FileNotFoundError:
        raise NotFound(f"{file}: no such file") from None
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise BadInput(f"{file} is not a safetensors file ({error}); copy it again") from None
    if size != 8 + length + end:
        raise BadInput(f"{file} has {size} bytes, its header says {8 + length + end}; copy it again")
    return found


def _config(directory: Path, merging: bool) -> dict[str, Any]:
    for file in sorted(directory.glob("adapter_model.*")):
        if file.suffix in PICKLES:
            raise BadInput(
                f"{file} is a pickle, which can run code when it is read; save the adapter again where it was trained with "
                "save_pretrained, which writes safetensors, and remove this file"
            )
    file = directory / CONFIG_FILE
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NotFound(f"{directory} is not a PEFT adapter: it has no {CONFIG_FILE}") from None
    except ValueError as error:
        raise BadInput(f"{file} is not valid JSON: {error}") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise BadInput(f"{file}: peft_type is not LORA; metier serves LoRA adapters")
    rank, alpha, targets = config.get("r"), config.get("lora_alpha"), config.get("target_modules")
    if (
        not isinstance(rank, int)
        or rank < 1
        or not isinstance(alpha, (int, float))
        or not isinstance(targets, (list, str))
    ):
        raise BadInput(f"{file}: r, lora_alpha and target_modules must be a number, a number and a list of names")
    if config.get("use_dora") and not merging:
        raise BadInput(
            f"{file}: use_dora is True, and DoRA is not served as an adapter; merge it into its base where it was trained "
            "(PEFT's merge_and_unload; in a run of metier publish=model) and serve the merged model"
        )
    for key, plain in PLAIN.items():
        if (config.get(key, plain) or None) != (plain or None):
            raise BadInput(f"{file}: {key} is {config[key]!r}, which metier does not serve; train with {key}={plain!r}")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.startswith(CHANGES_BASE):
        raise BadInput(
            f"{file}: init_lora_weights is {init!r}, which also changes the base; convert the adapter where it was trained "
            "(save_pretrained with path_initial_model_for_weight_conversion)"
        )
    return config


def scale(config: Mapping[str, Any]) -> float:
    """What ``B A`` is multiplied by: alpha / r, with rsLoRA alpha / √r (Kalajdzievski, 2023).

    Args:
        config: ``adapter_config.json``, as :func:`check_adapter_files` returns it.
    """
    rank = config["r"]
    return float(config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank))


def weights(directory: Path) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of the model in `directory`, from the headers of all its shards."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        files = {directory / name for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
    else:
        files = set(directory.glob("*.safetensors"))
    return {name: shape for file in sorted(files) for name, (shape, _) in tensors(file).items()}


def _check_base(modules: dict[str, dict[str, tuple[int, ...]]], base: Path) -> None:
    shapes = weights(base)
    for module, sides in sorted(modules.items()):
        shape = shapes.get(f"{module}.weight")
        if shape is None:
            raise Mismatch(
                f"the adapter changes {module}, which the base in {base} does not have; use the base it was trained on"
            )
        wanted = {"A": (sides["A"][0], shape[-1]), "B": (shape[0], sides["B"][1])}
        for side in "AB":
            if sides[side] != wanted[side]:
                raise Mismatch(
                    f"{module}.lora_{side} has shape {sides[side]}, the base in {base} with its weight {shape} asks for "
                    f"{wanted[side]}; use the base it was trained on"
                )
