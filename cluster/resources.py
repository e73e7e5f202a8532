"""What a configuration asks of a cluster, and whether the cluster has it, before anything is launched.

Ray waits for ever, in silence, for CPUs that are not there; :func:`check` says so in numbers instead. Pure: the
capacity is passed in (``cluster.runtime.capacity`` reads it from Ray, a chart test computes it from worker pods).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cluster.config import Config
from cluster.errors import ResourcesShort

Role = Literal["train", "serve"]
SERVE_OVERHEAD_CPUS = 0.0
"""Ray Serve's controller and proxies reserve no CPU."""


@dataclass(frozen=True)
class Amount:
    """CPUs and GPUs (Ray units, fractions allowed) and bytes of memory."""

    cpus: float = 0.0
    gpus: float = 0.0
    memory: int = 0

    def __add__(self, other: Amount) -> Amount:
        return Amount(self.cpus + other.cpus, self.gpus + other.gpus, self.memory + other.memory)

    def times(self, count: float) -> Amount:
        return Amount(self.cpus * count, self.gpus * count, int(self.memory * count))


@dataclass(frozen=True)
class Ask:
    """One line of a demand: `count` pieces of `each`, and the settings that decide both."""

    what: str
    count: int
    each: Amount
    settings: str

    @property
    def total(self) -> Amount:
        return self.each.times(self.count)


def demand(config: Config, role: Role) -> list[Ask]:
    """What `role` reserves at the least: all training workers, or the first replicas of every serving stage.

    A stage that may scale to zero still counts one replica, since a request must be able to wake it.
    """
    if role == "train":
        training = config.training
        each = Amount(training.cpus_per_worker, training.gpus_per_worker)
        return [
            Ask(
                "training workers",
                training.min_workers or training.workers,
                each,
                "training.workers, training.cpus_per_worker",
            )
        ]
    return [
        Ask(
            f"{name} replicas",
            max(1, stage.min_replicas),
            Amount(stage.cpus, stage.gpus, stage.memory_bytes),
            f"serving.{name}.min_replicas, serving.{name}.cpus",
        )
        for name, stage in (
            ("ingress", config.serving.ingress),
            ("retriever", config.serving.retriever),
            ("generator", config.serving.generator),
        )
    ]


def total(asks: list[Ask]) -> Amount:
    """Sum of all lines."""
    return sum((ask.total for ask in asks), Amount())


def check(asks: list[Ask], capacity: Amount) -> None:
    """Raise if `capacity` (of the whole cluster) cannot hold `asks`.

    Raises:
        ResourcesShort: with the numbers of each line and the settings to lower.
    """
    need = total(asks)
    short = [
        f"{need_n:g} {unit} needed, {have:g} there"
        for unit, need_n, have in (
            ("CPUs", need.cpus, capacity.cpus),
            ("GPUs", need.gpus, capacity.gpus),
            ("bytes of memory", need.memory, capacity.memory or float("inf")),
        )
        if need_n > have + 1e-9
    ]
    if short:
        lines = "; ".join(f"{ask.count} {ask.what} × {ask.each.cpus:g} CPU, {ask.each.gpus:g} GPU" for ask in asks)
        settings = ", ".join(ask.settings for ask in asks)
        raise ResourcesShort(
            f"not enough for this configuration: {'; '.join(short)} ({lines}). Lower {settings}, or add nodes"
        )
