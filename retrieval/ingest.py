"""Documents -> a new version of a knowledge: compare with what is live, write what is new, let go what is gone.

A run leaves version ``head + 1``, or ``head`` if nothing changed. The registry entry is written last and is what
makes the version visible. Until then all that was written is outside ``head`` (``born`` or ``died`` just beyond it),
so a run killed anywhere changes no answer, and the next one goes on with what it left: rows that are still wanted
are not embedded again, the others are removed.

One writer per knowledge at a time: the second is refused (:meth:`cluster.registry.Registry.knowledge_claim`). The
steps themselves, and where they run: :mod:`retrieval.steps`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

from cluster.claim import Claim
from cluster.config import Config, EmbedderConfig
from cluster.errors import Mismatch, NotFound
from cluster.knowledge import EmbedderState, Forgotten, KnowledgeVersion
from retrieval.collection import STORED
from retrieval.embed import Embeds
from retrieval.filters import And, Compare, Condition, In, Not, Or, live
from retrieval.read import Problem
from retrieval.steps import Here, Progress, Read, Steps, Target, row_id
from retrieval.store import ALIVE, Row, Store, pages, physical
from retrieval.types import Document, Snapshot

Measure = Callable[[Snapshot], Mapping[str, Any]]
"""Asked about a version that is written and not visible yet; what it says is kept in the version's details."""


def nothing(snapshot: Snapshot) -> Mapping[str, Any]:
    return {}


class Registry(Protocol):
    """What ingest needs of the registry: the newest version, and a place for the next one."""

    def knowledge_next(self, name: str) -> int: ...
    def knowledge_latest(self, name: str) -> KnowledgeVersion | None: ...
    def knowledge_append(self, name: str, entry: dict[str, Any]) -> int: ...


@runtime_checkable
class Shared(Registry, Protocol):
    """A registry that others write to as well; one in memory, for a collection that is thrown away, is not."""

    def knowledge_claim(self, name: str, doing: str) -> AbstractContextManager[Claim]: ...
    def knowledge_forgotten(self, name: str) -> list[Forgotten]: ...


@dataclass(frozen=True)
class IngestReport:
    """What one run did. Counts are of chunks unless they say otherwise."""

    knowledge: str
    version: int
    """The head after the run."""
    documents: int
    """Documents read."""
    chunks: int
    """Chunks that these documents have in `version`."""
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
    config: Config,
    store: Store,
    embedder: Embeds,
    registry: Registry,
    *,
    steps: Steps | None = None,
    progress: Progress = lambda *_: None,
    measure: Measure = nothing,
) -> IngestReport:
    """Bring the knowledge ``config.knowledge.name`` in line with the documents at ``config.knowledge.documents``.

    Only rows of ``config.knowledge.tenant`` are compared and replaced. Running it again changes nothing. A file that
    cannot be read counts as removed, and is among the report's problems.

    Raises:
        NotFound: the directory is not set, not there, or holds no readable document: far more often a volume that is
            not mounted than a wish to forget everything.
        Mismatch: the collection was embedded by another model, or written through another registry; or another
            process writes it now.
    """
    documents = config.knowledge.documents
    if documents is None:
        raise NotFound("knowledge.documents is not set; name a directory of documents", param="knowledge.documents")
    steps = steps or Here(store, embedder, config.storage.options)
    with writing(registry, config.knowledge.name, "an ingest") as check:
        read = steps.read(config.knowledge, progress)
        if not read.count:
            first = read.problems[0] if read.problems else None
            skipped = f" ({len(read.problems)} skipped, first {first.source}: {first.reason})" if first else ""
            raise NotFound(f"{documents} holds no document that can be read{skipped}", param="knowledge.documents")
        return _apply(config, read, store, embedder, registry, None, steps, progress, measure, check)


def apply(
    config: Config,
    read: Read,
    store: Store,
    embedder: Embeds,
    registry: Registry,
    *,
    only: Sequence[str] | None = None,
    steps: Steps | None = None,
    progress: Progress = lambda *_: None,
    measure: Measure = nothing,
) -> IngestReport:
    """Make `read` the documents of the tenant; with `only`, those of these ids, and leave the others as they are.

    An id in `only` without a document in `read` is removed.

    Raises:
        Mismatch: as :func:`ingest`.
    """
    steps = steps or Here(store, embedder, config.storage.options)
    with writing(registry, config.knowledge.name, "an ingest") as check:
        return _apply(config, read, store, embedder, registry, only, steps, progress, measure, check)


@contextmanager
def writing(registry: Registry, knowledge: str, doing: str) -> Iterator[Callable[[], None]]:
    """Be the one writer of `knowledge`; yields what raises once that is no longer so.

    Raises:
        Mismatch: another process writes it.
    """
    if isinstance(registry, Shared):
        with registry.knowledge_claim(knowledge, doing) as claim:
            yield claim.check
    else:
        yield lambda: None


