"""``metier adapters``: what the registry holds, and taking in a PEFT directory trained elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from metier.console import print_json, say, table
from metier.options import ConfigOption, JsonOption, SetOption, open_config, open_registry

app = typer.Typer(help="Adapters in the registry.", no_args_is_help=True)


@app.command("list")
def list_(config: ConfigOption = None, set_: SetOption = None, json: JsonOption = False) -> None:
    """All adapters, oldest first."""
    found = open_registry(open_config(config, set_)).adapters()
    if json:
        print_json(found)
        return
    rows = [(a.ref, a.digest[:12], a.card.base.source, a.card.rank, a.created[:10]) for a in found]
    table(("adapter", "digest", "base", "rank", "created"), rows)


@app.command()
def show(
    ref: Annotated[str, typer.Argument(help="name, name@3 or name@digest")],
    config: ConfigOption = None,
    set_: SetOption = None,
) -> None:
    """The card of one adapter, as JSON."""
    print_json(open_registry(open_config(config, set_)).adapter(ref))


@app.command()
def add(
    directory: Annotated[
        Path, typer.Argument(help="PEFT directory: adapter_config.json and adapter_model.safetensors")
    ],
    name: Annotated[str, typer.Option("--name", help="Name in the registry.")],
    config: ConfigOption = None,
    set_: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Take in an adapter trained elsewhere, after checking that its files are safe and fit the base."""
    settings = open_config(config, set_)
    from cluster.adapter_files import check_adapter_files
    from cluster.models import base_ref, resolve
    from cluster.release import AdapterCard

    base = resolve(settings.base, settings.models_cache)
    peft = check_adapter_files(directory, base)
    card = AdapterCard(
        base=base_ref(settings.base, base),
        rank=peft["r"],
        alpha=peft["lora_alpha"],
        target_modules=peft["target_modules"],
        groups=settings.knowledge.groups,
    )
    published = open_registry(settings).publish_adapter(name, directory, card)
    if json:
        print_json(published)
        return
    say(f"adapter {published.name}@{published.version} ({published.digest[:12]}) is in the registry")
