"""A question -> passages that its asker may read, in one knowledge version.

The stages in order: embed, search (vectors and words at once), fuse, floor, rerank, diversity, cut, neighbours. Rights,
version and the asker's own filter are part of every query to Milvus, whichever stage makes it. Not covered: what a
follow-up of a conversation asks for (:mod:`retrieval.query`), batching and caching query vectors
(:mod:`retrieval.query_vectors`).
"""

from __future__ import annotations

import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from cluster.config import RetrievalConfig
from cluster.errors import BadInput, Mismatch
from cluster.knowledge import EmbedderState
from retrieval import neighbours, words
from retrieval.calibrate import Calibration, stored
from retrieval.diversity import diversify
from retrieval.embed import Embeds, Vectors
from retrieval.filters import And, Condition, In, readable
from retrieval.fuse import RANK_CONSTANT, fuse
from retrieval.rerank import Reranks, rerank
from retrieval.store import Store
from retrieval.types import Passage, Principal, Retrieved, Snapshot

CHARACTERS_A_TOKEN = 32
"""Far above what words have; a query longer than that many for each token its embedder reads is cut before."""
SEARCHES = 32
"""Searches of one retriever in flight besides those that its callers' own threads make."""


@dataclass(frozen=True)
class Searched:
    """One query, and what each side found for it, best first."""

    query: str
    dense: Sequence[Passage] = ()
    words: Sequence[Passage] = ()
    fused: Sequence[Passage] = ()


@dataclass(frozen=True)
class Trace:
    """How a retrieval came to its result, for people who ask."""

    retrieved: Retrieved
    searched: Sequence[Searched]
    ranked: Sequence[Passage] = ()
    """All candidates in their order before the last stages (fused, and reranked if asked for), best first."""
    cosine: float | None = None
    """Of the best dense candidate; None where vectors were not searched, or none was found."""
    declined: bool = False
    """Whether it stayed under ``settings.min_score``."""


class Retriever:
    """The stages over one store. Thread-safe."""

    def __init__(
        self, store: Store, embedders: Callable[[EmbedderState], Embeds], reranker: Reranks | None = None
    ) -> None:
        """`embedders` gives the loaded model of a state; while knowledge moves to another one, two are in use."""
        self._store = store
        self._embedders = embedders
        self._reranker = reranker
        self._pool = ThreadPoolExecutor(SEARCHES, thread_name_prefix="metier-search")

    def retrieve(
        self,
        query: str | Sequence[str],
        snapshot: Snapshot,
        *,
        principal: Principal,
        settings: RetrievalConfig,
        where: Condition | None = None,
    ) -> Retrieved:
        """The passages for `query`, best first; none if the best dense candidate is under ``settings.min_score``.

        Args:
            query: one, or several that ask for the same thing: each is searched, what they find is joined by rank
                (:func:`merge`). The first is the most trusted, and what a reranker reads. Long ones are cut.
            where: only passages of which this is true; narrows what `principal` may read, never widens it.

        Raises:
            BadInput: a query is empty.
            NotFound: there is no such collection.
            Mismatch: the collection was filled by another embedder, or a reranker is asked for and there is none.
            Unavailable: Milvus does not answer.
        """
        return self.trace(query, snapshot, principal=principal, settings=settings, where=where).retrieved

    def trace(
        self,
        query: str | Sequence[str],
        snapshot: Snapshot,
        *,
        principal: Principal,
        settings: RetrievalConfig,
        where: Condition | None = None,
    ) -> Trace:
        """As :meth:`retrieve`, with what every stage said."""
        queries = [cleaned(each) for each in ([query] if isinstance(query, str) else query)]
        if not queries:
            raise BadInput("there is no question; say what to look for", param="query")
        if settings.rerank and self._reranker is None:
            raise Mismatch(
                f"retrieval.rerank={settings.rerank} needs a cross-encoder, and none is loaded here; set "
                "reranker.source, or retrieval.rerank=0",
                param="retrieval.rerank",
            )
        condition = readable(principal, snapshot.reads, where)
        clock = _Clock()
        searched = self._search(queries, snapshot, condition, settings, clock)
        with clock.measure("fuse"):
            calibration = stored(snapshot)
            searched = [replace(each, fused=_fused(each, settings, calibration)) for each in searched]
            ranked = merge([each.fused for each in searched])
        cosine = max((each.dense[0].score for each in searched if each.dense), default=None)
        declined = settings.mode != "bm25" and (cosine is None or cosine < settings.min_score)
        passages: list[Passage] = []
        if not declined:
            if settings.rerank and self._reranker is not None:
                with clock.measure("rerank"):
                    ranked = rerank(queries[0], ranked[: max(settings.rerank, settings.top_k)], self._reranker)
            passages = self._choose(ranked, snapshot, condition, settings, clock)
        found = Retrieved(tuple(passages), snapshot.knowledge, snapshot.version, clock.seconds)
        return Trace(found, searched, ranked, cosine, declined)

    def _search(
        self,
        queries: Sequence[str],
        snapshot: Snapshot,
        condition: Condition,
        settings: RetrievalConfig,
        clock: _Clock,
    ) -> list[Searched]:
        """Everything that is asked of Milvus first. Words need no vector, so they are searched while it is made."""
        at, k = snapshot.collection, settings.candidates
        none: list[list[Passage]] = [[] for _ in queries]
        by_words = [partial(self._store.search_bm25, at, words.shorten(query), condition, k) for query in queries]
        if settings.mode == "bm25":
            with clock.measure("search"):
                return list(map(Searched, queries, none, self._at_once(by_words)))
        begun = [self._pool.submit(search) for search in by_words] if settings.mode == "hybrid" else []
        with clock.measure("embed"):
            vectors = self._vectors(queries, snapshot)
        with clock.measure("search"):
            dense = self._at_once([partial(self._store.search_dense, at, vector, condition, k) for vector in vectors])
            return list(map(Searched, queries, dense, [search.result() for search in begun] or none))

    def _at_once(self, searches: Sequence[Callable[[], list[Passage]]]) -> list[list[Passage]]:
        """What each of `searches` finds: the last in this thread, the others in the pool's."""
        begun = [self._pool.submit(search) for search in searches[:-1]]
        last = searches[-1]()
        return [*(search.result() for search in begun), last]

    def _vectors(self, queries: Sequence[str], snapshot: Snapshot) -> Vectors:
        longest = CHARACTERS_A_TOKEN * snapshot.embedder.max_tokens
        embedder = checked(self._embedders(snapshot.embedder), snapshot)
        return embedder.embed([query[:longest] for query in queries], query=True)

    def _choose(
        self,
        ranked: Sequence[Passage],
        snapshot: Snapshot,
        condition: Condition,
        settings: RetrievalConfig,
        clock: _Clock,
    ) -> list[Passage]:
        """The last stages: ``top_k`` of `ranked`, various if asked for, with their neighbours."""
        chosen = list(ranked[: settings.top_k])
        if settings.diversity and len(ranked) > 1:
            with clock.measure("diversity"):
                candidates = ranked[: settings.candidates]
                ids = In("chunk_id", [passage.chunk_id for passage in candidates])
                theirs = And((condition, ids))
                rows = self._store.some(snapshot.collection, theirs, ("chunk_id", "dense"), len(candidates))
                vectors = {row["chunk_id"]: np.asarray(row["dense"], dtype=np.float32) for row in rows}
                there = [passage for passage in candidates if passage.chunk_id in vectors]
                chosen = diversify(there, vectors, settings.diversity, settings.top_k)
        if settings.neighbours and chosen:
            with clock.measure("neighbours"):
                near = And((condition, neighbours.around(chosen, settings.neighbours)))
                most = len(chosen) * (2 * settings.neighbours + 1)
                rows = self._store.some(snapshot.collection, near, neighbours.COLUMNS, most)
                chosen = neighbours.widen(chosen, rows, settings.neighbours)
        return chosen