def _apply(
    config: Config,
    read: Read,
    store: Store,
    embedder: Embeds,
    registry: Registry,
    only: Sequence[str] | None,
    steps: Steps,
    progress: Progress,
    measure: Measure,
    check: Callable[[], None],
) -> IngestReport:
    started = time.perf_counter()
    knowledge = config.knowledge
    latest, version = registry.knowledge_latest(knowledge.name), registry.knowledge_next(knowledge.name)
    head, reads = (latest.number, latest.reads) if latest else (0, 0)
    collection = latest.collection if latest else physical(knowledge.name, version)
    store.create(collection, embedder=embedder.fingerprint, dimension=embedder.dimension)
    _check_not_ahead(store, collection, version)
    mine: Condition = Compare("tenant", "==", knowledge.tenant)
    if only is not None:
        mine = And((mine, In("doc_id", only)))
    _repair(store, collection, version, Not(mine))
    rolled_back = latest is not None and latest.reads != latest.number
    if rolled_back:
        _drop_carried(store, collection, version)

    there = _There(store, collection, mine, reads, version)
    target = Target(
        collection,
        version,
        knowledge.tenant,
        knowledge.groups,
        knowledge.chunk_tokens,
        knowledge.overlap_tokens,
        config.store.bm25.fold_diacritics,
    )
    problems = list(read.problems)
    gone = forgotten_in(registry, knowledge.name, knowledge.tenant)
    read, refused = without(read, gone)
    outcome = steps.index(read, target, there.known, progress)
    wanted = outcome.wanted
    changed = wanted != there.present
    if changed:
        there.settle(wanted, outcome.written)
        if rolled_back:
            _carry(store, collection, Not(mine), reads, version)
            rest = store.count(collection, And((Not(mine), live(reads))))
            _verify(store, knowledge.name, collection, And((Not(mine), live(version))), version, rest)
        _verify(store, knowledge.name, collection, And((mine, live(version))), version, len(wanted))
    else:
        _repair(store, collection, version, mine)
    report = IngestReport(
        knowledge=knowledge.name,
        version=version if changed else head,
        documents=read.count,
        chunks=len(wanted),
        added=len(wanted.keys() - there.present.keys()),
        updated=sum(digest != there.present.get(key, digest) for key, digest in wanted.items()),
        removed=len(there.present.keys() - wanted.keys()),
        unchanged=sum(digest == there.present.get(key) for key, digest in wanted.items()),
        embedded=outcome.embedded,
        problems=(*problems, *refused),
        seconds=round(time.perf_counter() - started, 3),
    )
    if changed:
        store.flush(collection)
        state = embedder_state(config.embedder, embedder)
        measured = measure(Snapshot(knowledge.name, version, version, collection, state))
        check()
        _publish(config, registry, report, collection, state, measured)
        store.point(knowledge.name, collection)
    return report


def forgotten_in(registry: Registry, knowledge: str, tenant: str | None) -> set[str]:
    """Documents of `tenant` (None: of every tenant) that an ingest does not bring back."""
    if not isinstance(registry, Shared):
        return set()
    return {one.doc_id for one in registry.knowledge_forgotten(knowledge) if one.tenant in (None, tenant)}


def without(read: Read, forgotten: set[str]) -> tuple[Read, list[Problem]]:
    """`read` without the documents that were forgotten, and these as problems."""
    if not forgotten:
        return read, []
    kept: list[Document] = []
    gone: list[Document] = []
    for document in read.documents:
        (gone if document.doc_id in forgotten else kept).append(document)
    reason = "it was forgotten; `metier knowledge forget --undo` lets it come back"
    problems = [Problem(document.source, reason) for document in gone]
    return replace(read, documents=kept, count=len(kept)), problems


class _Standing(NamedTuple):
    """A row that goes on living beyond the head if nothing is done."""

    digest: str
    row_id: str
    ended: bool
    """Whether a killed run let it end with the version that this run makes."""


class _There:
    """The rows of a collection that a run compares with: about 0.5 GB for a million."""

    def __init__(self, store: Store, collection: str, mine: Condition, reads: int, version: int) -> None:
        self._store, self._collection, self._version = store, collection, version
        self.present: dict[str, str] = {}
        """Chunk -> digest, as the head shows them."""
        self.standing: dict[str, _Standing] = {}
        """Chunk -> its row that is not of a killed run."""
        self.left: dict[str, str] = {}
        """Chunk -> digest of a row that a killed run wrote for the version that this run makes."""
        self.known: dict[str, tuple[str, ...]] = {}
        """Chunk -> digests of rows that need not be written."""
        relevant = And((mine, Or((Compare("died", ">=", version), live(reads)))))
        for row in store.rows(collection, relevant, ["row_id", "chunk_id", "digest", "born", "died"]):
            key, digest, born = row["chunk_id"], row["digest"], row["born"]
            if born <= reads < row["died"]:
                self.present[key] = digest
            if row["died"] >= version:
                if born == version:
                    self.left[key] = digest
                else:
                    self.standing[key] = _Standing(digest, row["row_id"], row["died"] != ALIVE)
                self.known[key] = (*self.known.get(key, ()), digest)

    def settle(self, wanted: dict[str, str], written: set[str]) -> None:
        """Let exactly the rows of `wanted` live in the version; each step may be the last, and may be done again."""
        keeps = {key for key, row in self.standing.items() if wanted.get(key) == row.digest}
        stray = [
            row_id(key, self._version)
            for key, digest in self.left.items()
            if key not in written and (key in keeps or wanted.get(key) != digest)
        ]
        retired = [row.row_id for key, row in self.standing.items() if key not in keeps and not row.ended]
        restored = [row.row_id for key, row in self.standing.items() if key in keeps and row.ended]
        for page in pages(stray):
            self._store.delete(self._collection, In("row_id", page))
        self._store.set_died(self._collection, retired, self._version)
        self._store.set_died(self._collection, restored, ALIVE)


