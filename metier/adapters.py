"""``metier adapters``: what the registry holds, and its doors: in, out, and into the weights of the base."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from metier.console import print_json, say, table
from metier.options import ConfigOption, JsonOption, SetOption, open_config, open_registry

if TYPE_CHECKING:
    from cluster.config import Config
    from cluster.release import AdapterCard

app = typer.Typer(help="Adapters in the registry.", no_args_is_help=True)
Ref = Annotated[str, typer.Argument(help="name, name@3 or name@digest")]
Name = Annotated[str, typer.Option("--name", help="Name in the registry.")]


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
    ref: Ref,
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
    name: Name,
    config: ConfigOption = None,
    set_: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Take in an adapter trained elsewhere, after checking that its files are safe and fit the base."""
    settings = open_config(config, set_)
    published = open_registry(settings).publish_adapter(name, directory, _foreign_card(settings, directory))
    if json:
        print_json(published)
        return
    say(f"adapter {published.name}@{published.version} ({published.digest[:12]}) is in the registry")


@app.command()
def push(
    ref: Ref,
    destination: Annotated[str, typer.Argument(help="A directory, a URL such as s3://bucket/path, or hub:org/name.")],
    config: ConfigOption = None,
    set_: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Copy an adapter out of the registry: PEFT files, metier-card.json and a model card (README.md).

    Any PEFT program loads the result. The token for a hub is HF_TOKEN; a new repository there is private.
    """
    settings = open_config(config, set_)
    from cluster import exchange

    pushed = exchange.push(open_registry(settings), ref, destination, _options(settings, destination))
    if json:
        print_json({"destination": destination, "adapter": pushed.ref, "digest": pushed.digest})
        return
    say(f"adapter {pushed.ref} ({pushed.digest[:12]}) is at {destination}")


@app.command()
def pull(
    source: Annotated[
        str, typer.Argument(help="A directory, a URL such as s3://bucket/path, or hub:org/name[@revision].")
    ],
    name: Name,
    config: ConfigOption = None,
    set_: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Take in a pushed adapter after checking it against its card; one without a card is checked as by `add`."""
    settings = open_config(config, set_)
    from cluster import exchange

    registry = open_registry(settings)
    with tempfile.TemporaryDirectory(prefix="metier-pull-") as scratch:
        directory = Path(scratch)
        card = exchange.pull(source, directory, _options(settings, source))
        published = registry.publish_adapter(name, directory, card or _foreign_card(settings, directory))
    if json:
        print_json(published)
        return
    origin = f"trained on {published.card.base.source}" if card else "without a card: trained elsewhere"
    say(f"adapter {published.ref} ({published.digest[:12]}) is in the registry, {origin}")


@app.command()
def merge(
    ref: Ref,
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to make; it must not be there.")],
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option("--dtype", help="Precision of the weights; base.dtype by default."),
    ] = None,
    config: ConfigOption = None,
    set_: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Write base and adapter as one model, for servers that know no adapters; base.source can name it."""
    settings = open_config(config, set_)
    from cluster.materialize import materialize
    from cluster.models import base_ref, check_new, resolve
    from cluster.release import check_match
    from training.merge import merge as merge_files

    registry = open_registry(settings)
    version = registry.adapter(ref)
    check_new(output)
    base = resolve(settings.base, settings.models_cache)
    check_match(version.card, base_ref(settings.base, base), None)
    wanted = dtype or settings.base.dtype

    def make(out: Path, scratch: Path) -> dict[str, Any]:
        registry.copy_adapter(version.digest, scratch)
        merge_files(base, scratch, out, wanted, trust_remote_code=settings.base.trust_remote_code)
        return {"source": f"{settings.base.source} + {version.ref}", "revision": version.digest}

    directory = materialize(output.expanduser().absolute(), make)
    if json:
        print_json({"directory": str(directory), "adapter": version.ref, "digest": version.digest, "dtype": wanted})
        return
    say(
        f"{settings.base.source} with {version.ref} is at {directory} ({wanted}); serve it with base.source={directory}"
    )


def _foreign_card(settings: Config, directory: Path) -> AdapterCard:
    """The card of an adapter trained elsewhere, whose files are safe and fit the base."""
    from cluster.adapter_files import check_adapter_files
    from cluster.models import base_ref, resolve
    from cluster.release import AdapterCard

    base = resolve(settings.base, settings.models_cache)
    peft = check_adapter_files(directory, base)
    return AdapterCard(
        base=base_ref(settings.base, base),
        variant="rslora" if peft.get("use_rslora") else "plain",
        rank=peft["r"],
        alpha=peft["lora_alpha"],
        target_modules=peft["target_modules"],
        groups=settings.knowledge.groups,
    )


def _options(settings: Config, place: str) -> dict[str, Any] | None:
    """The file system's options of the storage, where `place` is of the same kind."""
    scheme, sign, _ = place.partition("://")
    return settings.storage.options if sign and settings.storage.url.startswith(scheme + sign) else None
