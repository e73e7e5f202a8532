"""``metier search``: the passages a question finds, why, and what the modes make of it side by side."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cluster.config import Config, RetrievalConfig
from metier.console import out, print_json, say, table
from metier.options import ConfigOption, JsonOption, SetOption, open_config, open_registry

if TYPE_CHECKING:
    from retrieval.explain import Explanation
    from retrieval.retriever import Trace
    from retrieval.types import Passage, Snapshot

WIDEST = 100
"""Columns of a comparison, on however wide a terminal."""
TEXT_LINES = 3
"""Of each passage that are shown; ``--json`` has all of it."""
NEAR = 3
"""Candidates that were left out and are named by ``--explain``."""
Mode = Literal["dense", "bm25", "hybrid"]


def search(
    question: Annotated[str, typer.Argument(help="What to look for.")],
    mode: Annotated[Mode | None, typer.Option(help="Instead of retrieval.mode.")] = None,
    top_k: Annotated[
        int | None, typer.Option(min=1, max=50, help="Passages shown, instead of retrieval.top_k.")
    ] = None,
    where: Annotated[
        str | None, typer.Option(metavar="FILTER", help="Only passages like this: 'product=ferry and year>=2024'.")
    ] = None,
    version: Annotated[int | None, typer.Option(min=1, help="Knowledge version; the newest by default.")] = None,
    knowledge: Annotated[str | None, typer.Option(metavar="NAME", help="Instead of knowledge.name.")] = None,
    tenant: Annotated[str | None, typer.Option(help="Search as this tenant, instead of knowledge.tenant.")] = None,
    group: Annotated[
        list[str] | None,
        typer.Option(help="Search as a member of this group (may be repeated), instead of knowledge.groups."),
    ] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Say why each passage was found, and what was not.")
    ] = False,
    compare: Annotated[bool, typer.Option("--compare", help="Lay the modes side by side.")] = False,
    config: ConfigOption = None,
    set_: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Show the passages the retriever finds for a question."""
    given = {"retrieval.mode": mode, "knowledge.name": knowledge, "knowledge.tenant": tenant}
    settings = open_config(config, [*(set_ or ()), *(f"{key}={value}" for key, value in given.items() if value)])
    retrieval = settings.retrieval
    if top_k is not None:
        retrieval = retrieval.model_copy(update={"top_k": top_k, "candidates": max(top_k, retrieval.candidates)})
    from retrieval.embedded import serve
    from retrieval.embedders import Embedders
    from retrieval.filters import parse_where
    from retrieval.rerank import load_reranker
    from retrieval.retriever import Retriever
    from retrieval.store import Store
    from retrieval.types import Principal, Snapshot

    condition = parse_where(where) if where is not None else None
    name = settings.knowledge.name
    snapshot = Snapshot.of(name, open_registry(settings).knowledge_version(name, version or "head"))
    principal = Principal(settings.knowledge.tenant, tuple(group or settings.knowledge.groups))
    ways = _ways(settings, retrieval) if compare else {"": retrieval}
    reranker = load_reranker(settings) if any(way.rerank for way in ways.values()) else None
    with serve(settings.store) as uri:
        store = Store(settings.store, uri)
        embedders = Embedders(settings.embedder, settings.models_cache)
        retriever = Retriever(store, embedders, reranker)
        try:
            if any(way.mode != "bm25" for way in ways.values()):
                embedders(snapshot.embedder)  # loading it is no part of a question's time
            traces = {
                way: retriever.trace(question, snapshot, principal=principal, settings=asked, where=condition)
                for way, asked in ways.items()
            }
        finally:
            store.close()
    if compare:
        _print_comparison(traces, json=json)
    elif explain:
        _print_explained(traces[""], snapshot, retrieval, json=json)
    else:
        _print_found(traces[""], retrieval, json=json)


def _ways(settings: Config, retrieval: RetrievalConfig) -> dict[str, RetrievalConfig]:
    """What is compared: each mode by itself, and hybrid reranked where there is a reranker."""
    modes: tuple[Mode, ...] = ("dense", "bm25", "hybrid")
    ways: dict[str, RetrievalConfig] = {}
    for mode in modes:
        ways[mode] = retrieval.model_copy(update={"mode": mode, "rerank": 0})
    if settings.reranker is not None:
        count = retrieval.rerank or retrieval.candidates
        ways["reranked"] = retrieval.model_copy(update={"mode": "hybrid", "rerank": count})
    return ways


def _print_found(trace: Trace, retrieval: RetrievalConfig, *, json: bool) -> None:
    if json:
        print_json(asdict(trace.retrieved))
        return
    _say_if_none(trace, retrieval)
    for number, passage in enumerate(trace.retrieved.passages, 1):
        _print_passage(number, passage)


