"""``metier models``: base model and embedder on this machine, and whole models that runs published."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from metier.console import print_json, say, table
from metier.options import ConfigOption, JsonOption, SetOption, open_config, open_registry

if TYPE_CHECKING:
    from cluster.config import Config

app = typer.Typer(help="Model files on this machine, and models in the registry.", no_args_is_help=True)


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
def list_(
    config: ConfigOption = None,
    set_: SetOption = None,
    published: Annotated[bool, typer.Option("--published", help="Models that runs put into the registry.")] = False,
    json: JsonOption = False,
) -> None:
    """The models in the cache."""
    settings = open_config(config, set_)
    if published:
        _list_published(settings, json)
        return
    from cluster.models import cached

    found = cached(settings.models_cache)
    if json:
        print_json(found)
        return
    table(
        ("source", "revision", "size MB", "directory"),
        [(model.source, model.revision or "-", round(model.bytes / 1e6), model.directory) for model in found],
    )


@app.command()
def pull(
    ref: Annotated[str, typer.Argument(help="A published model: name, name@3 or name@digest")],
    directory: Annotated[Path, typer.Argument(help="Directory to make; it must not be there.")],
    config: ConfigOption = None,
    set_: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Write a published model to a directory, checked byte for byte; base.source can name it."""
    settings = open_config(config, set_)
    from cluster.models import check_new

    registry = open_registry(settings)
    model = registry.model(ref)
    check_new(directory)
    made = registry.pull_model(model.digest, directory.expanduser().absolute())
    if json:
        print_json({"model": model.ref, "digest": model.digest, "directory": str(made)})
        return
    say(f"model {model.ref} ({model.digest[:12]}) is at {made}; train or serve on it with base.source={made}")


def _list_published(settings: Config, json: bool) -> None:
    found = open_registry(settings).models()
    if json:
        print_json(found)
        return
    table(
        ("model", "digest", "base", "method", "created"),
        [(m.ref, m.digest[:12], m.card.base.source, m.card.method, m.created[:10]) for m in found],
    )
