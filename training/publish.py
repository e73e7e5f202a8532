"""A finished run -> an adapter and its card in the registry."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster.adapter_files import check_adapter_files
from cluster.config import Config
from cluster.registry import AdapterVersion, Registry
from cluster.release import AdapterCard, BaseRef, DatasetRef, KnowledgeRef, prompt_hash


def publish(
    registry: Registry,
    config: Config,
    directory: Path,
    *,
    base: BaseRef,
    base_directory: Path,
    dataset: DatasetRef,
    knowledge: KnowledgeRef,
    events: Sequence[dict[str, Any]],
    recipe: str,
) -> AdapterVersion:
    """Publish the PEFT files in `directory` under ``training.adapter``.

    Args:
        events: what rank 0 logged, in order; its ends go on the card.
        recipe: digest of everything that decided this adapter, so that the same run is not done twice.
    """
    check_adapter_files(directory, base_directory)
    lora = config.training.lora
    losses = [float(event["loss"]) for event in events]
    tail = losses[-max(1, len(losses) // 10) :]
    card = AdapterCard(
        base=base,
        method="lora",
        rank=lora.rank,
        alpha=lora.alpha,
        target_modules=lora.target_modules,
        prompt=prompt_hash(config.prompt),
        dataset=dataset,
        knowledge=knowledge,
        groups=config.knowledge.groups,
        training={
            "recipe": recipe,
            "workers": config.training.workers,
            "zero_stage": config.training.deepspeed.zero_stage,
            "epochs": config.training.epochs,
            "steps": int(events[-1]["step"]) if events else 0,
            "loss_first": round(losses[0], 4) if losses else 0.0,
            "loss_last": round(sum(tail) / len(tail), 4) if tail else 0.0,
            "seconds": round(float(events[-1]["seconds"]), 1) if events else 0.0,
            "tokens_per_s": round(float(events[-1]["tokens_per_s"]), 1) if events else 0.0,
        },
    )
    return registry.publish_adapter(config.training.adapter, directory, card)
