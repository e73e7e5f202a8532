"""Documents -> a new version of a collection: read, chunk, compare with what is live, embed what is new, write.

A run leaves version ``head + 1``, or ``head`` if nothing changed. The registry entry is written last and is what
makes the version visible. Until then all that was written is outside ``head`` (``born`` or ``died`` just beyond it),
so a run killed anywhere changes no answer, and the next one first undoes what it left (:func:`repair`).

One writer per collection at a time. Not covered: removing rows that no version needs any more, documents of several
tenants in one run, distributed ingestion.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from cluster.config import Config, KnowledgeConfig
from cluster.errors import Mismatch, NotFound
from retrieval.chunk import CountTokens, chunk
from retrieval.embed import Embeds, embedding_text
from retrieval.filters import And, Compare, Condition, In, Or, live
from retrieval.read import Problem, read
from retrieval.store import ALIVE, PAGE, Row, Store
from retrieval.types import Document

Progress = Callable[[str, int, int], None]
"""Told the stage (``chunk``, ``write``), how much of it is done, and of how much."""
COMPARED = ("title", "heading", "text", "search_text", "source", "position", "groups", "metadata")
"""Columns of which any change makes a new row."""


class Registry(Protocol):
    """What ingest needs of the registry: the head of a collection, and a place for the next one."""

    def knowledge_head(self, name: str) -> int: ...
    def knowledge_append(self, name: str, entry: dict[str, Any]) -> int: ...


@dataclass(frozen=True)
class IngestReport:
    """What one run did. Counts are of chunks unless they say otherwise."""

    knowledge: str
    version: int
    """The head after the run."""
    documents: int
    """Documents read."""
    chunks: int
    """Chunks that this tenant has in `version`."""
    added: int
    updated: int
    """Same text in the same place, with another title, source, position, groups or metadata."""
    removed: int
    unchanged: int
    embedded: int
    """Chunks that went through the embedder."""
    problems: tuple[Problem, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def ingest(
    config: Config, store: Store, embedder: Embeds, registry: Registry, *, progress: Progress = lambda *_: None
) -> IngestReport:
    """Bring the collection ``config.knowledge.name`` in line with the directory ``config.knowledge.documents``.

    Only rows of ``config.knowledge.tenant`` are compared and replaced. Running it again changes nothing. A file that
    cannot be read counts as removed, and is among the report's problems.

    Raises:
        NotFound: the directory is not set, not there, or holds no readable document: far more often a volume that is
            not mounted than a wish to forget everything.
        Mismatch: the collection was embedded by another model, or written through another registry.
    """
    started = time.perf_counter()
    knowledge = config.knowledge
    if knowledge.documents is None:
        raise NotFound("knowledge.documents is not set; name a directory of documents", param="knowledge.documents")
    documents, problems = read(knowledge.documents)
    if not documents:
        skipped = f" ({len(problems)} skipped, first {problems[0].source}: {problems[0].reason})" if problems else ""
        raise NotFound(f"{knowledge.documents} holds no .md or .txt document{skipped}", param="knowledge.documents")

    store.create(knowledge.name, embedder=embedder.fingerprint, dimension=embedder.dimension)
    head = registry.knowledge_head(knowledge.name)
    repair(store, knowledge.name, head)
    wanted = {row["chunk_id"]: row for row in rows(documents, knowledge, embedder.count_tokens, progress)}
    present = {row["chunk_id"]: row for row in live_rows(store, knowledge, head)}
    written = {key: row for key, row in wanted.items() if key not in present or differ(row, present[key])}
    retired = [row["row_id"] for key, row in present.items() if key not in wanted or key in written]

    version, done, embedded = head, 0, 0
    if written or retired:
        version = head + 1
        for page, count in with_vectors(written, present, store, knowledge.name, embedder):
            store.upsert(knowledge.name, [row | _lifetime(row, version) for row in page])
            done, embedded = done + len(page), embedded + count
            progress("write", done, len(written))
        store.set_died(knowledge.name, retired, version)
        _verify(store, knowledge, version, len(wanted))
    report = IngestReport(
        knowledge=knowledge.name,
        version=version,
        documents=len(documents),
        chunks=len(wanted),
        added=len(written.keys() - present.keys()),
        updated=len(written.keys() & present.keys()),
        removed=len(present.keys() - wanted.keys()),
        unchanged=len(wanted.keys() - written.keys()),
        embedded=embedded,
        problems=tuple(problems),
        seconds=round(time.perf_counter() - started, 3),
    )
    if version != head:
        _publish(registry, report, tenant=knowledge.tenant, embedder=embedder.fingerprint)
    return report


def repair(store: Store, knowledge: str, head: int) -> None:
    """Undo what a run that was killed before its registry entry has written.

    Raises:
        Mismatch: the collection is more than one version ahead, so another registry than this one wrote it.
    """
    ahead = Or((Compare("born", ">", head + 1), And((Compare("died", ">", head + 1), Compare("died", "<", ALIVE)))))
    if store.count(knowledge, ahead):
        raise Mismatch(
            f"knowledge '{knowledge}' in Milvus is ahead of version {head}, the last one in the registry; "
            "storage.url and store.uri do not belong together, or the registry was lost: set them right, or ingest "
            "under another knowledge.name"
        )
    store.delete(knowledge, Compare("born", "==", head + 1))
    ended = [row["row_id"] for row in store.rows(knowledge, Compare("died", "==", head + 1), ["row_id"])]
    store.set_died(knowledge, ended, ALIVE)


def rows(
    documents: list[Document], knowledge: KnowledgeConfig, count_tokens: CountTokens, progress: Progress
) -> Iterator[Row]:
    """The rows that `documents` should have, without vectors and lifetimes."""
    for done, document in enumerate(documents, start=1):
        for piece in chunk(
            document,
            chunk_tokens=knowledge.chunk_tokens,
            overlap_tokens=knowledge.overlap_tokens,
            count_tokens=count_tokens,
        ):
            yield asdict(piece) | {
                "search_text": embedding_text(piece),
                "tenant": knowledge.tenant,
                "groups": sorted(set(knowledge.groups)),
            }
        progress("chunk", done, len(documents))


def live_rows(store: Store, knowledge: KnowledgeConfig, version: int) -> Iterator[Row]:
    """The rows that the tenant has in `version`, without vectors."""
    return store.rows(knowledge.name, _mine(knowledge, version), ["row_id", "chunk_id", *COMPARED])


def _mine(knowledge: KnowledgeConfig, version: int) -> Condition:
    return And((Compare("tenant", "==", knowledge.tenant), live(version)))


def _verify(store: Store, knowledge: KnowledgeConfig, version: int, expected: int) -> None:
    """What is about to become visible is what was wanted: no rows of a concurrent run, none taken away by one."""
    found = store.count(knowledge.name, _mine(knowledge, version))
    if found != expected:
        raise Mismatch(
            f"version {version} of knowledge '{knowledge.name}' would hold {found} chunks instead of {expected}, so "
            "another run is writing it; it stays invisible: ingest again when the other has ended"
        )


def differ(wanted: Row, present: Row) -> bool:
    """Whether the row must be written again."""
    return any(wanted[column] != present[column] for column in COMPARED)


def with_vectors(
    written: Mapping[str, Row], present: Mapping[str, Row], store: Store, knowledge: str, embedder: Embeds
) -> Iterator[tuple[list[Row], int]]:
    """Pages of `written` with their vectors, and how many of each page were embedded.

    A row whose words are those of its predecessor in `present` takes over its vector.
    """
    reusable = {
        row["row_id"]: key
        for key, row in present.items()
        if key in written and row["search_text"] == written[key]["search_text"]
    }
    predecessors = {key: row_id for row_id, key in reusable.items()}
    for page in _pages(written.values()):
        known = In("row_id", [predecessors[row["chunk_id"]] for row in page if row["chunk_id"] in predecessors])
        vectors = {reusable[row["row_id"]]: row["dense"] for row in store.rows(knowledge, known, ["row_id", "dense"])}
        new = [row for row in page if row["chunk_id"] not in vectors]
        embedded = embedder.embed([row["search_text"] for row in new]).tolist()
        vectors |= zip((row["chunk_id"] for row in new), embedded, strict=True)
        yield [row | {"dense": vectors[row["chunk_id"]]} for row in page], len(new)


def _pages(items: Iterable[Row]) -> Iterator[list[Row]]:
    ordered = list(items)
    for start in range(0, len(ordered), PAGE):
        yield ordered[start : start + PAGE]


def _lifetime(row: Row, version: int) -> Row:
    return {"row_id": f"{row['chunk_id']}-{version}", "born": version, "died": ALIVE}


def _publish(registry: Registry, report: IngestReport, *, tenant: str, embedder: str) -> None:
    entry = report.to_dict() | {"tenant": tenant, "embedder": embedder}
    del entry["knowledge"], entry["version"]  # the registry states both, and decides the latter
    version = registry.knowledge_append(report.knowledge, entry)
    if version != report.version:
        raise Mismatch(
            f"another run wrote version {report.version} of knowledge '{report.knowledge}' meanwhile; ingest again"
        )
