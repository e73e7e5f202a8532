"""How well the retriever finds: a test collection in a throw-away Milvus collection, asked through the real Retriever.

Chunks are counted as the document they are of, at the place of its best one. Measures are those of trec_eval, by
ir-measures. Two modes are compared query by query with a randomization test (Smucker, Allan and Carterette, A
Comparison of Statistical Significance Tests for Information Retrieval Evaluation, 2007). The only file with
ir_measures. Not covered: judging answers (:mod:`evaluation.arms`), rights, and throughput (``benchmarks/retrieval.py``).
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import ir_measures
import numpy as np
from ir_measures import AP, RR, P, Qrel, R, ScoredDoc, nDCG

from cluster.config import Config, RetrievalConfig
from cluster.errors import BadInput
from cluster.knowledge import KnowledgeVersion
from evaluation.beir import JudgedCollection
from retrieval.calibrate import measured
from retrieval.embed import Embeds
from retrieval.ingest import apply
from retrieval.rerank import Reranks
from retrieval.retriever import Retriever
from retrieval.steps import Read
from retrieval.store import Store, physical
from retrieval.types import Passage, Principal, Retrieved, Snapshot

MODES: dict[str, dict[str, str]] = {
    "dense": {"mode": "dense"},
    "bm25": {"mode": "bm25"},
    "hybrid": {"mode": "hybrid"},
    "auto": {"mode": "hybrid", "fusion": "auto"},
    "rrf": {"mode": "hybrid", "fusion": "rrf"},
    "weighted": {"mode": "hybrid", "fusion": "weighted"},
}
"""What can be compared, and the settings of it; `hybrid` fuses as the configuration says."""
DEEPEST = 1000
"""Rows asked of each side, at most."""
FLIPS = 10_000
SEED = 17
Progress = Callable[[str, int, int], None]
"""Told what is done (``index``, or the mode), how much of it, and of how much."""


@dataclass(frozen=True)
class ModeResult:
    """One mode on one test collection."""

    values: dict[str, dict[str, float]]
    """Measure -> query id -> value."""
    seconds: list[float]
    """Wall time of each query, embedding included."""

    def means(self) -> dict[str, float]:
        """Measure -> mean over the queries."""
        return {measure: sum(values.values()) / len(values) for measure, values in self.values.items()}

    def latency(self) -> dict[str, float]:
        """Median and 95th percentile in milliseconds, one query at a time and as deep as was evaluated."""
        p50, p95 = np.percentile(self.seconds, (50, 95)) * 1000
        return {"p50_ms": round(float(p50), 2), "p95_ms": round(float(p95), 2)}


@dataclass(frozen=True)
class Evaluated:
    """All modes on one test collection."""

    documents: int
    chunks: int
    queries: int
    candidates: int
    """Rows asked of each side: so many that `top_k` documents can be among their chunks."""
    calibration: dict[str, Any] | None
    modes: dict[str, ModeResult]


def check_modes(modes: Sequence[str]) -> None:
    """Refuse what is not one of :data:`MODES`.

    Raises:
        BadInput: names the mode.
    """
    if not modes:
        raise BadInput("--modes names none; for example dense,bm25,hybrid", param="modes")
    for mode in modes:
        if mode not in MODES:
            raise BadInput(f"there is no mode '{mode}'; choose from {', '.join(MODES)}", param="modes")


def evaluate(
    config: Config,
    collection: JudgedCollection,
    modes: Sequence[str],
    *,
    store: Store,
    embedder: Embeds,
    reranker: Reranks | None = None,
    top_k: int = 100,
    floor: bool = False,
    progress: Progress = lambda *_: None,
) -> Evaluated:
    """Index `collection` as `config` says (chunks, fusion), ask every query in every mode, and remove it again.

    Args:
        modes: of :data:`MODES`.
        top_k: documents that count, the best ones.
        floor: let ``retrieval.min_score`` decline queries, as in serving.

    Raises:
        Mismatch, Unavailable: as ingest and retrieval.
    """
    with _indexed(config, collection, store, embedder, progress) as (snapshot, chunks):
        depth = min(DEEPEST, max(config.retrieval.candidates, -(-top_k * chunks // len(collection.documents)), top_k))
        retriever = Retriever(store, lambda _: embedder, reranker)
        principal = Principal(config.knowledge.tenant, config.knowledge.groups)
        results = {}
        for mode in modes:
            settings = _settings(config.retrieval, mode, depth, floor)
            run, seconds = _ask(
                partial(retriever.retrieve, snapshot=snapshot, principal=principal, settings=settings),
                collection.queries,
                top_k,
                partial(progress, mode),
            )
            results[mode] = ModeResult(measure(run, collection.judgements, top_k), seconds)
    documents, queries = len(collection.documents), len(collection.queries)
    return Evaluated(documents, chunks, queries, depth, snapshot.calibration, results)


def measure(
    run: Mapping[str, Sequence[str]], judgements: Mapping[str, Mapping[str, int]], top_k: int
) -> dict[str, dict[str, float]]:
    """Measure -> query id -> value, of `run` (query id -> documents, best first); a query that found nothing has 0.

    Measures that look deeper than `top_k` are left out.
    """
    wanted = [nDCG @ 10, *(R @ k for k in (1, 5, 10, 100)), P @ 5, P @ 10, RR @ 10]
    measures = [each for each in wanted if each["cutoff"] <= top_k] + [AP]
    qrels = [Qrel(query, doc, grade) for query, grades in judgements.items() for doc, grade in grades.items()]
    scored = [ScoredDoc(query, doc, -float(rank)) for query, docs in run.items() for rank, doc in enumerate(docs)]
    values: dict[str, dict[str, float]] = {str(each): dict.fromkeys(judgements, 0.0) for each in measures}
    for one in ir_measures.iter_calc(measures, qrels, scored):
        values[str(one.measure)][one.query_id] = float(one.value)
    return values


def best_documents(passages: Sequence[Passage], top_k: int) -> list[str]:
    """The documents of `passages`, each at the place of its best one; `top_k` at most."""
    return list(dict.fromkeys(passage.doc_id for passage in passages))[:top_k]


def randomization_test(ours: Mapping[str, float], theirs: Mapping[str, float], flips: int = FLIPS) -> float:
    """How likely a difference of means as large as this one is if it is chance which of the two has which value.

    Both by query id, with the same queries; two-sided. The same values give the same result.
    """
    differences = np.array([ours[query] - theirs[query] for query in sorted(ours)])
    draw = np.random.default_rng(SEED)
    observed = abs(differences.sum()) - 1e-9
    as_large = 0
    for _ in range(0, flips, 1000):
        signs = draw.choice((-1.0, 1.0), size=(1000, len(differences)))
        as_large += int((np.abs(signs @ differences) >= observed).sum())
    return (as_large + 1) / (flips + 1)


@dataclass
class _Thrown:
    """The registry of a collection that is thrown away: its versions, in memory."""

    entries: list[KnowledgeVersion] = field(default_factory=list)

    def knowledge_next(self, name: str) -> int:
        return len(self.entries) + 1

    def knowledge_latest(self, name: str) -> KnowledgeVersion | None:
        return self.entries[-1] if self.entries else None

    def knowledge_append(self, name: str, entry: dict[str, Any]) -> int:
        number = self.knowledge_next(name)
        self.entries.append(KnowledgeVersion(number=number, created="", reads=number, **entry))
        return number


@contextmanager
def _indexed(
    config: Config, collection: JudgedCollection, store: Store, embedder: Embeds, progress: Progress
) -> Iterator[tuple[Snapshot, int]]:
    """The snapshot of `collection` and how many chunks it has, until the end of the ``with`` block, however it ends."""
    name = f"eval-{uuid.uuid4().hex[:16]}"
    knowledge = config.knowledge.model_copy(update={"name": name})
    registry = _Thrown()
    try:
        report = apply(
            config.model_copy(update={"knowledge": knowledge}),
            Read(collection.documents, len(collection.documents)),
            store,
            embedder,
            registry,
            progress=lambda _, done, of: progress("index", done, of),
            measure=partial(measured, store, embedder),
        )
        yield Snapshot.of(name, registry.entries[-1]), report.chunks
    finally:
        store.unpoint(name)
        store.drop(physical(name, 1))


def _settings(retrieval: RetrievalConfig, mode: str, depth: int, floor: bool) -> RetrievalConfig:
    # Beyond what serving allows, hence not validated: every passage counts here, not only those for a prompt.
    deep: dict[str, Any] = {"top_k": depth, "candidates": depth, "neighbours": 0}
    return retrieval.model_copy(update=deep | MODES[mode] | ({} if floor else {"min_score": -1.0}))


def _ask(
    retrieve: Callable[[str], Retrieved], queries: Mapping[str, str], top_k: int, progress: Callable[[int, int], None]
) -> tuple[dict[str, list[str]], list[float]]:
    run: dict[str, list[str]] = {}
    seconds: list[float] = []
    for done, (query, text) in enumerate(queries.items(), start=1):
        began = time.perf_counter()
        found = retrieve(text)
        seconds.append(time.perf_counter() - began)
        run[query] = best_documents(found.passages, top_k)
        progress(done, len(queries))
    return run, seconds
