"""The current knowledge version, as the principal of ``config.knowledge`` may read it: its chunks, and a retriever."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import cached_property

from cluster.config import Config
from cluster.errors import NotFound
from cluster.registry import Registry
from retrieval.embedded import serve
from retrieval.embedders import Embedders
from retrieval.filters import readable
from retrieval.query import search_query
from retrieval.rerank import load_reranker
from retrieval.retriever import Retriever
from retrieval.store import Store
from retrieval.types import Chunk, Passage, Principal, Snapshot
from training.data.grounded import Retrieve

COLUMNS = tuple(column.name for column in fields(Chunk) if column.name != "metadata")


@dataclass(frozen=True)
class Live:
    """What stands in the index now."""

    version: int
    chunks: tuple[Chunk, ...]
    """By document, in reading order."""
    retrieve: Retrieve
    """Conversation -> ``retrieval.candidates`` passages, best first, nothing cut by a score floor."""
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Groups that may read each document."""

    @cached_property
    def by_document(self) -> Mapping[str, Sequence[Chunk]]:
        """The chunks of each document."""
        found: dict[str, list[Chunk]] = defaultdict(list)
        for chunk in self.chunks:
            found[chunk.doc_id].append(chunk)
        return found


@contextmanager
def open_live(config: Config, registry: Registry) -> Iterator[Live]:
    """The knowledge ``config.knowledge.name``, with the embedded Milvus running for the length of the ``with`` block.

    Raises:
        NotFound: nothing was indexed under that name, or nothing that its tenant and groups may read.
    """
    knowledge = config.knowledge
    snapshot = Snapshot.of(knowledge.name, registry.knowledge_version(knowledge.name))
    principal = Principal(knowledge.tenant, knowledge.groups)
    # Evidence is told by chunk, so passages are not joined with their neighbours here.
    changes = {"top_k": config.retrieval.candidates, "min_score": -1.0, "neighbours": 0}
    settings = config.retrieval.model_copy(update=changes)
    with serve(config.store) as uri:
        store = Store(config.store, uri)
        groups: dict[str, tuple[str, ...]] = {}
        chunks = []
        for row in store.rows(snapshot.collection, readable(principal, snapshot.reads), (*COLUMNS, "groups")):
            groups[row["doc_id"]] = tuple(row["groups"])
            chunks.append(Chunk(**{column: row[column] for column in COLUMNS}))
        if not chunks:
            raise NotFound(
                f"knowledge '{knowledge.name}' v{snapshot.version} holds nothing that tenant '{knowledge.tenant}' and groups "
                f"{', '.join(knowledge.groups)} may read; check knowledge.tenant and knowledge.groups",
                param="knowledge.groups",
            )
        reranker = load_reranker(config) if settings.rerank else None
        retriever = Retriever(store, Embedders(config.embedder, config.models_cache), reranker)

        def retrieve(conversation: Sequence[dict[str, str]]) -> Sequence[Passage]:
            return retriever.retrieve(
                search_query(conversation),
                snapshot,
                principal=principal,
                settings=settings,
            ).passages

        try:
            ordered = tuple(sorted(chunks, key=lambda chunk: (chunk.doc_id, chunk.position)))
            yield Live(snapshot.version, ordered, retrieve, groups)
        finally:
            store.close()
