"""The options that verbs share, and what they lead to: a loaded configuration, a registry."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster import log
from cluster.config import Config, load

if TYPE_CHECKING:
    from cluster.registry import Registry

ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", "-c", envvar="METIER_CONFIG", help="YAML configuration; defaults are used without one."),
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", "-s", metavar="KEY=VALUE", help="Override a setting; may be repeated.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
SubmitOption = Annotated[bool, typer.Option("--submit", help="Run it as a Ray job on ray.address (http://head:8265).")]


def open_config(file: Path | None, overrides: list[str] | None) -> Config:
    """The configuration of this call, with logging set up as it says."""
    config = load(file, overrides or ())
    log.setup(config.logging)
    return config


def open_registry(config: Config) -> Registry:
    """The registry that `config` names."""
    from cluster.registry import Registry
    from cluster.storage import Storage

    return Registry(Storage.of(config.storage))


def server_url(config: Config) -> str:
    """Where the server of `config` listens."""
    return f"http://{config.serving.host}:{config.serving.port}"
