"""A question -> passages that its asker may read, in one knowledge version."""

from __future__ import annotations

import time

from cluster.config import RetrievalConfig
from retrieval.embed import Embeds
from retrieval.filters import And, live, rights
from retrieval.fuse import fuse
from retrieval.store import Store
from retrieval.types import Passage, Principal, Retrieved


class Retriever:
    """The stages in order: embed, search under rights and version, fuse, floor, cut. Thread-safe."""

    def __init__(self, store: Store, embedder: Embeds) -> None:
        self._store = store
        self._embedder = embedder
        self._checked: set[tuple[str, int]] = set()

    def retrieve(
        self, query: str, *, knowledge: str, version: int, principal: Principal, settings: RetrievalConfig
    ) -> Retrieved:
        """The passages for `query`, best first; none if the best dense candidate is under ``settings.min_score``.

        Raises:
            NotFound: there is no such collection.
            Mismatch: the collection was filled by another embedder.
            Unavailable: Milvus does not answer.
        """
        self._check(knowledge, version)
        started = time.perf_counter()
        vector = None if settings.mode == "bm25" else self._embedder.embed([query], query=True)[0]
        embedded = time.perf_counter()
        readable = And((rights(principal), live(version)))
        dense: list[Passage] = []
        words: list[Passage] = []
        if vector is not None:
            dense = self._store.search_dense(knowledge, vector, readable, settings.candidates)
        if settings.mode != "dense":
            words = self._store.search_bm25(knowledge, query, readable, settings.candidates)
        searched = time.perf_counter()
        return Retrieved(
            passages=tuple(_rank(dense, words, settings)[: settings.top_k]),
            knowledge=knowledge,
            version=version,
            seconds={"embed": embedded - started, "search": searched - embedded},
        )

    def _check(self, knowledge: str, version: int) -> None:
        """Refuse a collection of another embedder; asked once a version, as only an ingest can change it."""
        if (knowledge, version) not in self._checked:
            self._store.check_embedder(
                knowledge, embedder=self._embedder.fingerprint, dimension=self._embedder.dimension
            )
            self._checked.add((knowledge, version))


def _rank(dense: list[Passage], words: list[Passage], settings: RetrievalConfig) -> list[Passage]:
    if settings.mode == "bm25":
        return words
    if not dense or dense[0].score < settings.min_score:
        return []
    return dense if settings.mode == "dense" else fuse(dense, words)
