"""``metier knowledge``: the versions of a knowledge: look at them, go back, keep, let go, move, forget a document."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.errors import BadInput
from metier.console import print_json, progress, say, table
from metier.options import ConfigOption, JsonOption, SetOption, open_config, open_registry

if TYPE_CHECKING:
    from cluster.config import Config
    from cluster.knowledge import KnowledgeVersion
    from cluster.registry import Registry
    from retrieval.store import Store

app = typer.Typer(help="Versions of the knowledge: list, compare, go back, keep, forget, move.", no_args_is_help=True)
Name = Annotated[str | None, typer.Argument(help="The knowledge; knowledge.name by default.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Only show what would go.")]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do it; without, nothing is removed.")]
Version = Annotated[list[str], typer.Argument(metavar="[NAME] VERSION", help="The knowledge, and the version.")]


@app.command("list")
def list_(config: ConfigOption = None, set_: SetOption = None, json: JsonOption = False) -> None:
    """Every knowledge, and what its newest version is."""
    registry = open_registry(open_config(config, set_))
    heads = {name: registry.knowledge_version(name) for name in registry.knowledge_names()}
    if json:
        print_json([{"name": name, **_plain(head)} for name, head in heads.items()])
        return
    rows = [(n, f"v{v.number}", v.kind, v.documents, v.chunks, _model(v), v.created[:10]) for n, v in heads.items()]
    table(("knowledge", "head", "by", "documents", "chunks", "embedder", "created"), rows)


@app.command()
def versions(name: Name = None, config: ConfigOption = None, set_: SetOption = None, json: JsonOption = False) -> None:
    """The versions of a knowledge, oldest first, and what keeps each from compaction."""
    settings = open_config(config, set_)
    registry, name = open_registry(settings), name or settings.knowledge.name
    registry.knowledge_version(name)
    history, there = registry.knowledge_history(name), {v.number for v in registry.knowledge_versions(name)}
    kept = registry.knowledge_kept(name, settings.knowledge.keep_versions)
    building = registry.knowledge_build(name)
    if json:
        found = [_plain(v) | {"compacted": v.number not in there, "kept": kept.get(v.number)} for v in history]
        print_json({"name": name, "versions": found, "building": building})
        return
    rows = []
    for v in history:
        what = v.kind if v.reads == v.number else f"{v.kind} to {v.details.get('to', v.reads)}"
        state = kept.get(v.number, "may go") if v.number in there else "compacted"
        rows.append(
            (v.number, v.created[:16].replace("T", " "), what, v.chunks, f"+{v.added} ~{v.updated} -{v.removed}", state)
        )
    table(("version", "created", "by", "chunks", "changes", "kept"), rows)
    if building:
        say(f"{building.collection} is being filled since {building.began}; `metier knowledge reindex` goes on with it")


@app.command()
def diff(
    versions: Annotated[list[str], typer.Argument(metavar="[NAME] A B", help="The knowledge, and the two versions.")],
    config: ConfigOption = None,
    set_: SetOption = None,
    json: JsonOption = False,
) -> None:
    """What version B has that A has not, and the other way round: documents, and their chunks by heading."""
    settings = open_config(config, set_)
    name, (before, after) = _numbers(settings, versions, 2)
    from retrieval import knowledge

    with _opened(settings) as (registry, store):
        found = knowledge.diff(registry, store, name, before, after)
    if json:
        print_json({"name": name, "before": before, "after": after, "documents": found})
        return
    rows = []
    for document in found:
        counts = [f"{sign}{n}" for sign, n in _counts(document.chunks).items() if n]
        headings = list(dict.fromkeys(chunk.heading for chunk in document.chunks if chunk.heading))
        shown = "; ".join(headings[:3]) + (f"; {len(headings) - 3} more" if len(headings) > 3 else "")
        rows.append((document.doc_id, document.kind, " ".join(counts), shown))
    if rows:
        table(("document", "is", "chunks", "headings"), rows)
    say(f"{len(found)} documents of knowledge {name} differ between v{before} and v{after}")


@app.command()
def rollback(version: Version, config: ConfigOption = None, set_: SetOption = None, json: JsonOption = False) -> None:
    """Show an earlier version again, as a new one; running servers follow with the next question."""
    settings = open_config(config, set_)
    name, (number,) = _numbers(settings, version, 1)
    from retrieval import knowledge

    with _opened(settings) as (registry, store):
        made = knowledge.rollback(registry, store, name, number)
    if json:
        print_json({"name": name, **_plain(made)})
        return
    say(f"knowledge {name} v{made.number} shows what v{number} showed: {made.chunks} chunks")


@app.command()
def pin(
    version: Version,
    label: Annotated[str, typer.Option("--label", help="Why, for people.")] = "",
    config: ConfigOption = None,
    set_: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Keep a version through every compaction."""
    settings = open_config(config, set_)
    name, (number,) = _numbers(settings, version, 1)
    registry = open_registry(settings)
    registry.knowledge_pin(name, number, label)
    if json:
        print_json({"name": name, "pins": registry.knowledge_pins(name)})
        return
    say(f"knowledge {name} v{number} is pinned")


