"""Time of a question through the retriever, and who spends it: the embedder, the server, or us.

``python -m benchmarks.retrieval [--quick] [--sizes 1000,10000] [--json FILE]``. The embedded milvus-lite server holds
collections of made-up chunks (60 words by Zipf's law, random vectors in clusters) of each size; every question is
new, so that nothing comes from the cache, and is embedded by the configured model.

Figures: p50, p95, p99 (ms) and questions/s by mode, top-k, size and concurrency; each stage apart; what is ours, that is
the request without its time in the embedder and in pymilvus (one request at a time: union of those calls), in parts of the
request; the gain of embedding the questions of concurrent requests together. The peer, asked in turns with ours: a plain
script of sentence-transformers ``encode`` and pymilvus ``hybrid_search`` with ``RRFRanker``, the same filter, on the same
collection. Not covered: quality (``metier eval retrieval``), a remote Milvus, HTTP, and a reranker that knows something:
its stage runs a cross-encoder of the embedder's size with a random head. Torch computes on one thread, as in a replica
of serving: with more threads than free cores a short question takes ten times as long.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from pymilvus import AnnSearchRequest, MilvusClient, RRFRanker
from sentence_transformers import SentenceTransformer

from cluster.config import Config, RerankerConfig, RetrievalConfig, StoreConfig
from cluster.knowledge import EmbedderState
from cluster.models import resolve
from retrieval.embed import Embedder
from retrieval.embedded import serve
from retrieval.filters import expression, readable
from retrieval.query_vectors import QueryVectors
from retrieval.rerank import Reranker
from retrieval.retriever import Retriever
from retrieval.store import ALIVE, PAGE, Store
from retrieval.types import Principal, Snapshot

CHUNK_WORDS, CLUSTERS = 60, 200
PER_DOCUMENT = 8
MODES = ("dense", "bm25", "hybrid")
TOP_K = (3, 10)
CONCURRENCY = (1, 4, 16)
BATCHING = (1, 8, 32)
ENDLESS = 20_000
"""Words of a question of more than 100,000 characters."""
STAGES: dict[str, dict[str, Any]] = {
    "rerank 20": {"rerank": 20},
    "diversity": {"diversity": 0.3},
    "neighbours": {"neighbours": 1},
}
PRINCIPAL = Principal()


class Words:
    """Real words with about the frequencies of a language, and texts of them; the same for the same seed."""

    def __init__(self, vocabulary: Mapping[str, int], seed: int = 17) -> None:
        """`vocabulary` of a WordPiece tokenizer, whose ids go by frequency: each word is one token."""
        ordered = sorted(vocabulary, key=vocabulary.__getitem__)
        self.words = [word for word in ordered if word.isalpha() and len(word) > 1]
        weights = 1 / np.arange(1, len(self.words) + 1)
        self.cumulative = np.cumsum(weights / weights.sum())
        self.draw = np.random.default_rng(seed)

    def text(self, length: int) -> str:
        picked = np.minimum(np.searchsorted(self.cumulative, self.draw.random(length)), len(self.words) - 1)
        return " ".join(self.words[index] for index in picked)


class Intervals:
    """Time inside the calls that are wrapped, whichever threads make them; a union, not a sum."""

    def __init__(self) -> None:
        self.spans: list[tuple[float, float]] = []

    def wrap(self, owner: Any, name: str) -> None:
        inner = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                self.spans.append((began, time.perf_counter()))

        setattr(owner, name, call)

    def take(self) -> float:
        """Seconds that were covered since the last call."""
        total, reached = 0.0, 0.0
        for began, ended in sorted(self.spans):
            total += max(0.0, ended - max(began, reached))
            reached = max(reached, ended)
        self.spans.clear()
        return total


class Bench:
    """The retriever over one collection, and the peer beside it."""

    def __init__(self, config: Config, uri: str) -> None:
        self.directory = resolve(config.embedder, config.models_cache)
        self.embedder = Embedder(self.directory, config.embedder, threads=1)
        self.store = Store(config.store, uri)
        self.state = EmbedderState(
            source=config.embedder.source,
            max_tokens=config.embedder.max_tokens,
            fingerprint=self.embedder.fingerprint,
            dimension=self.embedder.dimension,
        )
        self.retriever = Retriever(self.store, QueryVectors(lambda _: self.embedder))
        self.peer_model = SentenceTransformer(str(self.directory), local_files_only=True)
        self.peer_client = MilvusClient(uri)
        self.words = Words(self.peer_model.tokenizer.get_vocab())
        self.numbers = count()

    def fill(self, size: int) -> Snapshot:
        collection = f"bench_{size}"
        self.store.create(collection, embedder=self.state.fingerprint, dimension=self.state.dimension)
        draw = np.random.default_rng(size)
        centres = draw.normal(size=(CLUSTERS, self.state.dimension))
        for start in range(0, size, PAGE):
            picked = draw.integers(0, CLUSTERS, size=PAGE)
            vectors = centres[picked] + 0.5 * draw.normal(size=(PAGE, self.state.dimension))
            vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
            rows = [self._row(start + at, vectors[at]) for at in range(min(PAGE, size - start))]
            self.store.upsert(collection, rows)
        self.store.flush(collection)
        return Snapshot(collection, 1, 1, collection, self.state)

    def _row(self, number: int, vector: Any) -> dict[str, Any]:
        text = self.words.text(CHUNK_WORDS)
        document, position = divmod(number, PER_DOCUMENT)
        return {
            "row_id": f"c{number}-1", "chunk_id": f"c{number}", "doc_id": f"d{document}", "title": f"Document {document}",
            "heading": "", "text": text, "search_text": text, "source": f"d{document}.md", "position": position, "page": 0,
            "start": 1000 * position, "end": 1000 * position + len(text), "digest": "d", "vector_key": f"v{number}",
            "tenant": PRINCIPAL.tenant, "groups": list(PRINCIPAL.groups), "born": 1, "died": ALIVE, "metadata": {},
            "dense": vector,
        }  # fmt: skip

    def question(self, length: int = 8) -> str:
        """One that was never asked before, of so many words."""
        return f"{self.words.text(length)} q{next(self.numbers)}"

    def ask(self, snapshot: Snapshot, settings: RetrievalConfig, words: int = 8) -> dict[str, float]:
        """Seconds by stage."""
        question = self.question(words)
        return self.retriever.retrieve(question, snapshot, principal=PRINCIPAL, settings=settings).seconds

    def ask_peer(self, snapshot: Snapshot, settings: RetrievalConfig) -> None:
        question = self.question()
        vector = self.peer_model.encode([question], normalize_embeddings=True, show_progress_bar=False)[0]
        allowed = expression(readable(PRINCIPAL, snapshot.reads))
        sides = [
            AnnSearchRequest([vector], "dense", {"metric_type": "COSINE"}, settings.candidates, expr=allowed),
            AnnSearchRequest([question], "sparse", {"metric_type": "BM25"}, settings.candidates, expr=allowed),
        ]
        fields = ["chunk_id", "doc_id", "title", "text", "source"]
        self.peer_client.hybrid_search(
            snapshot.collection, sides, RRFRanker(60), limit=settings.top_k, output_fields=fields
        )


def figures(seconds: Sequence[float], wall: float | None = None) -> dict[str, float]:
    """Percentiles in milliseconds, and questions/s."""
    p50, p95, p99 = (1000 * float(each) for each in np.percentile(seconds, (50, 95, 99)))
    rate = len(seconds) / (wall or sum(seconds))
    return {"p50": round(p50, 2), "p95": round(p95, 2), "p99": round(p99, 2), "per_s": round(rate, 1)}


def timed(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def spread(call: Callable[[], Any], at_once: int, requests: int) -> dict[str, float]:
    """`requests` calls from `at_once` threads."""
    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(lambda _: call(), range(at_once)))  # the first ones warm up
        began = time.perf_counter()
        seconds = list(pool.map(lambda _: timed(call), range(requests)))
        return figures(seconds, time.perf_counter() - began)


def latencies(bench: Bench, snapshot: Snapshot, requests: int) -> dict[str, Any]:
    """By mode, top-k and concurrency."""
    found: dict[str, Any] = {}
    for mode in MODES:
        for top_k in TOP_K:
            settings = RetrievalConfig(mode=mode, top_k=top_k, min_score=-1)
            for at_once in CONCURRENCY if top_k == TOP_K[0] else CONCURRENCY[:1]:
                case = f"{mode}, top {top_k}, {at_once} at once"
                found[case] = spread(lambda settings=settings: bench.ask(snapshot, settings), at_once, requests)  # type: ignore[misc]
    endless = RetrievalConfig(min_score=-1)
    found[f"hybrid, {ENDLESS:,} words"] = spread(
        lambda: bench.ask(snapshot, endless, ENDLESS), 1, max(requests // 10, 3)
    )
    return found


def apart(bench: Bench, snapshot: Snapshot, requests: int) -> dict[str, Any]:
    """Median milliseconds of each stage and of what is ours, one request at a time."""
    inside = Intervals()
    inside.wrap(bench.embedder, "embed")
    for name in ("search", "query"):
        inside.wrap(bench.store._client, name)
    found: dict[str, Any] = {}
    for case, changes in {**{mode: {"mode": mode} for mode in MODES}, **STAGES}.items():
        settings = RetrievalConfig.model_validate({"min_score": -1} | changes)
        stages: list[dict[str, float]] = []
        ours: list[float] = []
        totals: list[float] = []
        for number in range(requests + 3):
            inside.spans.clear()
            began = time.perf_counter()
            seconds = bench.ask(snapshot, settings)
            total = time.perf_counter() - began
            if number >= 3:
                stages.append(seconds)
                totals.append(total)
                ours.append(total - inside.take() - seconds.get("rerank", 0.0))
        median = {stage: round(1000 * statistics.median(each[stage] for each in stages), 3) for stage in stages[0]}
        share = statistics.median(mine / total for mine, total in zip(ours, totals, strict=True))
        found[case] = {
            "request": round(1000 * statistics.median(totals), 3),
            "ours": round(1000 * statistics.median(ours), 3),
            "ours_share": round(share, 4),
            "stages": median,
        }
    return found


def beside(bench: Bench, snapshot: Snapshot, requests: int) -> dict[str, Any]:
    """Ours and the peer in turns."""
    settings = RetrievalConfig(min_score=-1)
    arms: dict[str, Callable[[], Any]] = {
        "ours": lambda: bench.ask(snapshot, settings),
        "pymilvus hybrid_search": lambda: bench.ask_peer(snapshot, settings),
    }
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(requests + 3):
        for name, call in arms.items():
            took = timed(call)
            if number >= 3:
                seconds[name].append(took)
    return {name: figures(each) for name, each in seconds.items()}


def batching(bench: Bench, requests: int) -> dict[str, Any]:
    """Questions embedded by the thread that asks, at once, and together, by concurrency; and known ones."""
    found: dict[str, Any] = {}
    together = QueryVectors(lambda _: bench.embedder, cached=0)(bench.state)
    kept = QueryVectors(lambda _: bench.embedder)(bench.state)
    for at_once in BATCHING:
        found[f"{at_once} at once"] = {
            "each by itself": spread(lambda: bench.embedder.embed([bench.question()], query=True), at_once, requests),
            "together": spread(lambda: together.embed([bench.question()], query=True), at_once, requests),
        }
    kept.embed(["known"], query=True)
    found["known"] = spread(lambda: kept.embed(["known"], query=True), 1, requests)
    return found


@contextmanager
def reranking(bench: Bench) -> Iterator[None]:
    """The retriever with a cross-encoder of the embedder's size and a random head."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    with tempfile.TemporaryDirectory() as scratch:
        AutoModelForSequenceClassification.from_pretrained(bench.directory, num_labels=1).save_pretrained(scratch)
        AutoTokenizer.from_pretrained(bench.directory).save_pretrained(scratch)
        before = bench.retriever
        reranker = Reranker(Path(scratch), RerankerConfig(source=scratch))
        bench.retriever = Retriever(bench.store, QueryVectors(lambda _: bench.embedder), reranker)
        yield
        bench.retriever = before


