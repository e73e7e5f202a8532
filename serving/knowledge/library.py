"""What the knowledge API needs from the process that holds Milvus and the models: plain, blocking functions.

One :class:`Library` lives beside the retriever. What it takes and gives is plain data, so that it may be another
process than the one that answers HTTP.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from cluster.config import Config, KnowledgeConfig
from cluster.errors import NotFound, Unavailable
from cluster.registry import Registry
from retrieval.calibrate import measured
from retrieval.embed import Embeds
from retrieval.filters import And, Compare, Condition, Or, readable
from retrieval.ingest import apply, forgotten_in
from retrieval.knowledge import collections, drop
from retrieval.read import Problem, Source, read_source
from retrieval.read.places import SUFFIXES, suffix
from retrieval.rerank import Reranks
from retrieval.steps import Read
from retrieval.store import Store
from retrieval.types import Document, Principal, Snapshot

PART = "#"
"""Between the id of a file that holds many documents and the number of one of them."""
AFTER_PART = chr(ord(PART) + 1)
SPECIAL_TOKENS = 2
"""What the embedder puts around a text."""


@dataclass(frozen=True)
class IndexFile:
    """A file to make part of a knowledge."""

    id: str
    filename: str
    path: str
    bytes: int
    attributes: dict[str, Any]


@dataclass(frozen=True)
class IndexJob:
    """A change of one knowledge: files that come (again) and files that go, or all of it."""

    knowledge: str
    tenant: str
    groups: tuple[str, ...]
    chunking: tuple[int, int] | None = None
    files: tuple[IndexFile, ...] = ()
    remove: tuple[str, ...] = ()
    forget: tuple[str, ...] = ()
    """Of `remove`, those that go from every version."""
    drop: bool = False


@dataclass(frozen=True)
class Indexed:
    """What became of one file."""

    usage_bytes: int = 0
    groups: tuple[str, ...] | None = None
    code: str | None = None
    """``unsupported_file`` or ``invalid_file``; None if it is part of the knowledge now."""
    message: str = ""


@dataclass(frozen=True)
class Held:
    """A document that a knowledge holds."""

    doc_id: str
    source: str
    metadata: dict[str, Any]


class Library:
    """Documents, vectors and scores of one process. Thread-safe."""

    def __init__(
        self,
        config: Config,
        store: Store,
        registry: Registry,
        embedder: Callable[[], Embeds],
        reranker: Reranks | None = None,
    ) -> None:
        """`embedder` gives the model that ``config.embedder`` names; it may load it at the first call."""
        self._config, self._store, self._registry = config, store, registry
        self._embedder, self._reranker = embedder, reranker

    def embed(self, texts: Sequence[str], query: bool) -> tuple[list[list[float]], list[int]]:
        """Unit vectors of `texts`, and their lengths in tokens; no vectors if one is longer than the model reads."""
        embedder = self._embedder()
        lengths = [embedder.count_tokens(text) for text in texts]
        if max(lengths) + SPECIAL_TOKENS > self._config.embedder.max_tokens:
            return [], lengths
        return embedder.embed(texts, query=query).tolist(), lengths

    def rerank(self, query: str, texts: Sequence[str]) -> list[float]:
        """How well each text answers `query`, in [0, 1].

        Raises:
            NotFound: no reranker is configured.
        """
        if self._reranker is None:
            raise NotFound("there is no reranker here; set reranker.source to a cross-encoder", param="model")
        scores: list[float] = self._reranker.scores(query, texts).tolist()
        return scores

    def documents(self, snapshot: Snapshot, principal: Principal) -> list[Held]:
        """The documents of a version that `principal` may read, by id; each has one chunk at position 0."""
        first: Condition = readable(principal, snapshot.reads, Compare("position", "==", 0))
        rows = self._store.rows(snapshot.collection, first, ["doc_id", "source", "metadata"])
        held = {row["doc_id"]: Held(row["doc_id"], row["source"], row["metadata"]) for row in rows}
        return [held[key] for key in sorted(held)]

    def texts(self, snapshot: Snapshot, principal: Principal, which: Condition) -> list[str]:
        """The chunks of a version under `which` that `principal` may read, in the order of the document."""
        theirs = readable(principal, snapshot.reads, which)
        rows = self._store.rows(snapshot.collection, theirs, ["doc_id", "position", "text"])
        return [row["text"] for row in sorted(rows, key=lambda row: (_part(row["doc_id"]), row["position"]))]

    def index(self, job: IndexJob) -> dict[str, Indexed]:
        """Do `job`; file id -> what became of it. Doing it again changes nothing.

        Raises:
            Mismatch: another process writes this knowledge, or its vectors are of another embedder.
            Unavailable: Milvus or the storage does not answer.
        """
        if job.drop:
            with suppress(NotFound):
                drop(self._registry, self._store, job.knowledge, force=True)
            return {}
        changes: dict[str, Any] = {"name": job.knowledge, "tenant": job.tenant, "groups": job.groups, "documents": None}
        if job.chunking:
            changes |= {"chunk_tokens": job.chunking[0], "overlap_tokens": job.chunking[1]}
        knowledge = self._config.knowledge.model_copy(update=changes)
        outcomes: dict[str, Indexed] = {}
        documents: list[Document] = []
        problems: list[Problem] = []
        forgotten = forgotten_in(self._registry, knowledge.name, knowledge.tenant) if job.files else set()
        for file in job.files:
            made, told = self._read(file, knowledge, forgotten)
            outcomes[file.id] = _outcome(file, made, told)
            documents += made
            problems += told
        meant = [file.id for file in job.files] + list(job.remove)
        only = {document.doc_id for document in documents} | self._there(job, meant)
        if only:
            config = self._config.model_copy(update={"knowledge": knowledge})
            read = Read(documents, len(documents), problems)
            embedder = self._embedder()
            measure = partial(measured, self._store, embedder)
            apply(config, read, self._store, embedder, self._registry, only=sorted(only), measure=measure)
        if job.forget:
            self._forget(job)
        return outcomes

    def _read(
        self, file: IndexFile, knowledge: KnowledgeConfig, forgotten: set[str]
    ) -> tuple[list[Document], list[Problem]]:
        url = self._registry.storage.full_url(file.path)
        source = Source(path=file.filename, url=url, size=file.bytes, stamp=file.id)
        documents, problems = read_source(source, knowledge, self._config.storage.options)
        many = len(documents) > 1
        made: list[Document] = []
        for number, document in enumerate(documents):
            own = document.groups
            groups = knowledge.groups if own is None else tuple(group for group in knowledge.groups if group in own)
            if not groups:
                named = ", ".join(own or ())
                problems.append(Problem(document.source, f"it is for groups that may not read this store ({named})"))
                continue
            doc_id = f"{file.id}{PART}{number}" if many else file.id
            if doc_id in forgotten:
                reason = "it was forgotten; `metier knowledge forget --undo` lets it come back"
                problems.append(Problem(document.source, reason))
                continue
            metadata = {**({"id": document.doc_id} if many else {}), **document.metadata, **file.attributes}
            made.append(replace(document, doc_id=doc_id, groups=groups, metadata=metadata))
        return made, problems

    def _there(self, job: IndexJob, file_ids: Iterable[str]) -> set[str]:
        """Ids of the documents that the knowledge has of these files, in any version."""
        latest = self._registry.knowledge_latest(job.knowledge)
        if latest is None:
            return set()
        theirs = And((Compare("tenant", "==", job.tenant), Or([documents_of(file_id) for file_id in file_ids])))
        return {row["doc_id"] for row in self._store.rows(latest.collection, theirs, ["doc_id"])}

    def _forget(self, job: IndexJob) -> None:
        theirs = And((Compare("tenant", "==", job.tenant), Or([documents_of(file_id) for file_id in job.forget])))
        with self._registry.knowledge_claim(job.knowledge, "forgetting files"):
            for collection in collections(self._registry, self._store, job.knowledge):
                self._store.delete(collection, theirs)
                if self._store.count(collection, theirs):
                    raise Unavailable(f"Milvus still shows rows of deleted files in {collection}")


def documents_of(file_id: str) -> Condition:
    """The documents of a file: itself, or its numbered parts."""
    parts = And((Compare("doc_id", ">=", file_id + PART), Compare("doc_id", "<", file_id + AFTER_PART)))
    return Or((Compare("doc_id", "==", file_id), parts))


def file_of(doc_id: str) -> str:
    """The file that a document made here is of."""
    return doc_id.partition(PART)[0]


def read_only_id(knowledge: str, doc_id: str) -> str:
    """The file id of a document that ``metier index`` read."""
    return f"file-{hashlib.sha256(f'{knowledge} {doc_id}'.encode()).hexdigest()[:32]}"


def _part(doc_id: str) -> tuple[str, int]:
    name, _, number = doc_id.partition(PART)
    return (name, int(number)) if number.isdigit() else (doc_id, 0)


def _outcome(file: IndexFile, documents: Sequence[Document], problems: Sequence[Problem]) -> Indexed:
    if documents:
        readers = {group for document in documents for group in document.groups or ()}
        size = sum(len(document.text.encode()) for document in documents)
        return Indexed(size, tuple(sorted(readers)))
    if suffix(file.path) not in SUFFIXES:
        message = f"its kind is told by the end of its name, which must be one of {', '.join(SUFFIXES)}"
        return Indexed(code="unsupported_file", message=message)
    reasons = [problem.reason for problem in problems if problem.kind == "skipped"]
    return Indexed(code="invalid_file", message="; ".join(reasons[:3]) or "holds no document")
