"""``metier release``: one base, adapter, knowledge, prompt and retrieval under one digest, and the aliases on it."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from cluster.errors import BadInput
from metier.console import print_json, say, table
from metier.options import ConfigOption, JsonOption, SetOption, open_config, open_registry

app = typer.Typer(help="Releases and their aliases.", no_args_is_help=True)
Alias = Annotated[str, typer.Option("--alias", help="Alias to move.")]


@app.command()
def create(
    name: Annotated[
        str | None, typer.Argument(help="Name of the release; the configuration's name by default.")
    ] = None,
    adapter: Annotated[
        str | None, typer.Option(help="name, name@3 or name@digest; by default the newest of training.adapter.")
    ] = None,
    no_adapter: Annotated[bool, typer.Option("--no-adapter", help="The bare base model.")] = False,
    knowledge_version: Annotated[str, typer.Option(help="A version number, or `head` to follow the newest.")] = "head",
    no_knowledge: Annotated[bool, typer.Option("--no-knowledge", help="Closed book.")] = False,
    promote: Annotated[
        str | None, typer.Option(metavar="ALIAS", help="Point this alias at it, for example prod.")
    ] = None,
    config: ConfigOption = None,
    set_: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Make a release of what the configuration says; the same parts give the same digest."""
    settings = open_config(config, set_)
    from cluster.models import base_ref, resolve
    from cluster.release import AdapterRef, EmbedderRef, KnowledgeRef, Release, check_match, reranker_ref

    registry = open_registry(settings)
    name = name or settings.name
    if name == settings.base.served_name:
        raise BadInput(f"'{name}' is what the base model is called; choose another name for the release", param="name")
    base = base_ref(settings.base, resolve(settings.base, settings.models_cache))
    chosen = None
    if not no_adapter:
        version = registry.adapter(adapter or settings.training.adapter)
        check_match(version.card, base, settings.prompt)
        chosen = AdapterRef(name=version.name, version=version.version, digest=version.digest)
    knowledge = None
    if not no_knowledge:
        if registry.knowledge_head(settings.knowledge.name) == 0:
            raise BadInput(
                f"knowledge '{settings.knowledge.name}' is empty; run `metier index` first, or pass --no-knowledge"
            )
        wanted = _version(knowledge_version)
        registry.knowledge_version(settings.knowledge.name, wanted)
        knowledge = KnowledgeRef(name=settings.knowledge.name, version=wanted)
    release = Release(
        base=base,
        adapter=chosen,
        knowledge=knowledge,
        embedder=EmbedderRef(source=settings.embedder.source, revision=settings.embedder.revision),
        reranker=reranker_ref(settings),
        prompt=settings.prompt,
        retrieval=settings.retrieval,
    )
    made = registry.create_release(name, release)
    if promote:
        made = registry.promote(name, f"{name}@{made.digest}", promote)
    if json:
        print_json(made)
        return
    say(
        f"release {made.name}@{made.digest[:12]} (version {made.version}){f', now {name}@{promote}' if promote else ''}"
    )


@app.command("list")
def list_(config: ConfigOption = None, set_: SetOption = None, json: JsonOption = False) -> None:
    """All releases, oldest first, with the aliases that point at them."""
    found = open_registry(open_config(config, set_)).releases()
    if json:
        print_json(found)
        return
    rows = []
    for made in found:
        parts = made.release
        adapter = f"{parts.adapter.name}@{parts.adapter.version}" if parts.adapter else "-"
        knowledge = f"{parts.knowledge.name} {parts.knowledge.version}" if parts.knowledge else "-"
        aliases = ", ".join(made.aliases)
        rows.append((f"{made.name}@{made.digest[:12]}", made.version, aliases, adapter, knowledge, made.created[:10]))
    table(("release", "version", "aliases", "adapter", "knowledge", "created"), rows)


@app.command()
def show(
    ref: Annotated[str, typer.Argument(help="name, name@alias, name@3 or name@digest")],
    config: ConfigOption = None,
    set_: SetOption = None,
) -> None:
    """One release, whole, as JSON."""
    print_json(open_registry(open_config(config, set_)).release(ref))


@app.command()
def promote(
    ref: Annotated[str, typer.Argument(help="The release: name@3 or name@digest")],
    alias: Alias = "prod",
    config: ConfigOption = None,
    set_: SetOption = None,
) -> None:
    """Point an alias at a release; running servers follow with the next request."""
    registry = open_registry(open_config(config, set_))
    made = registry.promote(ref.partition("@")[0], ref, alias)
    say(f"{made.name}@{alias} is now {made.digest[:12]} (version {made.version})")


@app.command()
def rollback(
    name: Annotated[str, typer.Argument(help="Name of the release")],
    alias: Alias = "prod",
    config: ConfigOption = None,
    set_: SetOption = None,
) -> None:
    """Point an alias back at what it pointed at before."""
    made = open_registry(open_config(config, set_)).rollback(name, alias)
    say(f"{made.name}@{alias} is back at {made.digest[:12]} (version {made.version})")


def _version(text: str) -> int | Literal["head"]:
    if text == "head":
        return "head"
    if not text.isdigit():
        raise BadInput(f"--knowledge-version {text}: give a number, or head", param="knowledge-version")
    return int(text)
