"""``metier index``: documents -> chunks -> vectors -> a new knowledge version; once, or for as long as it runs."""

from __future__ import annotations

import json as jsonlib
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.config import Config
from cluster.errors import BadInput
from metier.console import print_json, progress, say
from metier.options import (
    ConfigOption,
    DetachOption,
    JsonOption,
    OnOption,
    SetOption,
    open_config,
    open_registry,
    run_on,
)

if TYPE_CHECKING:
    from retrieval.embed import Embeds
    from retrieval.ingest import IngestReport
    from retrieval.read import Problem
    from retrieval.steps import Read, Steps
    from retrieval.store import Store
    from retrieval.watch import Index

SHOWN = 20
"""Problems that are told one by one; the report of ``--json`` has all."""
SyncOption = Annotated[
    str | None,
    typer.Option(
        "--sync", metavar="DIR|URL", help="These documents instead of knowledge.documents: a directory, s3://…"
    ),
]
WatchOption = Annotated[
    bool, typer.Option("--watch", "-w", help="Go on: index every change of the documents, until Ctrl-C.")
]


def index(
    config: ConfigOption = None,
    set_: SetOption = None,
    sync: SyncOption = None,
    watch: WatchOption = False,
    on: OnOption = None,
    detach: DetachOption = False,
    json: JsonOption = False,
) -> None:
    """Read knowledge.documents and bring the index in step with them; what did not change is not embedded again.

    With ingestion.workers, it runs on the Ray cluster of ray.address.
    """
    place = [f"knowledge.documents={jsonlib.dumps(sync)}"] if sync is not None else []
    settings = open_config(config, [*(set_ or ()), *place])
    verb = ["index", "--watch"] if watch else ["index"]
    if run_on(settings, on, verb, detach=detach, json=json):
        return
    from cluster.models import resolve
    from retrieval.calibrate import measured
    from retrieval.embed import Embedder
    from retrieval.embedded import serve
    from retrieval.ingest import apply, ingest
    from retrieval.store import Store
    from serving.knowledge.stores import Stores

    registry = open_registry(settings)
    if Stores(registry).made(settings.knowledge.name):
        raise BadInput(
            f"knowledge '{settings.knowledge.name}' is a vector store that was filled over the API, and would lose its "
            "files; upload there, or index under another knowledge.name",
            param="knowledge.name",
        )
    embedder = Embedder(resolve(settings.embedder, settings.models_cache), settings.embedder)
    with serve(settings.store) as uri:
        store = Store(settings.store, uri)
        measure = partial(measured, store, embedder)
        with _steps(settings, store, embedder, uri) as steps:
            if watch:

                def changed(read: Read, only: Sequence[str] | None) -> IngestReport:
                    with progress("indexing") as update:
                        return apply(
                            settings,
                            read,
                            store,
                            embedder,
                            registry,
                            only=only,
                            steps=steps,
                            measure=measure,
                            progress=lambda doing, done, of: update(done, of, doing),
                        )

                _follow(settings, changed, json=json)
                return
            with progress("indexing") as update:
                report = ingest(
                    settings,
                    store,
                    embedder,
                    registry,
                    steps=steps,
                    measure=measure,
                    progress=lambda doing, done, of: update(done, of, doing),
                )
    _tell(report, report.problems, json=json)


@contextmanager
def _steps(settings: Config, store: Store, embedder: Embeds, uri: str) -> Iterator[Steps]:
    """In this process, or with ``ingestion.workers`` on Ray for the length of the ``with``."""
    if not settings.ingestion.workers:
        from retrieval.steps import Here

        yield Here(store, embedder, settings.storage.options)
        return
    from cluster.runtime import connect
    from retrieval.ingest_ray import OnRay

    with connect(settings):
        yield OnRay(settings, uri, embedder.dimension)


def _follow(settings: Config, changed: Index, *, json: bool) -> None:
    """Index every change until Ctrl-C, which is how it is meant to end."""
    from retrieval.watch import Follower, follow

    told: set[Problem] = set()

    def done(report: IngestReport) -> None:
        _tell(report, [problem for problem in report.problems if problem not in told], json=json)
        told.clear()
        told.update(report.problems)

    place = settings.knowledge.documents or ""
    follower = Follower(settings.knowledge, settings.storage.options, changed)
    say(f"watching {place}; Ctrl-C ends it")
    try:
        follow(follower, place, settings.ingestion.interval_s, done=done, tell=say, stop=threading.Event())
    except KeyboardInterrupt:
        say(f"no longer watching {place}; what was indexed stays")


def _tell(report: IngestReport, problems: Sequence[Problem], *, json: bool) -> None:
    for problem in problems[:SHOWN]:
        say(f"{problem.kind} {problem.source}: {problem.reason}")
    if len(problems) > SHOWN:
        say(f"… and {len(problems) - SHOWN} more; --json lists them all")
    if json:
        print_json(report.to_dict())
        return
    rate = f", {report.embedded / report.seconds:.0f} embedded/s" if report.embedded else ""
    say(
        f"knowledge {report.knowledge} v{report.version}: {report.documents} documents, {report.chunks} chunks "
        f"(+{report.added} ~{report.updated} -{report.removed} ={report.unchanged}) in {report.seconds:.1f} s{rate}"
    )