def measure(sizes: Sequence[int], requests: int) -> dict[str, Any]:
    """All figures; `requests` of each case."""
    config = Config()
    torch.set_num_threads(1)
    ratios: dict[str, float] = {}
    found: dict[str, Any] = {"load": round(psutil.getloadavg()[0], 2), "requests": requests, "milliseconds": {}}
    with tempfile.TemporaryDirectory() as directory, serve(StoreConfig(data_dir=directory)) as uri:
        bench = Bench(config, uri)
        found["query vectors"] = batching(bench, 2 * requests)
        for size in sizes:
            began = time.perf_counter()
            snapshot = bench.fill(size)
            filled = time.perf_counter() - began
            case: dict[str, Any] = {"rows_per_s": round(size / filled)}
            case["beside"] = beside(bench, snapshot, requests)
            case["latency"] = latencies(bench, snapshot, requests)
            with reranking(bench):
                case["apart"] = apart(bench, snapshot, max(requests // 2, 10))
            bench.retriever = Retriever(bench.store, QueryVectors(lambda _: bench.embedder))
            found["milliseconds"][f"{size} chunks"] = case
            peer, ours = case["beside"]["pymilvus hybrid_search"], case["beside"]["ours"]
            ratios[f"pymilvus / ours, hybrid p50, {size} chunks"] = round(peer["p50"] / ours["p50"], 2)
            for mode in MODES:
                ratios[f"ours in {mode} request, {size} chunks"] = case["apart"][mode]["ours_share"]
        bench.store.close()
        bench.peer_client.close()
    for at_once in BATCHING[1:]:
        arms = found["query vectors"][f"{at_once} at once"]
        ratios[f"together / each by itself, {at_once} at once"] = round(
            arms["together"]["per_s"] / arms["each by itself"]["per_s"], 2
        )
    return found | {"ratios": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few requests, and by default one small collection")
    parser.add_argument("--sizes", help="chunks in the collections; by default 1000,10000, with --quick 1000")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    default = "1000" if arguments.quick else "1000,10000"
    sizes = [int(size) for size in (arguments.sizes or default).split(",")]
    found = measure(sizes, 20 if arguments.quick else 100)
    print(json.dumps(found, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