def cleaned(query: str) -> str:
    """`query` as documents are written: NFC, without halves of characters.

    Raises:
        BadInput: nothing is left to search for.
    """
    text = unicodedata.normalize("NFC", query.encode("utf-8", "replace").decode()).strip()
    if not text:
        raise BadInput("the question is empty; say what to look for", param="query")
    return text


def checked(embedder: Embeds, snapshot: Snapshot) -> Embeds:
    """`embedder`, if its vectors compare with those of `snapshot`.

    Raises:
        Mismatch: they do not.
    """
    stored = snapshot.embedder
    if (embedder.fingerprint, embedder.dimension) != (stored.fingerprint, stored.dimension):
        raise Mismatch(
            f"knowledge '{snapshot.knowledge}' v{snapshot.version} was embedded by another model "
            f"({stored.source}, {stored.dimension} dimensions); set embedder to it, or move with "
            "`metier knowledge reindex`",
            param="embedder",
        )
    return embedder


def merge(rankings: Sequence[Sequence[Passage]]) -> list[Passage]:
    """What several queries found, by the best rank that any of them gives, the first query's before the next one's.

    Unlike a sum of ranks, a query that asks for the wrong thing cannot push away what the others found. ``score`` is
    ``61 / (60 + rank)``, 1 for what is first somewhere; scores of stages are the best of any query. A single ranking
    stays as it is.
    """
    if len(rankings) == 1:
        return list(rankings[0])
    places: dict[str, int] = {}
    found: dict[str, Passage] = {}
    for ranking in rankings:
        for rank, passage in enumerate(ranking, start=1):
            key = passage.chunk_id
            places[key] = min(rank, places.get(key, rank))
            known = found[key].scores if key in found else {}
            best = {stage: max(score, known.get(stage, score)) for stage, score in passage.scores.items()}
            found[key] = replace(passage, scores=known | best)
    order = sorted(places, key=places.__getitem__)
    score = {key: (RANK_CONSTANT + 1) / (RANK_CONSTANT + rank) for key, rank in places.items()}
    return [replace(found[key], score=score[key], scores=found[key].scores | {"queries": score[key]}) for key in order]


def _fused(searched: Searched, settings: RetrievalConfig, calibration: Calibration) -> Sequence[Passage]:
    if settings.mode == "hybrid":
        return fuse(searched.dense, searched.words, settings, calibration)
    return searched.dense if settings.mode == "dense" else searched.words


@dataclass
class _Clock:
    """Wall time per stage."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[stage] = time.perf_counter() - began
