"""``metier search``: the passages a question finds, with their scores."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from cluster.errors import NotFound
from metier.console import out, print_json, say
from metier.options import ConfigOption, JsonOption, SetOption, open_config, open_registry


def search(
    question: Annotated[str, typer.Argument(help="What to look for.")],
    config: ConfigOption = None,
    set_: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Show the passages the retriever finds for a question in the newest knowledge version."""
    settings = open_config(config, set_)
    from cluster.models import resolve
    from retrieval.embed import Embedder
    from retrieval.embedded import serve
    from retrieval.retriever import Retriever
    from retrieval.store import Store
    from retrieval.types import Principal

    version = open_registry(settings).knowledge_head(settings.knowledge.name)
    if version == 0:
        raise NotFound(f"knowledge '{settings.knowledge.name}' is empty; run `metier index` first")
    embedder = Embedder(resolve(settings.embedder, settings.models_cache), settings.embedder)
    with serve(settings.store) as uri:
        found = Retriever(Store(settings.store, uri), embedder).retrieve(
            question,
            knowledge=settings.knowledge.name,
            version=version,
            principal=Principal(settings.knowledge.tenant, settings.knowledge.groups),
            settings=settings.retrieval,
        )
    if json:
        print_json(asdict(found))
        return
    if not found.passages:
        say(f"nothing reaches retrieval.min_score ({settings.retrieval.min_score})")
    for number, passage in enumerate(found.passages, 1):
        scores = "  ".join(f"{stage} {score:.3f}" for stage, score in passage.scores.items())
        out.print(f"[bold]\\[{number}] {passage.title} > {passage.heading}[/bold]  {passage.source}  ({scores})")
        out.print(f"    {passage.text}", markup=False)
