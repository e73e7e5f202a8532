"""A training run from rows to a published adapter, in the order docs/architecture.md walks through it.

Everything that can be refused is refused before workers start: rows and lengths before Ray does, resources after.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

from cluster import runtime
from cluster.config import Config
from cluster.errors import ConfigError
from cluster.models import base_ref, load_tokenizer, resolve
from cluster.registry import Registry
from cluster.release import BaseRef
from cluster.resources import check, demand
from cluster.servable import check_servable
from cluster.storage import Storage
from training import runs
from training.data import examples
from training.data.encode import Encoding, encode
from training.history import History
from training.launch import launch, settle
from training.plot import loss_plot
from training.prepare import Prepared, load, prepare
from training.publish import Origin, Published, publish

LOG_STEPS = 10
"""Optimizer steps between those that stand in a run's log; ``metrics.jsonl`` has all of them."""
PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "mlflow": ("mlflow",), "wandb": ("wandb",)}
"""Tracker -> the packages any of which it needs."""
Say = Callable[[str], None]
NOT_IN_RECIPE = {
    "adapter", "run", "max_failures", "min_workers", "checkpoint_steps", "trackers", "cpus_per_worker", "liger",
}  # fmt: skip
"""Settings of ``training`` that do not decide what weights come out."""


def train(config: Config, *, say: Say, on_event: Callable[[dict[str, Any]], None], force: bool = False) -> Published:
    """Fine-tune on ``data.train`` and publish what comes out.

    Args:
        say: called with one line for each step.
        on_event: called with each logged training step (it has ``loss``) and each evaluation (it has not).
        force: train even if an adapter of this very recipe is already published.

    Raises:
        MetierError: rows, index, resources or workers; nothing is published then, and the same call goes on from
            the last checkpoint.
    """
    check_supported(config)
    storage = Storage.of(config.storage)
    registry = Registry(storage)
    rows = load(config)
    base_directory = resolve(config.base, config.models_cache)
    check_servable(config, base_directory)
    base = base_ref(config.base, base_directory)
    tokenizer = load_tokenizer(base_directory, config.base.trust_remote_code)
    prepared = prepare(config, registry, rows, tokenizer)
    encodings = {
        name: encode(part, tokenizer, config.training.max_tokens, config.training.too_long)
        for name, part in prepared.examples.items()
    }
    summary = _summary(prepared, encodings)
    for line in summary:
        say(line)

    recipe = recipe_digest(config, base, prepared)
    if not force and (known := _published(registry, config, recipe)):
        say(f"{config.training.publish} {known.ref} was trained with exactly this recipe; --force trains again")
        return known

    run = run_name(config, recipe, force)
    facts = runs.facts_of(config, recipe=recipe, base=base, dataset=prepared.dataset.digest)
    with runs.claim(storage, run, facts) as record:
        outcome: Future[Any] = Future()
        record.on_cancel = lambda: settle(outcome, record.end())
        tell = partial(_tell, say, record)
        for line in summary:
            record.log(line)
        paths = {}
        for name, part in prepared.examples.items():
            paths[name] = f"datasets/{prepared.digests[name]}.jsonl"
            examples.write(storage, paths[name], part)
        history = History(storage, run)

        def on_any_event(event: dict[str, Any]) -> None:
            if "loss" in event and event["step"] <= history.last_step:
                tell(f"goes on from the checkpoint after step {event['step'] - 1}")
            history.add(event)
            record.progress(event)
            if "loss" not in event or event["step"] % LOG_STEPS == 0:
                record.log(json.dumps(event))
            on_event(event)

        with runtime.connect(config):
            check(demand(config, "train"), runtime.capacity())
            record.check_cancelled()
            tell(f"run {run}: {config.training.workers} workers, DeepSpeed ZeRO-{config.training.deepspeed.zero_stage}")
            record.state("training")
            try:
                checkpoint = launch(config, run=run, datasets=paths, on_event=on_any_event, outcome=outcome)
            finally:
                history.save()
            record.state("publishing")
            with tempfile.TemporaryDirectory(prefix="metier-adapter-") as scratch:
                directory = Path(checkpoint.to_directory(str(Path(scratch, "checkpoint"))))
                origin = Origin(
                    base,
                    base_directory,
                    prepared.dataset,
                    prepared.knowledge,
                    prepared.groups,
                    history.events,
                    recipe,
                    run,
                )
                published = publish(registry, config, directory, origin)
                plot = Path(scratch, "loss.png")
                loss_plot(history.events, plot)
                storage.upload(plot, f"runs/{run}/loss.png")
        record.published(published.ref)
        tell(f"loss curve: {storage.url}/runs/{run}/loss.png")
        return published


def check_supported(config: Config) -> None:
    """Raise :class:`ConfigError` for settings that the workers' hardware or packages cannot do."""
    training = config.training
    for tracker in training.trackers:
        if not any(importlib.util.find_spec(package) for package in PACKAGES[tracker]):
            raise ConfigError(
                f"training.trackers: {tracker} is not installed; `pip install {PACKAGES[tracker][0]}` on all nodes, "
                "or leave it out",
                param="training.trackers",
            )
    if training.method == "qlora" and not importlib.util.find_spec("bitsandbytes"):
        raise ConfigError(
            "training.method qlora needs bitsandbytes; `pip install bitsandbytes` on all nodes, or use lora",
            param="training.method",
        )
    if training.on_gpu:
        return
    if config.base.dtype == "float16":
        raise ConfigError(
            "base.dtype float16 is not trained on the CPU; set base.dtype=bfloat16, or training.gpus_per_worker=1",
            param="base.dtype",
        )
    if training.liger:
        raise ConfigError(
            "training.liger needs GPUs; leave it out, or set training.gpus_per_worker=1", param="training.liger"
        )


def run_name(config: Config, recipe: str, force: bool) -> str:
    """``training.run``, or adapter and recipe; with `force` a name of its own, so that nothing is taken up again."""
    name = config.training.run or f"{config.training.adapter}-{recipe[:12]}"
    return f"{name}-{int(time.time())}" if force else name


def recipe_digest(config: Config, base: BaseRef, prepared: Prepared) -> str:
    """Hash of everything that decides the weights that come out."""
    recipe = {
        "base": base.model_dump(mode="json"),
        "datasets": {name: digest for name, digest in prepared.digests.items() if name != "general"},
        "training": config.training.model_dump(mode="json", exclude=NOT_IN_RECIPE),
    }
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()


def _published(registry: Registry, config: Config, recipe: str) -> Published | None:
    known = registry.adapters() if config.training.publish == "adapter" else registry.models()
    ours = [version for version in known if version.name == config.training.adapter]
    return next((version for version in reversed(ours) if version.card.training.get("recipe") == recipe), None)


def _summary(prepared: Prepared, encodings: dict[str, Encoding]) -> list[str]:
    lines = []
    for name, encoding in encodings.items():
        parts = [f"{name}: {len(prepared.examples[name])} rows, {encoding.tokens} tokens"]
        parts += [f"{encoding.dropped} too long and left out"] if encoding.dropped else []
        parts += [f"{encoding.truncated} cut to length"] if encoding.truncated else []
        lines.append(", ".join(parts))
    if prepared.knowledge is not None:
        lines[0] += f", passages from knowledge {prepared.knowledge.name} v{prepared.knowledge.version}"
    return lines


def _tell(say: Say, record: runs.Run, line: str) -> None:
    record.log(line)
    say(line)
