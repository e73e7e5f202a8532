"""A worker that ran out of memory -> a sentence with the plan's numbers and the setting to change."""

from __future__ import annotations

import json

from cluster.config import Config
from cluster.errors import ResourcesShort
from cluster.models import resolve
from training.model_shape import shape_of
from training.plan import explain_out_of_memory

SIGNS = ("out of memory", "not enough memory", "Cannot allocate memory")
"""What allocators of torch and the system say."""


def as_resources_short(error: BaseException, config: Config) -> ResourcesShort | None:
    """The sentence for `error`; None if it is about something else."""
    import torch

    known = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(sign in str(error) for sign in SIGNS)
    return out_of_memory(config) if known else None


def out_of_memory(config: Config) -> ResourcesShort:
    """The error of a run of `config` whose workers do not fit."""
    directory = resolve(config.base, config.models_cache)
    shape = shape_of(json.loads((directory / "config.json").read_text(encoding="utf-8")))
    return ResourcesShort(f"a training worker ran out of memory; {explain_out_of_memory(config, shape)}")
