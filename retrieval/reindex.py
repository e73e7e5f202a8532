"""Move a knowledge to a collection with another embedder, chunking or index, while the old one serves.

The new collection is filled beside the old: with the rows that the head shows, embedded anew only if the embedder
changed, or for the tenant of the configuration with its documents, if the chunking changed. Ingests go on meanwhile
and write the old collection alone. What they changed is caught up by comparing row by row, which is also how a killed
run goes on; the last time as the one writer of the knowledge, so that what becomes visible is what the head shows, and
then one registry entry moves every query at once. (An ingest that wrote both would leave two half-written collections
when it is killed, and needs the new embedder; the comparison needs neither and ends in the same state.)

The old collection stays, for its versions and for going back, until a compaction finds no version in it. Not covered:
replicas of servers, which load the new embedder when they see its build (:mod:`retrieval.embedders`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from cluster.claim import Claim
from cluster.config import Config
from cluster.errors import Mismatch, NotFound
from cluster.knowledge import Build, EmbedderState, Forgotten, KnowledgeVersion
from cluster.registry import Registry
from retrieval.collection import STORED
from retrieval.embed import Embeds, embedding_text
from retrieval.filters import And, Compare, Condition, In, Not, Or, live
from retrieval.ingest import Measure, embedder_state, forgotten_in, nothing, without
from retrieval.steps import Here, Progress, Steps, Target
from retrieval.store import ALIVE, PAGE, Store, pages, physical
from retrieval.types import Snapshot

Compares = Callable[[Snapshot, Snapshot], Mapping[str, Any]]
"""Asked about the old and the new collection before the move; what it says is kept with the version. ``recall``, where
it says one, is what ``min_recall`` is held against."""
PASSES = 8
"""Catching up without being the one writer ends after so many, or when a pass changed less than a page."""
WAIT_S = 600.0
"""For a writer to end before the last pass."""
WAIT_POLL_S = 0.2


@dataclass(frozen=True)
class ReindexReport:
    """What a move did."""

    knowledge: str
    version: int
    collection: str
    before: str
    """The collection it moved from."""
    source: Literal["rows", "documents"]
    rows: int
    embedded: int
    """Rows that went through the embedder in this run."""
    compared: dict[str, Any] = field(default_factory=dict)
    held_s: float = 0.0
    """How long other writers were kept out."""
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def reindex(
    config: Config,
    store: Store,
    embedder: Embeds,
    registry: Registry,
    *,
    from_documents: bool = False,
    compare: Compares | None = None,
    min_recall: float = 0.0,
    steps: Steps | None = None,
    measure: Measure = nothing,
    progress: Progress = lambda *_: None,
) -> ReindexReport:
    """Move ``config.knowledge.name`` to a new collection as `config` and `embedder` say; goes on where a killed run was.

    Args:
        store: makes the collection with the index settings of its own configuration, which is that of `config`.
        from_documents: read the documents anew even if the chunking did not change.
        min_recall: of `compare`, below which nothing moves. The new collection stays for another try.

    Raises:
        NotFound: the knowledge is empty; or there are no documents, where they are needed.
        Mismatch: another process builds or writes; a build with other settings was begun; `min_recall` is not reached.
    """
    started, name = time.perf_counter(), config.knowledge.name
    with registry.knowledge_build_claim(name, "metier knowledge reindex") as building:
        target = _target(config, embedder, registry, from_documents)
        build = registry.knowledge_build(name)
        if build is not None and (moved := _moved(registry, name, build)):
            registry.knowledge_build_end(name, build.collection, "moved")
            head = registry.knowledge_version(name)
            store.point(name, head.collection)
            if head.collection == moved.collection and not _differences(build, target):
                return _report(name, moved, 0, started)
            build = None
        build = _resumed(build, target) if build else _begun(store, registry, name, target)
        store.create(build.collection, embedder=embedder.fingerprint, dimension=embedder.dimension)
        filler = _Filler(config, store, embedder, registry, build, steps, progress)
        for _ in range(PASSES):
            if filler.catch_up(registry.knowledge_version(name)) < PAGE:
                break
        store.flush(build.collection)
        compared: dict[str, Any] = {}
        if compare is not None:
            before = Snapshot.of(name, registry.knowledge_version(name))
            compared = dict(compare(before, _coming(registry, name, build)))
            _check_recall(name, compared.get("recall", 1.0), min_recall)
        with ExitStack() as stack:
            writing = _claimed(registry, name, stack)
            held = time.perf_counter()
            head = registry.knowledge_version(name)
            if filler.catch_up(head):
                store.flush(build.collection)
            details = {
                "from": head.collection,
                "source": build.source,
                "index": build.index,
                "rows": filler.verify(),
                "embedded": filler.embedded,
                "compared": compared,
                **measure(_coming(registry, name, build)),
                "held_s": round(time.perf_counter() - held, 3),
            }
            entry = {
                "kind": "reindex",
                **build.model_dump(mode="json", include={"collection", "embedder", "chunk_tokens", "overlap_tokens"}),
                "tenant": config.knowledge.tenant if build.source == "documents" else head.tenant,
                "documents": head.documents if filler.documents is None else filler.documents,
                "chunks": head.chunks if filler.chunks is None else filler.chunks,
                "details": details,
            }
            building.check()
            writing.check()
            registry.knowledge_append(name, entry)
            registry.knowledge_build_end(name, build.collection, "moved")
            store.point(name, build.collection)
            return _report(name, registry.knowledge_version(name), filler.embedded, started)


def abort(registry: Registry, store: Store, name: str) -> Build:
    """Give up the collection that is being filled for `name`.

    Raises:
        NotFound: none is.
        Mismatch: a living process fills it.
    """
    with registry.knowledge_build_claim(name, "metier knowledge reindex --abort"):
        build = registry.knowledge_build(name)
        if build is None:
            raise NotFound(f"no reindex of knowledge '{name}' is under way", param="name")
        if moved := _moved(registry, name, build):
            registry.knowledge_build_end(name, build.collection, "moved")
            raise NotFound(f"the reindex of knowledge '{name}' was done: it is version {moved.number}", param="name")
        store.drop(build.collection)
        registry.knowledge_build_end(name, build.collection, "aborted")
        return build


class _Filler:
    """Brings the new collection in line with what is to become visible; counts what it took."""

    def __init__(
        self,
        config: Config,
        store: Store,
        embedder: Embeds,
        registry: Registry,
        build: Build,
        steps: Steps | None,
        progress: Progress,
    ) -> None:
        self._config, self._store, self._embedder, self._registry = config, store, embedder, registry
        self._name = config.knowledge.name
        self._build, self._progress = build, progress
        self._steps = steps or Here(store, embedder, config.storage.options)
        self._own: Condition = Compare("tenant", "==", config.knowledge.tenant)
        self._wanted: dict[str, str] = {}
        """Chunk -> digest of what the documents came to, if they are read."""
        self._copied = 0
        """Rows that the head shows and that are taken over."""
        self.embedded = 0
        self.documents: int | None = None
        """How many were read, if they were."""

    def catch_up(self, head: KnowledgeVersion) -> int:
        """Make the new collection hold what `head` shows, and the documents; returns how many rows that changed."""
        changed = self._copy(head)
        return changed + self._read() if self._build.source == "documents" else changed

    def verify(self) -> int:
        """The rows of the new collection; refuses to move if they are not what the last pass wanted."""
        expected = self._copied + len(self._wanted)
        found = self._store.count(self._build.collection, And(()))
        if found != expected:
            raise Mismatch(
                f"the new collection of knowledge '{self._name}' holds {found} chunks instead of {expected}, so "
                "another process writes it; nothing has moved: try again when that has ended"
            )
        return found

    @property
    def chunks(self) -> int | None:
        """Those of the documents, if they were read."""
        return None if self.documents is None else len(self._wanted)

    def _theirs(self) -> Condition:
        """Rows that are taken from the old collection; of what is being forgotten, none."""
        away = [_document(one) for one in self._registry.knowledge_forgotten(self._name)]
        return Not(Or([*away, self._own] if self._build.source == "documents" else away))

    def _copy(self, head: KnowledgeVersion) -> int:
        old, new, theirs = head.collection, self._build.collection, self._theirs()
        wanted = self._digests(old, And((live(head.reads), theirs)))
        self._copied = len(wanted)
        there = self._digests(new, Not(self._own) if self._build.source == "documents" else And(()))
        gone = [row_id for row_id in there if row_id not in wanted]
        for page in pages(gone):
            self._store.delete(self._build.collection, In("row_id", page))
        missing = [row_id for row_id, digest in wanted.items() if there.get(row_id) != digest]
        copied = 0
        for page in pages(missing):
            rows = list(self._store.rows(old, In("row_id", page), STORED))
            if not _same_vectors(head.embedder, self._build.embedder):
                texts = [embedding_text(row["title"], row["heading"], row["text"]) for row in rows]
                vectors = self._embedder.embed(texts).tolist()
                rows = [row | {"dense": vector} for row, vector in zip(rows, vectors, strict=True)]
                self.embedded += len(rows)
            # What was forgotten meanwhile must not be written after its rows were removed.
            away = {(one.doc_id, one.tenant) for one in self._registry.knowledge_forgotten(self._name)}
            left = [row for row in rows if not away & {(row["doc_id"], None), (row["doc_id"], row["tenant"])}]
            self._store.upsert(new, [row | {"died": ALIVE} for row in left])
            copied += len(page)
            self._progress("copy", copied, len(missing))
        return len(missing) + len(gone)

    def _read(self) -> int:
        knowledge, new = self._config.knowledge, self._build.collection
        read = self._steps.read(knowledge, self._progress)
        if not read.count:
            raise NotFound(
                f"{knowledge.documents} holds no document that can be read; chunks cannot be cut anew without them",
                param="knowledge.documents",
            )
        read, _ = without(read, forgotten_in(self._registry, knowledge.name, knowledge.tenant))
        there = {r["row_id"]: r for r in self._store.rows(new, self._own, ["row_id", "chunk_id", "digest"])}
        target = Target(
            new,
            -self._build.number,
            knowledge.tenant,
            knowledge.groups,
            knowledge.chunk_tokens,
            knowledge.overlap_tokens,
            self._config.store.bm25.fold_diacritics,
        )
        known = {row["chunk_id"]: (row["digest"],) for row in there.values()}
        outcome = self._steps.index(read, target, known, self._progress)
        gone = [row_id for row_id, row in there.items() if row["chunk_id"] not in outcome.wanted]
        for page in pages(gone):
            self._store.delete(self._build.collection, In("row_id", page))
        self._wanted, self.documents = outcome.wanted, read.count
        self.embedded += outcome.embedded
        return len(outcome.written) + len(gone)

    def _digests(self, collection: str, condition: Condition) -> dict[str, str]:
        return {row["row_id"]: row["digest"] for row in self._store.rows(collection, condition, ["row_id", "digest"])}


def _document(forgotten: Forgotten) -> Condition:
    document = Compare("doc_id", "==", forgotten.doc_id)
    return document if forgotten.tenant is None else And((document, Compare("tenant", "==", forgotten.tenant)))


def _same_vectors(one: EmbedderState, other: EmbedderState) -> bool:
    return (one.fingerprint, one.dimension, one.max_tokens) == (other.fingerprint, other.dimension, other.max_tokens)


def _target(config: Config, embedder: Embeds, registry: Registry, from_documents: bool) -> dict[str, Any]:
    """The fields of the build that `config` asks for."""
    knowledge = config.knowledge
    head = registry.knowledge_version(knowledge.name)
    cut = (knowledge.chunk_tokens, knowledge.overlap_tokens)
    source = "documents" if from_documents or cut != (head.chunk_tokens, head.overlap_tokens) else "rows"
    if source == "documents" and knowledge.documents is None:
        raise NotFound(
            "knowledge.documents is not set, and other chunks can only be cut from documents; name them, or leave "
            "knowledge.chunk_tokens and knowledge.overlap_tokens as they were",
            param="knowledge.documents",
        )
    return {
        "source": source,
        "embedder": embedder_state(config.embedder, embedder).model_dump(mode="json"),
        "chunk_tokens": knowledge.chunk_tokens,
        "overlap_tokens": knowledge.overlap_tokens,
        "index": {
            "vector": config.store.index.model_dump(mode="json"),
            "bm25": config.store.bm25.model_dump(mode="json"),
        },
    }


def _differences(build: Build, target: Mapping[str, Any]) -> list[str]:
    before = build.model_dump(mode="json")
    return sorted(key for key in target if before[key] != target[key])


def _resumed(build: Build, target: Mapping[str, Any]) -> Build:
    if differing := _differences(build, target):
        raise Mismatch(
            f"a reindex with another {' and '.join(differing)} was begun at {build.began}; end it with the settings it had, "
            "or give it up with `metier knowledge reindex --abort`"
        )
    return build


def _begun(store: Store, registry: Registry, name: str, target: dict[str, Any]) -> Build:
    number = registry.knowledge_next(name)
    collection = physical(name, number)
    store.drop(collection)  # an abandoned build may have left it
    return registry.knowledge_build_begin(name, target | {"number": number, "collection": collection})


def _moved(registry: Registry, name: str, build: Build) -> KnowledgeVersion | None:
    """The version that the build became, if its process was killed after that."""
    versions = registry.knowledge_history(name)
    return next((version for version in versions if version.collection == build.collection), None)


def _coming(registry: Registry, name: str, build: Build) -> Snapshot:
    """The new collection as the version that it would be now."""
    number = registry.knowledge_next(name)
    return Snapshot(name, number, number, build.collection, build.embedder)


def _check_recall(name: str, recall: float, least: float) -> None:
    if recall < least:
        raise Mismatch(
            f"the new collection finds {recall:.3f} of the sampled passages, less than the {least:g} that was asked for; "
            f"knowledge '{name}' stays where it is. Try another embedder, or give it up with "
            "`metier knowledge reindex --abort`",
            param="min-recall",
        )


def _claimed(registry: Registry, name: str, stack: ExitStack) -> Claim:
    """Become the one writer as soon as the one that there is has ended."""
    deadline = time.monotonic() + WAIT_S
    while True:
        try:
            return stack.enter_context(registry.knowledge_claim(name, "the end of metier knowledge reindex"))
        except Mismatch:
            if time.monotonic() > deadline:
                raise
        time.sleep(WAIT_POLL_S)


def _report(
    name: str,
    version: KnowledgeVersion,
    embedded: int,
    started: float,
) -> ReindexReport:
    return ReindexReport(
        knowledge=name,
        version=version.number,
        collection=version.collection,
        before=version.details["from"],
        source=version.details["source"],
        rows=version.details["rows"],
        embedded=embedded,
        compared=version.details["compared"],
        held_s=version.details["held_s"],
        seconds=round(time.perf_counter() - started, 3),
    )
