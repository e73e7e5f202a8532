"""``metier models``: the base model and the embedder on this machine."""

from __future__ import annotations

import time

import typer

from metier.console import print_json, say, table
from metier.options import ConfigOption, JsonOption, SetOption, open_config

app = typer.Typer(help="Model files on this machine.", no_args_is_help=True)


@app.command()
def fetch(config: ConfigOption = None, set_: SetOption = None, json: JsonOption = False) -> None:
    """Bring base model and embedder into the cache, so that later steps need no network."""
    settings = open_config(config, set_)
    from cluster.models import resolve

    done = []
    for role, model in (("base", settings.base), ("embedder", settings.embedder)):
        began = time.perf_counter()
        directory = resolve(model, settings.models_cache)
        done.append({"role": role, "source": model.source, "directory": str(directory)})
        if not json:
            say(f"{role} {model.source} is at {directory} ({time.perf_counter() - began:.1f} s)")
    if json:
        print_json(done)


@app.command("list")
def list_(config: ConfigOption = None, set_: SetOption = None, json: JsonOption = False) -> None:
    """The models in the cache."""
    settings = open_config(config, set_)
    from cluster.models import cached

    found = cached(settings.models_cache)
    if json:
        print_json(found)
        return
    table(
        ("source", "revision", "size MB", "directory"),
        [(model.source, model.revision or "-", round(model.bytes / 1e6), model.directory) for model in found],
    )
