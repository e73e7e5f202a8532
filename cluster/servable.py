"""Whether what a run is going to make could be served, from the base's ``config.json`` and the shape of its modules.

The model is built without weights, so this takes a moment whatever its size. docs/decisions/0011-what-serving-accepts.md
says where each rule comes from. What the settings alone decide is refused where they are loaded
(:mod:`cluster.config`): rank, DoRA as an adapter, rows longer than the context.

Not covered: whether what is served is any good.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from cluster.config import Config
from cluster.errors import ConfigError, Mismatch

ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}
"""Kinds of layers that keep keys and values; the native engine holds a cache for no other."""
UNTOLD = {"doge", "phimoe", "qwen2_moe"}
"""Kinds of models whose layers do not tell the attention function of their sliding window, as the others do."""
DYNAMIC = ("dynamic", "longrope")
"""Rotary positions that turn with the longest sequence of a pass, so that sequences of one pass would change each other."""


def check_servable(config: Config, base_directory: Path) -> None:
    """Refuse a run whose result could not be served; silent if it can.

    With ``training.publish=model`` only what training itself needs is asked: modules that are there, and a context
    the base has.

    Raises:
        ConfigError: a setting names modules the base does not have, or a longer context.
        Mismatch: the native engine does not run this kind of base.
    """
    known = json.loads((base_directory / "config.json").read_text(encoding="utf-8"))
    model = skeleton(base_directory, config.base.trust_remote_code)
    settings = model.config.get_text_config()
    _check_context(config, known.get("text_config", known))
    if config.training.method != "full":
        _check_targets(config, model)
    if config.training.publish == "adapter":
        _check_engine(config, model, settings)


def skeleton(base_directory: Path, trust_remote_code: bool = False) -> Any:
    """The transformers model in `base_directory` with all its modules and none of its weights (on torch's meta device)."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = AutoConfig.from_pretrained(base_directory, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(settings, trust_remote_code=trust_remote_code)


def _check_context(config: Config, known: dict[str, Any]) -> None:
    most = known.get("max_position_embeddings", known.get("n_positions"))
    if most is None:
        return
    rope = known.get("rope_parameters") or known.get("rope_scaling") or {}
    if rope.get("factor") and rope.get("original_max_position_embeddings"):
        most = max(most, int(rope["factor"] * rope["original_max_position_embeddings"]))
    if config.base.context_tokens > most:
        raise ConfigError(
            f"base.context_tokens ({config.base.context_tokens}) is more than the {most} positions that "
            f"{config.base.source} was made for; set base.context_tokens={most} or less",
            param="base.context_tokens",
        )


def _check_targets(config: Config, model: Any) -> None:
    """Each name must match a linear layer, by PEFT's rule: the whole path of a module, or its last parts."""
    import torch

    targets = config.training.lora.target_modules
    modules = {name: module for name, module in model.named_modules() if name}
    outer = {model.get_input_embeddings(), model.get_output_embeddings()} - {None}
    linear = {name for name, module in modules.items() if isinstance(module, torch.nn.Linear) and module not in outer}
    if not linear:
        raise Mismatch(f"{config.base.source} has no linear layers, which LoRA needs; choose another base")
    for target in () if isinstance(targets, str) else targets:
        found = [name for name in modules if name == target or name.endswith(f".{target}")]
        if not found:
            raise ConfigError(
                f"training.lora.target_modules: {config.base.source} has no module '{target}'; {_hint(target, linear)}",
                param="training.lora.target_modules",
            )
        for name in found:
            if modules[name] in outer:
                raise ConfigError(
                    f"training.lora.target_modules: '{target}' is the base's embedding or output layer ({name}), which is "
                    "not adapted; name linear layers of its blocks, or all-linear",
                    param="training.lora.target_modules",
                )
            if name not in linear:
                raise ConfigError(
                    f"training.lora.target_modules: '{target}' is no linear layer ({name} is a "
                    f"{type(modules[name]).__name__}); {_hint(target, linear)}",
                    param="training.lora.target_modules",
                )


def _hint(target: str, linear: Iterable[str]) -> str:
    names = sorted({name.rpartition(".")[2] for name in linear})
    near = difflib.get_close_matches(target, names, n=1)
    return f"did you mean {near[0]}?" if near else f"its linear layers are {', '.join(names)}"


def _check_engine(config: Config, model: Any, settings: Any) -> None:
    what = _unserved(model, settings)
    if what:
        raise Mismatch(
            f"{config.base.source} ({model.config.model_type}) {what}, which the native engine does not run, so its "
            "adapters could not be served; choose another base, or set training.publish=model and serve it elsewhere",
            param="base.source",
        )
    for most, key in _reaches(model, settings):
        if config.base.context_tokens > most:
            raise ConfigError(
                f"base.context_tokens ({config.base.context_tokens}) is more than the {most} tokens to which the native "
                f"engine runs {config.base.source} as it was trained ({key}); set base.context_tokens={most} or less",
                param="base.context_tokens",
            )


def _reaches(model: Any, settings: Any) -> Iterator[tuple[int, str]]:
    """Lengths up to which layers that the native engine takes for ordinary ones are ordinary, and the settings that say so."""
    kinds = set(getattr(settings, "layer_types", None) or ["sliding_attention"])
    windows = {"attention_chunk_size"} | ({"sliding_window"} if settings.model_type in UNTOLD else set())
    for key in sorted(windows):
        if getattr(settings, key, None) and kinds != {"full_attention"}:
            yield getattr(settings, key), key
    rope = getattr(settings, "rope_parameters", None) or {}
    for about in rope.values() if all(isinstance(value, dict) for value in rope.values()) else [rope]:
        if about.get("rope_type") in DYNAMIC:
            most = about.get("original_max_position_embeddings") or settings.max_position_embeddings
            yield most, f"{about['rope_type']} rotary positions"


def _unserved(model: Any, settings: Any) -> str:
    """What keeps the native engine from running this model; empty if nothing does."""
    other = set(getattr(settings, "layer_types", None) or ()) - ATTENTION
    if other:
        return f"has layers of the kind {', '.join(sorted(other))}"
    if getattr(settings, "kv_lora_rank", None):
        return "keeps compressed keys and values (multi-head latent attention)"
    if not getattr(model, "_supports_attention_backend", False):
        return "computes its attention itself"
    if getattr(model, "_is_stateful", False):
        return "keeps a state that is not made of keys and values"
    if getattr(settings, "num_kv_shared_layers", 0):
        return "shares keys and values between layers"
    return ""