def _carry(store: Store, collection: str, rest: Condition, reads: int, version: int) -> None:
    """Let `rest`, which the run does not touch, be in `version` as the head shows it.

    Needed where the head is a rollback: there the rows of the versions after the one that it reads would come back.
    """
    back = And((rest, live(reads), Compare("died", "<", version)))
    row_ids = [row["row_id"] for row in store.rows(collection, back, ["row_id"])]
    for page in pages(row_ids):
        rows = list(store.rows(collection, In("row_id", page), STORED))
        store.upsert(
            collection, [row | {"row_id": _carried(row, version), "born": version, "died": ALIVE} for row in rows]
        )
    after = And((Compare("born", ">", reads), Compare("born", "<", version), Compare("died", ">", version)))
    away = [row["row_id"] for row in store.rows(collection, And((rest, after)), ["row_id"])]
    store.set_died(collection, away, version)


def _carried(row: Row, version: int) -> str:
    """Two tenants may have the same chunk, and one of them write it in this very version."""
    return f"{row['chunk_id']}-{version}-{row['tenant']}"


def _drop_carried(store: Store, collection: str, version: int) -> None:
    """Remove what a killed run carried: another one may find that it has to write these rows itself."""
    born = list(store.rows(collection, Compare("born", "==", version), ["row_id", "chunk_id"]))
    for page in pages([r["row_id"] for r in born if r["row_id"] != row_id(r["chunk_id"], version)]):
        store.delete(collection, In("row_id", page))


def _check_not_ahead(store: Store, collection: str, version: int) -> None:
    """Refuse a collection that holds more than the registry knows of, beyond what a killed run can have left."""
    dead = And((Compare("died", ">", version), Compare("died", "<", ALIVE)))
    if store.count(collection, Or((Compare("born", ">", version), dead))):
        raise Mismatch(
            f"collection {collection} in Milvus is ahead of version {version - 1}, the last one in the registry; "
            "storage.url and store.uri do not belong together, or the registry was lost: set them right, or ingest "
            "under another knowledge.name"
        )


def _repair(store: Store, collection: str, version: int, scope: Condition) -> None:
    """Undo in `scope` what a run that was killed before its registry entry has written."""
    store.delete(collection, And((scope, Compare("born", "==", version))))
    ended = And((scope, Compare("died", "==", version)))
    store.set_died(collection, [row["row_id"] for row in store.rows(collection, ended, ["row_id"])], ALIVE)


def _verify(store: Store, knowledge: str, collection: str, visible: Condition, version: int, expected: int) -> None:
    """What is about to become visible is what was wanted: no rows of a concurrent run, none taken away by one."""
    found = store.count(collection, visible)
    if found != expected:
        raise Mismatch(
            f"version {version} of knowledge '{knowledge}' would hold {found} chunks instead of {expected}, so "
            "another run is writing it; it stays invisible: ingest again when the other has ended"
        )


def embedder_state(config: EmbedderConfig, embedder: Embeds) -> EmbedderState:
    """What the registry keeps of the embedder of a version."""
    return EmbedderState(
        source=config.source,
        revision=config.revision,
        max_tokens=config.max_tokens,
        fingerprint=embedder.fingerprint,
        dimension=embedder.dimension,
    )


def _publish(
    config: Config,
    registry: Registry,
    report: IngestReport,
    collection: str,
    embedder: EmbedderState,
    measured: Mapping[str, Any],
) -> None:
    entry = {
        "kind": "ingest",
        "collection": collection,
        "embedder": embedder.model_dump(mode="json"),
        "chunk_tokens": config.knowledge.chunk_tokens,
        "overlap_tokens": config.knowledge.overlap_tokens,
        "tenant": config.knowledge.tenant,
        **{name: getattr(report, name) for name in ("documents", "chunks", "added", "updated", "removed")},
        "details": {
            "unchanged": report.unchanged,
            "embedded": report.embedded,
            "seconds": report.seconds,
            "problems": [asdict(problem) for problem in report.problems],
            **measured,
        },
    }
    version = registry.knowledge_append(report.knowledge, entry)
    if version != report.version:
        raise Mismatch(
            f"another run wrote version {report.version} of knowledge '{report.knowledge}' meanwhile; ingest again"
        )
