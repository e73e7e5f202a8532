"""The steps of an ingest: documents -> chunks -> rows -> vectors -> Milvus; plain functions, and how they run here.

The same functions run on many machines as Ray Data (:mod:`retrieval.ingest_ray`). A row that is known is neither
embedded nor written; a row whose words were embedded before takes over the vector.

:class:`Here` embeds in the calling thread, while one thread cuts the next window of documents and another writes to
Milvus; both hold the interpreter for little of the time, and a core that computes does not wait for them. What is
ahead is bounded: two windows of rows and a few pages. Not covered: reading beside the rest, since repetitions are found
among all documents.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from cluster.config import KnowledgeConfig
from retrieval.chunk import CountTokens, chunk
from retrieval.embed import Embeds, embedding_text
from retrieval.filters import Compare, In
from retrieval.read import Problem, read_source, sources, unique
from retrieval.store import ALIVE, PAGE, Row, Store
from retrieval.types import Document
from retrieval.words import searchable

Progress = Callable[[str, int, int], None]
"""Told what is being done, with its rate, how much of it is done, and of how much (files, then documents)."""
DIGESTED = (
    "title",
    "heading",
    "text",
    "search_text",
    "source",
    "position",
    "page",
    "start",
    "end",
    "groups",
    "metadata",
)
"""Columns of which any change makes a new row."""
WINDOW = 8 * PAGE
"""Rows that are sorted by length before they become pages, so that a page holds texts of one length."""
PAGES_AHEAD = 2
"""Pages that may wait for Milvus before the embedder does."""


@dataclass(frozen=True)
class Target:
    """Where rows go and what they are given; plain data that workers get."""

    collection: str
    version: int
    """The version that rows are born in."""
    tenant: str
    groups: tuple[str, ...]
    """Of documents that name none."""
    chunk_tokens: int
    overlap_tokens: int
    fold_diacritics: bool = False
    """Words are also found without their diacritics (``store.bm25.fold_diacritics``)."""


@dataclass
class Read:
    """What was read: the documents to index, and what was skipped or left out."""

    documents: Sequence[Document]
    count: int
    problems: list[Problem] = field(default_factory=list)


@dataclass
class Outcome:
    """What the steps did."""

    wanted: dict[str, str] = field(default_factory=dict)
    """Every chunk that the documents have, and the digest of its row."""
    written: set[str] = field(default_factory=set)
    """Chunks of which a row was written."""
    embedded: int = 0
    """Chunks that went through the embedder."""


class Steps(Protocol):
    """How the steps run: in this process (:class:`Here`), or on a cluster."""

    def read(self, knowledge: KnowledgeConfig, progress: Progress) -> Read: ...
    def index(
        self, read: Read, target: Target, known: Mapping[str, Collection[str]], progress: Progress
    ) -> Outcome: ...


class Here:
    """The steps in this process."""

    def __init__(self, store: Store, embedder: Embeds, options: Mapping[str, Any] | None = None) -> None:
        """`options`: ``storage.options``, for documents behind a URL."""
        self._store, self._embedder, self._options = store, embedder, options or {}

    def read(self, knowledge: KnowledgeConfig, progress: Progress) -> Read:
        """All documents of `knowledge`.

        Raises:
            NotFound: there is no such directory.
            Unavailable: the object store does not answer.
        """
        found, problems = sources(knowledge, self._options)
        documents: list[Document] = []
        for done, source in enumerate(found, start=1):
            some, bad = read_source(source, knowledge, self._options)
            documents += some
            problems += bad
            progress("read", done, len(found))
        return assemble(documents, problems, knowledge)

    def index(self, read: Read, target: Target, known: Mapping[str, Collection[str]], progress: Progress) -> Outcome:
        """Write the rows of the documents that are not `known` (chunk id -> digests that are there).

        An error of any step, or Ctrl-C, ends all of them after the page that is being written.
        """
        outcome = Outcome()
        rate, stop = Rate(), threading.Event()
        windows = self._windows(read.documents, target, known, outcome, stop)
        writer = _Writer(self._store, target.collection, outcome)
        vectors = _Vectors(self._store, self._embedder, target.collection)
        cutter = ThreadPoolExecutor(1, "metier-chunk")
        try:
            done = 0
            coming = cutter.submit(next, windows, None)
            while window := coming.result():
                coming = cutter.submit(next, windows, None)
                page_count = -(-len(window.rows) // PAGE)
                for number in range(page_count):
                    page = window.rows[number * PAGE : (number + 1) * PAGE]
                    if vectors.repeat(page):
                        writer.wait()
                    whole, embedded = vectors.of(page)
                    outcome.embedded += embedded
                    writer.write(whole)
                    share = (window.documents - done) * (number + 1) // page_count
                    progress(rate.said(len(page)), done + share, read.count)
                done = window.documents
                progress(rate.said(0), done, read.count)
            writer.wait()
        finally:
            stop.set()
            writer.close()
            cutter.shutdown(cancel_futures=True)
        return outcome

    def _windows(
        self,
        documents: Iterable[Document],
        target: Target,
        known: Mapping[str, Collection[str]],
        outcome: Outcome,
        stop: threading.Event,
    ) -> Iterator[_Window]:
        """Rows to write, longest first; the first window is small, so that embedding begins soon."""
        waiting: list[Row] = []
        size, done = PAGE, 0
        for done, document in enumerate(documents, start=1):
            for row in rows(document, target, self._embedder.count_tokens):
                outcome.wanted[row["chunk_id"]] = row["digest"]
                if row["digest"] not in known.get(row["chunk_id"], ()):
                    waiting.append(row)
            if stop.is_set():
                return
            if len(waiting) >= size:
                yield _Window(_longest_first(waiting), done)
                waiting, size = [], min(2 * size, WINDOW)
        if done:
            yield _Window(_longest_first(waiting), done)


@dataclass(frozen=True)
class _Window:
    rows: list[Row]
    documents: int
    """Documents cut when it was full."""


class _Writer:
    """Writes pages one after the other in a thread; an error is raised by the next call."""

    def __init__(self, store: Store, collection: str, outcome: Outcome) -> None:
        self._store, self._collection, self._outcome = store, collection, outcome
        self._pool = ThreadPoolExecutor(1, "metier-write")
        self._pages: deque[tuple[Future[None], list[Row]]] = deque()

    def write(self, page: list[Row]) -> None:
        self.wait(PAGES_AHEAD)
        self._pages.append((self._pool.submit(self._store.upsert, self._collection, page), page))

    def wait(self, left: int = 0) -> None:
        """Until no more than `left` pages are not written."""
        while len(self._pages) > left:
            future, page = self._pages.popleft()
            future.result()
            self._outcome.written |= {row["chunk_id"] for row in page}

    def close(self) -> None:
        """Give up what waits."""
        self._pool.shutdown(cancel_futures=True)


class _Vectors:
    """Vectors of pages: from the collection where it may hold them, else from the embedder."""

    def __init__(self, store: Store, embedder: Embeds, collection: str) -> None:
        self._store, self._embedder, self._collection = store, embedder, collection
        self._filled = filled(store, collection)
        self._seen: set[str] = set()

    def repeat(self, page: Sequence[Row]) -> bool:
        """Whether words of `page` stood in a page before it."""
        return not self._seen.isdisjoint(row["vector_key"] for row in page)

    def of(self, page: Sequence[Row]) -> tuple[list[Row], int]:
        """`page` with vectors, and how many of them were embedded."""
        keys = {row["vector_key"] for row in page}
        known = stored_vectors(keys if self._filled else keys & self._seen, self._collection, self._store)
        self._seen |= keys
        return with_vectors(page, known, self._embedder)


class Rate:
    """Chunks, and chunks a second, since the first was asked about."""

    def __init__(self) -> None:
        self._started, self._chunks = time.perf_counter(), 0

    def said(self, more: int) -> str:
        """``"1,500 chunks, 62/s"`` with `more` chunks done."""
        self._chunks += more
        return f"{self._chunks:,} chunks, {self._chunks / max(time.perf_counter() - self._started, 1e-3):.0f}/s"


def assemble(documents: Iterable[Document], problems: Iterable[Problem], knowledge: KnowledgeConfig) -> Read:
    """What is indexed of the `documents` of all files, in order: ids once, and if so configured no repetitions."""
    kept, taken = unique(documents)
    repeated: list[Problem] = []
    if knowledge.duplicates == "drop":
        from retrieval.duplicates import drop_duplicates

        kept, repeated = drop_duplicates(kept, knowledge.duplicate_similarity)
    return Read(kept, len(kept), [*problems, *taken, *repeated])


def rows(document: Document, target: Target, count_tokens: CountTokens) -> Iterator[Row]:
    """The rows of `document`, without vectors."""
    groups = target.groups if document.groups is None else document.groups
    for piece in chunk(
        document,
        chunk_tokens=target.chunk_tokens,
        overlap_tokens=target.overlap_tokens,
        count_tokens=count_tokens,
    ):
        text = embedding_text(piece.title, piece.heading, piece.text)
        row = asdict(piece) | {
            "search_text": searchable(text, target.fold_diacritics),
            "groups": sorted(set(groups)),
        }
        yield row | {
            "digest": _short_hash(json.dumps([row[column] for column in DIGESTED], sort_keys=True)),
            "vector_key": _short_hash(text),
            "tenant": target.tenant,
            "row_id": row_id(piece.chunk_id, target.version),
            "born": target.version,
            "died": ALIVE,
        }


def row_id(chunk_id: str, born: int) -> str:
    """The key of the row that stands for a chunk from version `born` on."""
    return f"{chunk_id}-{born}"


def filled(store: Store, collection: str) -> bool:
    """Whether `collection` holds any row, of anybody: else there is no vector to look for."""
    return store.count(collection, Compare("born", ">=", 0)) > 0


def stored_vectors(keys: Collection[str], collection: str, store: Store) -> dict[str, Any]:
    """Those of `keys` that rows of `collection` have, with their vectors."""
    if not keys:
        return {}
    found = store.rows(collection, In("vector_key", sorted(keys)), ["vector_key", "dense"])
    return {row["vector_key"]: row["dense"] for row in found}


def with_vectors(page: Sequence[Row], known: Mapping[str, Any], embedder: Embeds) -> tuple[list[Row], int]:
    """`page` with vectors, of `known` where it has them, and how many were embedded."""
    new = {
        row["vector_key"]: embedding_text(row["title"], row["heading"], row["text"])
        for row in page
        if row["vector_key"] not in known
    }
    vectors = dict(known) | dict(zip(new, embedder.embed(list(new.values())), strict=True))
    return [row | {"dense": vectors[row["vector_key"]]} for row in page], len(new)


def _longest_first(waiting: list[Row]) -> list[Row]:
    return sorted(waiting, key=lambda row: -len(row["title"]) - len(row["heading"]) - len(row["text"]))


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