@app.command()
def unpin(version: Version, config: ConfigOption = None, set_: SetOption = None, json: JsonOption = False) -> None:
    """Let a version go with the others at the next compaction."""
    settings = open_config(config, set_)
    name, (number,) = _numbers(settings, version, 1)
    registry = open_registry(settings)
    registry.knowledge_unpin(name, number)
    if json:
        print_json({"name": name, "pins": registry.knowledge_pins(name)})
        return
    say(f"knowledge {name} v{number} is no longer pinned")


@app.command()
def compact(
    name: Name = None,
    keep: Annotated[
        int | None, typer.Option("--keep", min=1, help="Newest versions that stay; knowledge.keep_versions by default.")
    ] = None,
    dry_run: DryRunOption = False,
    config: ConfigOption = None,
    set_: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Remove the rows that no kept version shows: the newest stay, and what is pinned or named by a release."""
    settings = open_config(config, set_)
    name = name or settings.knowledge.name
    from retrieval import knowledge

    with _opened(settings) as (registry, store):
        done = knowledge.compact(registry, store, name, keep or settings.knowledge.keep_versions, dry_run=dry_run)
    if json:
        print_json({"name": name, "dry_run": dry_run, **_plain(done)})
        return
    verb = "would go" if dry_run else "are gone"
    say(f"knowledge {name}: {done.rows} rows of {len(done.gone)} versions {verb}, {len(done.kept)} versions stay")
    for collection in done.collections:
        say(f"  collection {collection}, which no kept version is in, {'would go' if dry_run else 'is gone'}")


@app.command()
def drop(
    name: Annotated[str, typer.Argument(help="The knowledge.")],
    yes: YesOption = False,
    force: Annotated[bool, typer.Option("--force", help="Also if a pin or a release names it.")] = False,
    dry_run: DryRunOption = False,
    config: ConfigOption = None,
    set_: SetOption = None,
    json: JsonOption = False,
) -> None:
    """End a knowledge: all its versions and rows go. The documents it was made of stay where they are."""
    settings = open_config(config, set_)
    from retrieval import knowledge

    with _opened(settings) as (registry, store):
        plan = knowledge.drop(registry, store, name, dry_run=True)
        if not (yes or dry_run):
            raise BadInput(
                f"this removes {plan.versions} versions of knowledge '{name}' with {plan.rows} rows; pass --yes to do it",
                param="yes",
            )
        done = plan if dry_run else knowledge.drop(registry, store, name, force=force)
    if json:
        print_json({"name": name, "dry_run": dry_run, **_plain(done)})
        return
    say(
        f"knowledge {name}: {done.versions} versions, {done.rows} rows, {len(done.collections)} collections "
        f"{'would go' if dry_run else 'are gone'}"
    )
    if dry_run and done.named_by:
        say(f"  it is named by {', '.join(done.named_by)}: --force would be needed")


@app.command()
def forget(
    document: Annotated[list[str], typer.Argument(metavar="[NAME] DOC_ID", help="The knowledge, and the document.")],
    tenant: Annotated[
        str | None, typer.Option("--tenant", help="Only the document of this tenant; by default that of every tenant.")
    ] = None,
    undo: Annotated[bool, typer.Option("--undo", help="Let it come back with the next ingest.")] = False,
    dry_run: DryRunOption = False,
    config: ConfigOption = None,
    set_: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Remove a document from every version at once, and report where it went: chunks, datasets, adapters, releases."""
    settings = open_config(config, set_)
    name, (doc_id,) = _named(settings, document, 1, "a document")
    from retrieval import forget as forgetting

    if undo:
        forgetting.undo(open_registry(settings), name, doc_id, tenant=tenant)
        if json:
            print_json({"name": name, "doc_id": doc_id, "undone": True})
        else:
            say(f"document {doc_id} may come back to knowledge {name} with the next ingest")
        return
    with _opened(settings) as (registry, store):
        report = forgetting.forget(registry, store, name, doc_id, tenant=tenant, dry_run=dry_run)
    if json:
        print_json({"dry_run": dry_run, **report.to_dict()})
        return
    reached = report.reached
    say(f"document {doc_id} {'would be' if dry_run else 'is'} forgotten: {report.rows} rows of knowledge {name}")
    lines = {
        "chunks": [f"{chunk.chunk_id[:12]} {chunk.heading}".rstrip() for chunk in report.chunks],
        "versions": [str(number) for number in report.versions],
        "datasets": [
            f"{use.digest[:12]} ({'rows not here' if use.rows is None else f'{use.rows} rows'})"
            for use in reached.datasets
        ],
        "runs": sorted({run for use in reached.datasets for run in use.runs}),
        "adapters": list(reached.adapters),
        "models": list(reached.models),
        "releases": [f"{use.ref} ({', '.join(use.through)})" for use in reached.releases],
    }
    table(("reached", "count", "which"), [(what, len(names), _short(names)) for what, names in lines.items()])
    say("answers are not logged yet")


@app.command()
def reindex(
    name: Name = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Ask both collections for sampled passages before the move.")
    ] = False,
    min_recall: Annotated[
        float, typer.Option("--min-recall", min=0, max=1, help="Stay if fewer of them are found; implies --compare.")
    ] = 0.0,
    sample: Annotated[int, typer.Option("--sample", min=1, help="How many passages are asked for.")] = 100,
    from_documents: Annotated[
        bool, typer.Option("--from-documents", help="Read the documents anew even if chunks are cut as before.")
    ] = False,
    abort: Annotated[bool, typer.Option("--abort", help="Give up the collection that is being filled.")] = False,
    config: ConfigOption = None,
    set_: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Move to another embedder, chunking or index, as the configuration says, in a collection beside the one that serves.

    Questions are answered from the old one until the move, and none fails. The same command goes on after a kill.
    """
    settings = open_config(config, set_)
    if name is not None:
        settings = settings.model_copy(update={"knowledge": settings.knowledge.model_copy(update={"name": name})})
    from retrieval import reindex as reindexing

    if abort:
        with _opened(settings) as (registry, store):
            build = reindexing.abort(registry, store, settings.knowledge.name)
        if json:
            print_json({"aborted": build})
        else:
            say(f"{build.collection} is given up")
        return
    from cluster.models import resolve
    from retrieval.embed import Embedder
    from retrieval.embedders import Embedders
    from retrieval.known_items import known_items

    embedder = Embedder(resolve(settings.embedder, settings.models_cache), settings.embedder)
    others = Embedders(settings.embedder, settings.models_cache)
    with _opened(settings) as (registry, store), progress("reindexing") as update:
        comparison = known_items(
            store,
            lambda state: embedder if state.fingerprint == embedder.fingerprint else others(state),
            settings.retrieval,
            sample=sample,
        )
        report = reindexing.reindex(
            settings,
            store,
            embedder,
            registry,
            from_documents=from_documents,
            compare=comparison if compare or min_recall else None,
            min_recall=min_recall,
            progress=lambda step, done, of: update(done, of, step),
        )
    if json:
        print_json(report.to_dict())
        return
    if report.compared:
        rows = [
            (mode, *report.compared[mode].values())
            for mode in report.compared
            if isinstance(report.compared[mode], dict)
        ]
        table(("mode", "recall before", "recall now", "overlap"), rows)
    say(
        f"knowledge {report.knowledge} v{report.version} is in {report.collection}: {report.rows} chunks, "
        f"{report.embedded} embedded in {report.seconds:.1f} s; writers waited {report.held_s:.1f} s. "
        f"`metier knowledge rollback` goes back to {report.before}"
    )


@contextmanager
def _opened(settings: Config) -> Iterator[tuple[Registry, Store]]:
    from retrieval.embedded import serve
    from retrieval.store import Store

    with serve(settings.store) as uri:
        store = Store(settings.store, uri)
        try:
            yield open_registry(settings), store
        finally:
            store.close()


def _named(settings: Config, words: Sequence[str], count: int, what: str) -> tuple[str, list[str]]:
    """The knowledge and the `count` words after it; the configuration's knowledge if it was left out."""
    if len(words) == count:
        return settings.knowledge.name, list(words)
    if len(words) == count + 1:
        return words[0], list(words[1:])
    raise BadInput(f"give {what}, with the name of the knowledge before it if it is not {settings.knowledge.name}")


def _numbers(settings: Config, words: Sequence[str], count: int) -> tuple[str, list[int]]:
    name, numbers = _named(settings, words, count, "a version" if count == 1 else "two versions")
    for word in numbers:
        if not word.removeprefix("v").isdigit():
            raise BadInput(f"'{word}' is not a version; give its number, as `metier knowledge versions` shows it")
    return name, [int(word.removeprefix("v")) for word in numbers]


def _counts(chunks: Sequence[Any]) -> Mapping[str, int]:
    kinds = [chunk.kind for chunk in chunks]
    return {"+": kinds.count("added"), "~": kinds.count("changed"), "-": kinds.count("removed")}


def _model(version: KnowledgeVersion) -> str:
    return f"{version.embedder.source.rpartition('/')[2]} ({version.embedder.dimension})"


def _short(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f", {len(names) - 4} more" if len(names) > 4 else "")


def _plain(value: Any) -> dict[str, Any]:
    import dataclasses

    dump: Callable[..., dict[str, Any]] | None = getattr(value, "model_dump", None)
    return dump(mode="json") if dump else dataclasses.asdict(value)
