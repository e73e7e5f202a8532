"""``metier data build``: training rows out of the documents that the live index holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.errors import BadInput, NotFound
from metier.console import print_json, progress, say, table
from metier.options import ConfigOption, JsonOption, SetOption, open_config, open_registry

if TYPE_CHECKING:
    from retrieval.types import Chunk
    from training.data.endpoint import Asked
    from training.data.pairs import Pair


class Builder(StrEnum):
    extractive = "extractive"
    template = "template"
    endpoint = "endpoint"


def build(
    output: Annotated[Path, typer.Option("--output", "-o", help="JSONL file to write the rows to.")],
    builder: Annotated[Builder, typer.Option(help="Rules, your templates, or a model behind an endpoint.")] = (
        Builder.extractive
    ),
    templates: Annotated[
        Path | None, typer.Option(help="YAML file of question templates, for --builder template.")
    ] = None,
    endpoint: Annotated[
        str | None, typer.Option(help="OpenAI-shaped API (https://host/v1); its key is read from METIER_BUILD_API_KEY.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Model to ask the endpoint for.")] = None,
    concurrency: Annotated[int, typer.Option(min=1, max=256, help="Requests in flight.")] = 4,
    limit: Annotated[int | None, typer.Option(min=1, help="Rows at most.")] = None,
    seed: Annotated[int, typer.Option(help="Decides which rows are made and their order.")] = 17,
    none: Annotated[float, typer.Option(help="Share of questions that the documents do not answer.")] = 0.1,
    two: Annotated[float, typer.Option(help="Share of questions over two documents.")] = 0.1,
    multi: Annotated[float, typer.Option(help="Share of follow-up questions.")] = 0.1,
    findable: Annotated[
        bool, typer.Option("--findable", help="Drop rows whose gold chunk the retriever does not find.")
    ] = False,
    avoid: Annotated[
        list[Path] | None, typer.Option(help="Held-out rows whose documents are left alone; by default data.heldout.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the output file.")] = False,
    config: ConfigOption = None,
    set_: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Build rows from the live documents: questions, answers, quotes, and questions without an answer."""
    settings = open_config(config, set_)
    _check_options(builder, output, templates, endpoint, model, force)
    from training.data.build import Shares, allowed
    from training.data.build import build as build_rows
    from training.data.live import open_live
    from training.data.pairs import count_flaws
    from training.data.rows import read_rows

    shares = Shares(none, two, multi)
    heldout = read_rows([str(file) for file in avoid] if avoid else settings.data.heldout)
    registry = open_registry(settings)
    with open_live(settings, registry) as live:
        chunks = allowed(live.chunks, heldout)
        avoided = {chunk.doc_id for chunk in live.chunks} - {chunk.doc_id for chunk in chunks}
        if not chunks:
            raise BadInput(
                "every document of the knowledge is one that held-out questions are answered from; give fewer with "
                "--avoid",
                param="avoid",
            )
        say(
            f"knowledge {settings.knowledge.name} v{live.version}: {len(chunks)} chunks, {len(avoided)} documents avoided"
        )
        rejected: Counter[str] = Counter()
        asked: Asked | None = None
        journal = output.with_name(output.name + ".part")
        if builder is Builder.endpoint:
            assert endpoint is not None and model is not None
            asked = _ask(endpoint, model, concurrency, chunks, journal, limit, seed)
            pairs, rejected = asked.pairs, asked.rejected
        else:
            pairs = count_flaws(_by_rule(chunks, templates), rejected)
        with progress("asking the retriever") as update:
            built = build_rows(
                pairs,
                chunks=chunks,
                live=live.chunks,
                heldout=heldout,
                retrieve=live.retrieve,
                shares=shares,
                limit=limit,
                seed=seed,
                top_k=settings.retrieval.top_k,
                only_findable=findable,
                progress=lambda done: update(done, None, "") if done % 25 == 0 else None,
            )
    if not built.rows:
        raise BadInput(
            f"nothing could be built from {len(chunks)} chunks ({_reasons(rejected) or 'no sentence fits a rule'}); "
            "try another --builder",
            param="builder",
        )
    written = output.with_name(output.name + ".new")
    written.write_text("".join(row.model_dump_json(exclude_none=True) + "\n" for row in built.rows), encoding="utf-8")
    written.replace(output)
    if asked is not None:
        journal.unlink()
    report = {
        "output": str(output),
        "builder": builder.value,
        "knowledge": settings.knowledge.name,
        "version": live.version,
        "chunks": len(chunks),
        "documents_avoided": len(avoided),
        "pairs": len(pairs),
        "rejected": dict(rejected.most_common()),
        "leaked": built.leaked,
        "rows": dict(built.kinds),
        "wanted": built.wanted,
        "languages": dict(Counter(row.language for row in built.rows)),
        "checked": dict(built.checked),
        "findable": dict(built.findable),
        "shown": dict(built.shown),
    }
    if asked is not None:
        report |= {"requests": asked.requests, "chunks_kept": asked.kept, "chunks_failed": asked.failed}
    if json:
        print_json(report)
        return
    table(
        ("kind", "rows", "retriever asked", "gold found", f"in the best {settings.retrieval.top_k}"),
        [
            (
                kind,
                built.kinds[kind],
                built.checked[kind],
                _share(built.findable[kind], built.checked[kind]),
                _share(built.shown[kind], built.checked[kind]),
            )
            for kind in ("single", "two", "multi", "none")
        ],
        title=f"{len(built.rows)} rows in {output}",
    )
    for kind, count in built.wanted.items():
        if built.kinds[kind] < count:
            say(f"only {built.kinds[kind]} of {count} rows of kind {kind} could be made from these documents")
    if rejected:
        say(f"rejected: {_reasons(rejected)}")
    if built.leaked:
        say(f"{built.leaked} rows came close to held-out questions and were left out")
    if asked is not None and asked.failed:
        say(f"{asked.failed} chunks got no answer from the endpoint")


def _check_options(
    builder: Builder, output: Path, templates: Path | None, endpoint: str | None, model: str | None, force: bool
) -> None:
    if (templates is not None) != (builder is Builder.template):
        raise BadInput("--templates FILE and --builder template go together; give both or neither", param="templates")
    if builder is Builder.endpoint and not (endpoint and model):
        raise BadInput("--builder endpoint needs --endpoint URL and --model NAME", param="endpoint")
    if builder is not Builder.endpoint and (endpoint or model):
        raise BadInput("--endpoint and --model go with --builder endpoint; add it", param="builder")
    if output.exists() and not force:
        raise BadInput(f"{output} is already there; add --force to replace it, or name another file", param="output")
    if not output.absolute().parent.is_dir():
        raise NotFound(f"{output.parent}: no such directory for --output; make it first", param="output")


def _by_rule(chunks: Sequence[Chunk], templates: Path | None) -> list[Pair]:
    from training.data import extract, template

    if templates is None:
        return list(extract.pairs(chunks))
    return list(template.pairs(chunks, template.read_templates(templates)))


def _ask(
    url: str, model: str, concurrency: int, chunks: Sequence[Chunk], file: Path, limit: int | None, seed: int
) -> Asked:
    from training.data.endpoint import Endpoint, Journal, ask

    with Journal(file, model) as journal, progress("asking the model", len(chunks)) as update:
        return ask(
            Endpoint(url, model, concurrency),
            chunks,
            journal,
            limit=limit,
            seed=seed,
            on_chunk=lambda settled: update(settled, len(chunks), ""),
        )


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if whole else "-"


def _reasons(rejected: Counter[str]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in rejected.most_common())
