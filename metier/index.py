"""``metier index``: documents -> chunks -> vectors -> a new knowledge version."""

from __future__ import annotations

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


def index(
    config: ConfigOption = None,
    set_: SetOption = None,
    on: OnOption = None,
    detach: DetachOption = False,
    json: JsonOption = False,
) -> None:
    """Read knowledge.documents and bring the index in step with them; what did not change is not embedded again."""
    settings = open_config(config, set_)
    if run_on(settings, on, ["index"], detach=detach, json=json):
        return
    from cluster.models import resolve
    from retrieval.embed import Embedder
    from retrieval.embedded import serve
    from retrieval.ingest import ingest
    from retrieval.store import Store

    registry = open_registry(settings)
    embedder = Embedder(resolve(settings.embedder, settings.models_cache), settings.embedder)
    with serve(settings.store) as uri, progress("indexing") as update:
        store = Store(settings.store, uri)
        report = ingest(settings, store, embedder, registry, progress=lambda step, done, of: update(done, of, step))
    for problem in report.problems:
        say(f"skipped {problem.source}: {problem.reason}")
    if json:
        print_json(report.to_dict())
        return
    say(
        f"knowledge {report.knowledge} v{report.version}: {report.documents} documents, {report.chunks} chunks "
        f"(+{report.added} ~{report.updated} -{report.removed} ={report.unchanged}) in {report.seconds:.1f} s"
    )
