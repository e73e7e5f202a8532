"""``metier plan``: how much memory a training run takes, and what fits."""

from __future__ import annotations

from metier.options import ConfigOption, JsonOption, SetOption


def plan(config: ConfigOption = None, set_: SetOption = None, json: JsonOption = False) -> None:
    """Memory per GPU of a training run."""