def _print_explained(trace: Trace, snapshot: Snapshot, retrieval: RetrievalConfig, *, json: bool) -> None:
    from retrieval.explain import cuts, dense_share, explain, left_out

    share = dense_share(retrieval, snapshot)
    explained = explain(trace, trace.retrieved.passages)
    near = left_out(trace, NEAR)
    if json:
        print_json(
            asdict(trace.retrieved)
            | {
                "queries": [searched.query for searched in trace.searched],
                "mode": retrieval.mode,
                "dense_weight": share,
                "best_cosine": trace.cosine,
                "min_score": None if retrieval.mode == "bm25" else retrieval.min_score,
                "declined": trace.declined,
                "why": [{"ranks": each.ranks, "words": each.words} for each in explained],
                "left_out": [asdict(passage) for passage in near],
            }
        )
        return
    found = trace.retrieved
    fusion = "" if share is None else f", fused by score: vectors {share:.2f}, words {1 - share:.2f}"
    if retrieval.mode == "hybrid" and share is None:
        fusion = ", fused by rank"
    say(f"knowledge '{found.knowledge}' v{found.version}, {retrieval.mode}{fusion}")
    for searched in trace.searched:
        say(f"candidates: {len(searched.dense)} by vectors, {len(searched.words)} by words")
    for line in cuts(trace, snapshot):
        say(f"cut: {line}")
    if trace.cosine is not None:
        verdict = "under" if trace.declined else "reaches"
        say(f"floor: the best cosine, {trace.cosine:.3f}, {verdict} retrieval.min_score = {retrieval.min_score:g}")
    say("took: " + ", ".join(f"{stage} {1000 * seconds:.1f} ms" for stage, seconds in found.seconds.items()))
    _say_if_none(trace, retrieval)
    for number, each in enumerate(explained, 1):
        _print_passage(number, each.passage)
        out.print(f"    {_why(each)}", markup=False, soft_wrap=True)
    if near:
        out.print("Left out:", style="bold")
        for passage in near:
            out.print(f"  - {_place(passage)}  {_scores(passage)}", markup=False, soft_wrap=True)
            out.print(f"    {_cut(' '.join(passage.text.split()), out.width - 4)}", markup=False)


def _print_comparison(traces: dict[str, Trace], *, json: bool) -> None:
    if json:
        print_json({way: asdict(trace.retrieved) for way, trace in traces.items()})
        return
    width = min(out.width, WIDEST)
    cell = (width - 4) // len(traces) - 2
    columns = [trace.retrieved.passages for trace in traces.values()]
    names: dict[str, str] = {}
    for passage in (passage for column in columns for passage in column):
        names.setdefault(passage.chunk_id, f"[{len(names) + 1}]")
    rows: list[list[object]] = []
    for rank in range(max(map(len, columns))):
        row: list[object] = [str(rank + 1)]
        for column in columns:
            row.append(_cell(names, column[rank], cell) if rank < len(column) else "")
        rows.append(row)
    table(("", *traces), rows)
    for way, trace in traces.items():
        took = 1000 * sum(trace.retrieved.seconds.values())
        note = "; declined: nothing reaches retrieval.min_score" if trace.declined else ""
        out.print(f"{way}: {took:.0f} ms{note}", markup=False)
    shown = {passage.chunk_id: passage for column in columns for passage in column}
    for key, name in names.items():
        text = f"{name} {_place(shown[key])}: {' '.join(shown[key].text.split())}"
        out.print(_cut(text, width), markup=False)


def _print_passage(number: int, passage: Passage) -> None:
    out.print(f"[{number}] {_place(passage)}  {_scores(passage)}", style="bold", markup=False, soft_wrap=True)
    room = TEXT_LINES * max(out.width - 4, 20)
    out.print(f"    {_cut(' '.join(passage.text.split()), room)}", markup=False)


def _say_if_none(trace: Trace, retrieval: RetrievalConfig) -> None:
    if trace.declined and trace.cosine is not None:
        say(f"nothing reaches retrieval.min_score ({retrieval.min_score:g}): the best cosine is {trace.cosine:.3f}")
    elif not trace.retrieved.passages:
        say("nothing was found that this tenant and these groups may read")


def _why(each: Explanation) -> str:
    scores, ranks = each.passage.scores, each.ranks
    reasons = []
    if "dense" in ranks:
        reasons.append(f"vectors: rank {ranks['dense']}, cosine {scores['dense']:.3f}")
    if "bm25" in ranks:
        reasons.append(f"words: rank {ranks['bm25']}, BM25 {scores['bm25']:.2f} ({', '.join(each.words)})")
    elif each.words:
        reasons.append(f"words it holds: {', '.join(each.words)}")
    if "fused" in ranks:
        reasons.append(f"fused: rank {ranks['fused']}, {scores['fused']:.3f}")
    if "rerank" in ranks:
        reasons.append(f"reranked: rank {ranks['rerank']}, {scores['rerank']:.3f}")
    if "mmr" in scores:
        reasons.append(f"kept apart from those above: {scores['mmr']:.3f}")
    return "; ".join(reasons)


def _place(passage: Passage) -> str:
    title = passage.title if not passage.heading else f"{passage.title} > {passage.heading}"
    page = f" p. {passage.page}" if passage.page else ""
    return f"{title}  {passage.source}{page}"


def _scores(passage: Passage) -> str:
    return f"({'  '.join(f'{stage} {score:.3f}' for stage, score in passage.scores.items())})"


def _cell(names: dict[str, str], passage: Passage, width: int) -> str:
    name, score = names[passage.chunk_id], f" {passage.score:.3f}"
    room = width - len(name) - len(score) - 1
    return f"{name} {_cut(f'{passage.doc_id}#{passage.position}', room).ljust(room)}{score}"


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
