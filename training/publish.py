"""What a run ends in: an adapter or a whole model with its card in the registry.

The card says what decided the weights (base, rows, documents, prompt, method) and, besides, how it went. Settings are
kept without secrets and without the directories of this machine.
"""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePath
from typing import Any

from cluster.adapter_files import check_adapter_files
from cluster.config import HUB, Config, public_dict
from cluster.registry import AdapterVersion, ModelVersion, Registry
from cluster.release import AdapterCard, BaseRef, DatasetRef, KnowledgeRef, ModelCard, prompt_hash
from training.history import gains
from training.merge import add_base_files, merge

Published = AdapterVersion | ModelVersion
SETTINGS = ("base", "embedder", "knowledge", "retrieval", "prompt", "data", "training")
"""Sections of the configuration that go on the card; the rest says where things run."""


@dataclass(frozen=True)
class Origin:
    """Where the weights of a run come from: what its card says besides the settings."""

    base: BaseRef
    base_directory: Path
    dataset: DatasetRef
    knowledge: KnowledgeRef | None
    """The version whose passages are in the rows; None if there are none."""
    groups: tuple[str, ...]
    """Those that may read everything the rows were made from."""
    events: Sequence[dict[str, Any]]
    """What the run logged, in order: steps and evaluations."""
    recipe: str
    """Digest of everything that decided the weights, so that the same run is not done twice."""
    run: str
    """Its name."""


def publish(registry: Registry, config: Config, directory: Path, origin: Origin) -> Published:
    """Publish what a run left in `directory` under ``training.adapter``, in the form ``training.publish`` asks for.

    An adapter is its PEFT files. A model is whole weights, after LoRA is added into them, with the tokenizer, the chat
    template and what else belongs to the base.

    Raises:
        BadInput, NotFound, Mismatch: the files are nothing that serving accepts.
    """
    training = config.training
    if training.publish == "adapter":
        return _publish_adapter(registry, config, directory, origin)
    facts = _facts(config, origin)
    if training.method == "full":
        add_base_files(origin.base_directory, directory, code=config.base.trust_remote_code)
        return registry.publish_model(training.adapter, directory, ModelCard(**facts))
    lora = training.lora
    facts |= {"variant": lora.variant, "rank": lora.rank, "alpha": lora.alpha, "target_modules": _targets(config)}
    with tempfile.TemporaryDirectory(prefix="metier-merged-", dir=directory.parent) as merged:
        merge(
            origin.base_directory,
            directory,
            Path(merged),
            config.base.dtype,
            trust_remote_code=config.base.trust_remote_code,
        )
        return registry.publish_model(training.adapter, Path(merged), ModelCard(**facts))


def _publish_adapter(registry: Registry, config: Config, directory: Path, origin: Origin) -> AdapterVersion:
    peft = check_adapter_files(directory, origin.base_directory)
    card = AdapterCard(
        **_facts(config, origin),
        variant="rslora" if peft.get("use_rslora") else "plain",
        rank=peft["r"],
        alpha=peft["lora_alpha"],
        target_modules=_targets(config),
    )
    return registry.publish_adapter(config.training.adapter, directory, card)


def _facts(config: Config, origin: Origin) -> dict[str, Any]:
    """The fields that both cards have."""
    training = config.training
    return {
        "base": origin.base,
        "method": training.method,
        "objective": training.objective,
        "quantization": training.quantization.type if training.method == "qlora" else "none",
        "max_tokens": training.max_tokens,
        "prompt": prompt_hash(config.prompt) if training.objective == "sft" else None,
        "dataset": origin.dataset,
        "knowledge": origin.knowledge,
        "groups": origin.groups,
        "training": _how_it_went(config, origin.events, origin.recipe),
        "metrics": _finite(gains(origin.events)),
        "config": settings(config),
        "run": origin.run,
        "metier": _version(),
        "code": source_digest(),
    }


def _how_it_went(config: Config, events: Sequence[dict[str, Any]], recipe: str) -> dict[str, float | int | str]:
    steps = [event for event in events if "loss" in event]
    losses = [float(event["loss"]) for event in steps if math.isfinite(event["loss"])]
    tail = losses[-max(1, len(losses) // 10) :]
    last: Mapping[str, Any] = steps[-1] if steps else {"step": 0}
    return {
        "recipe": recipe,
        "workers": config.training.workers,
        "zero_stage": config.training.deepspeed.zero_stage,
        "epochs": config.training.epochs,
        "steps": int(last["step"]),
        "loss_first": round(losses[0], 4) if losses else 0.0,
        "loss_last": round(sum(tail) / len(tail), 4) if tail else 0.0,
        "seconds": round(float(last.get("seconds", 0.0)), 1),
        "tokens_per_s": round(float(last.get("tokens_per_s", 0.0)), 1),
    }


def settings(config: Config) -> dict[str, Any]:
    """What of `config` decided the run, as plain data; of paths on this machine only the last name is kept."""
    shown = public_dict(config)
    return {section: _without_directories(shown[section], section) for section in SETTINGS}


def _without_directories(value: Any, path: str) -> Any:
    if isinstance(value, dict):
        return {key: _without_directories(inner, f"{path}.{key}") for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_directories(inner, path) for inner in value]
    local = isinstance(value, str) and not value.startswith(HUB) and PurePath(value).is_absolute()
    return PurePath(value).name if local and path != "base.source" else value


def source_digest() -> str:
    """16 hex digits of SHA-256 over the source of this package: what trained, where a version number says too little."""
    total = hashlib.sha256()
    root = Path(__file__).parent
    for file in sorted(root.rglob("*.py")):
        total.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return total.hexdigest()[:16]


def _version() -> str:
    try:
        return version("metier")
    except PackageNotFoundError:  # a source tree that was not installed
        return ""


def _targets(config: Config) -> list[str] | str:
    targets = config.training.lora.target_modules
    return targets if isinstance(targets, str) else list(targets)


def _finite(value: Any) -> Any:
    """`value` with what is no number as None: cards are strict JSON."""
    if isinstance(value, Mapping):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
