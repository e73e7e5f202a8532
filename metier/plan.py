"""``metier plan``: how much memory a training run takes, and what fits."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated

import typer

from metier.console import out, print_json, table
from metier.options import ConfigOption, JsonOption, SetOption, open_config

if TYPE_CHECKING:
    from training.plan import Estimate, Method, Settings, Shape

WAYS = ((0, False), (1, False), (2, False), (3, False), (3, True))
"""ZeRO stages, and whether weights and optimizer are offloaded to the node's memory."""


def plan(
    config: ConfigOption = None,
    set_: SetOption = None,
    model: Annotated[
        str | None,
        typer.Option(help="A shape by name, a config.json, a directory or a model source; base.source by default."),
    ] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="GPUs, one worker each; training.workers by default.")] = None,
    gpu_memory: Annotated[float, typer.Option(min=1, help="GB of a GPU, as its vendor writes it.")] = 80,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="For counting nodes, and their memory with offload.")] = 8,
    margin: Annotated[float, typer.Option(min=0, max=0.9, help="Share of a GPU to leave free.")] = 0.05,
    json: JsonOption = False,
) -> None:
    """Memory per GPU of a training run by method and ZeRO stage, what fits, and the fewest GPUs; no weights are read."""
    settings = open_config(config, set_)
    from training.model_shape import find
    from training.plan import METHODS, advice, estimate, of, settings_of, shape_of, usable

    name = model or settings.base.source
    shape = shape_of(find(name, settings.models_cache))
    capacity = usable(gpu_memory, margin)
    configured = settings_of(settings)
    checkpointing = settings.training.gradient_checkpointing is not False
    asked = replace(configured, on_gpu=True, workers=gpus or configured.workers, gradient_checkpointing=checkpointing)
    rows: list[tuple[Settings, Estimate]] = []
    for method in METHODS:
        for stage, offload in WAYS:
            way = replace(asked, method=method, zero_stage=stage, offload_optimizer=offload, offload_parameters=offload)
            rows.append((way, estimate(shape, way)))
    fewest = {method: _fewest(shape, replace(asked, method=method), capacity) for method in METHODS}
    changes = advice(shape, asked, capacity)
    if json:
        print_json(
            {
                "model": name,
                "shape": asdict(shape),
                "capacity": capacity,
                "asked": asdict(asked),
                "fits": not changes,
                "advice": changes,
                "fewest_gpus": {method: asdict(found) for method, found in fewest.items()},
                "configured": {"settings": asdict(configured), "bytes": asdict(of(settings, shape))},
                "ways": [
                    {"settings": asdict(way), "bytes": asdict(bytes_), "fits": bytes_.total <= capacity}
                    for way, bytes_ in rows
                ],
            }
        )
        return
    _print_head(name, shape, asked, gpu_memory, capacity)
    _print_ways(rows, asked, capacity)
    _print_fewest(fewest, gpus_per_node)
    _print_configured(of(settings, shape), configured, asked, changes)


@dataclass(frozen=True)
class Fewest:
    """The smallest numbers of GPUs of one method, and the host memory of each with offload; None: none is enough."""

    gpus: int | None
    gpus_with_offload: int | None
    host: int


def _fewest(shape: Shape, asked: Settings, capacity: int) -> Fewest:
    from training.plan import estimate, fewest_gpus

    sharded = replace(asked, zero_stage=3, offload_optimizer=False, offload_parameters=False)
    offloaded = replace(sharded, offload_optimizer=True, offload_parameters=True)
    count = fewest_gpus(shape, offloaded, capacity)
    host = estimate(shape, replace(offloaded, workers=count)).host if count else 0
    return Fewest(fewest_gpus(shape, sharded, capacity), count, host)


def _print_head(name: str, shape: Shape, asked: Settings, gpu_memory: float, capacity: int) -> None:
    from training.plan import gib

    experts = f", {shape.active_experts} of {shape.experts} experts a token" if shape.experts else ""
    checkpointing = "with" if asked.gradient_checkpointing else "without"
    _line(f"{name}: {shape.parameters / 1e9:.2f} billion parameters{experts}")
    _line(
        f"{asked.workers} GPU{'s' if asked.workers > 1 else ''} of {gpu_memory:g} GB ({gib(capacity)} GiB to fill), "
        f"each {asked.batch_size} × {asked.tokens} tokens, {checkpointing} checkpointing"
    )
    _line("")


def _print_ways(rows: list[tuple[Settings, Estimate]], asked: Settings, capacity: int) -> None:
    from training.plan import gib

    def right(value: int) -> str:
        return f"{gib(value):>6}"

    table(
        ("method", "ZeRO", "weight", " grads", " optim", "activ.", "logits", " other", " total", "fits"),
        [
            (
                f"{'*' if way == asked else ' '}{way.method}",
                f"{way.zero_stage}+cpu" if way.offload_parameters else str(way.zero_stage),
                right(bytes_.weights + bytes_.adapters),
                right(bytes_.gradients + bytes_.step),
                right(bytes_.optimizer),
                right(bytes_.activations),
                right(bytes_.logits),
                right(bytes_.buffers),
                right(bytes_.total),
                "yes" if bytes_.total <= capacity else "no",
            )
            for way, bytes_ in rows
        ],
    )
    _line("* as configured. GiB a GPU; the total is a peak, and less than the sum.")


def _print_fewest(fewest: dict[Method, Fewest], gpus_per_node: int) -> None:
    from training.plan import gib

    def count(number: int | None) -> str:
        if number is None:
            return "never fits"
        nodes = -(-number // gpus_per_node)
        return f"{number} GPU{'s' if number > 1 else ''}, {nodes} node{'s' if nodes > 1 else ''}"

    _line("")
    table(
        ("method", "fewest GPUs (ZeRO-3)", "fewest with offload", "GiB of a node for that"),
        [
            (
                method,
                count(found.gpus),
                count(found.gpus_with_offload),
                gib(found.host * min(found.gpus_with_offload or 0, gpus_per_node)),
            )
            for method, found in fewest.items()
        ],
    )


def _print_configured(total: Estimate, configured: Settings, asked: Settings, changes: list[str]) -> None:
    from training.plan import gib

    _line("")
    if not configured.on_gpu:
        _line(f"As configured, on {configured.workers} CPU workers: at most {gib(total.total)} GiB a worker")
    way = f"{asked.method} with ZeRO-{asked.zero_stage}"
    if not changes:
        _line(f"{way} fits.")
        return
    _line(f"{way} does not fit. What would, cheapest first:")
    for change in changes:
        _line(f"  {change}")


def _line(text: str) -> None:
    out.print(text, markup=False, emoji=False, soft_wrap=True)
