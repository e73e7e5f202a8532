"""``metier eval retrieval``: how well the retriever finds what test collections in BEIR layout ask for."""

from __future__ import annotations

import json as jsonlib
from contextlib import ExitStack
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.errors import BadInput
from metier.console import progress, say, table
from metier.options import ConfigOption, SetOption, open_config

if TYPE_CHECKING:
    from evaluation.retrieval import Evaluated

COMPARED = "nDCG@10"
"""The measure in which modes are compared pair by pair."""


def retrieval(
    beir: Annotated[
        list[Path],
        typer.Option("--beir", metavar="DIR", help="Folder with corpus.jsonl, queries.jsonl, qrels/; may be repeated."),
    ],
    modes: Annotated[
        str, typer.Option(help="Of dense, bm25, hybrid (as retrieval.fusion says), auto, rrf, weighted.")
    ] = "dense,bm25,hybrid",
    split: Annotated[str, typer.Option(help="Which qrels/SPLIT.tsv.")] = "test",
    top_k: Annotated[int, typer.Option(min=1, max=1000, help="Documents that count.")] = 100,
    floor: Annotated[bool, typer.Option("--floor", help="Let retrieval.min_score decline questions.")] = False,
    json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write mode -> measure -> value to this file.")
    ] = None,
    details: Annotated[
        Path | None,
        typer.Option("--details", metavar="FILE", help="Write values of every question, times and settings as JSON."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Draw the means to this PNG file.")
    ] = None,
    config: ConfigOption = None,
    set_: SetOption = None,
) -> None:
    """Index each folder into a throw-away collection, ask all its questions in each mode, and print the measures.

    Nothing of it stays in the store or the registry. Several folders: the JSON is folder -> mode -> measure -> value.
    """
    settings = open_config(config, set_)
    wanted = [mode.strip() for mode in modes.split(",") if mode.strip()]
    from cluster.models import resolve
    from evaluation.beir import read_beir
    from evaluation.retrieval import check_modes, evaluate
    from retrieval.embed import Embedder
    from retrieval.embedded import serve
    from retrieval.rerank import Reranker
    from retrieval.store import Store

    check_modes(wanted)
    collections = [read_beir(directory, split) for directory in beir]
    if len({one.name for one in collections}) < len(collections):
        raise BadInput("two folders of --beir have the same name; rename one, as results go by it", param="beir")
    embedder = Embedder(resolve(settings.embedder, settings.models_cache), settings.embedder)
    reranker = None
    if settings.retrieval.rerank and settings.reranker:
        reranker = Reranker(resolve(settings.reranker, settings.models_cache), settings.reranker)
    evaluated: dict[str, Evaluated] = {}
    with ExitStack() as stack:
        store = Store(settings.store, stack.enter_context(serve(settings.store)))
        stack.callback(store.close)
        for collection in collections:
            with _Bars(collection.name) as bars:
                evaluated[collection.name] = evaluate(
                    settings,
                    collection,
                    wanted,
                    store=store,
                    embedder=embedder,
                    reranker=reranker,
                    top_k=top_k,
                    floor=floor,
                    progress=bars.update,
                )
    for name, result in evaluated.items():
        _print(name, result)
    means = {name: {mode: one.means() for mode, one in result.modes.items()} for name, result in evaluated.items()}
    if json:
        _write(json, means if len(means) > 1 else next(iter(means.values())))
    if details:
        retriever = settings.retrieval.model_dump(mode="json")
        _write(details, {"retrieval": retriever, "folders": {name: asdict(one) for name, one in evaluated.items()}})
    if plot:
        from evaluation.retrieval_plot import retrieval_plot

        retrieval_plot(evaluated, plot)
        say(f"the plot is in {plot}")


class _Bars:
    """A progress bar for indexing, then one for each mode."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._doing = ""
        self._stack = ExitStack()

    def __enter__(self) -> _Bars:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def update(self, doing: str, done: int, of: int) -> None:
        if doing != self._doing:
            self._stack.close()
            self._doing = doing
            self._update = self._stack.enter_context(progress(f"{self._name}, {doing}", of))
        self._update(done, of, "")


def _print(name: str, result: Evaluated) -> None:
    from evaluation.retrieval import randomization_test
    from evaluation.statistics import paired_interval

    measures = list(next(iter(result.modes.values())).values)
    means = {mode: one.means() for mode, one in result.modes.items()}
    latency = {mode: one.latency() for mode, one in result.modes.items()}
    table(
        ("mode", *measures, "p50 ms", "p95 ms"),
        [
            (mode, *(f"{of[measure]:.3f}" for measure in measures), *(f"{ms:.1f}" for ms in latency[mode].values()))
            for mode, of in means.items()
        ],
        title=f"{name}: {result.documents} documents in {result.chunks} chunks, {result.queries} questions, "
        f"{result.candidates} candidates a side",
    )
    pairs = []
    for first, second in combinations(reversed(result.modes), 2):
        ours, theirs = (result.modes[mode].values[COMPARED] for mode in (first, second))
        interval = paired_interval(ours, theirs, resamples=2000)
        bounds = f"[{interval.low:+.3f}, {interval.high:+.3f}]"
        pairs.append(
            (f"{first} - {second}", f"{interval.mean:+.3f}", bounds, f"{randomization_test(ours, theirs):.4f}")
        )
    if pairs and COMPARED in measures:
        table((f"difference of {COMPARED}", "mean", "95 % interval", "p"), pairs)


def _write(path: Path, value: Any) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(jsonlib.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise BadInput(f"{path} cannot be written ({error.strerror}); name another file") from None
    say(f"{path} is written")
