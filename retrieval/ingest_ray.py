"""The steps of an ingest on a Ray cluster: read, cut, embed and write as Ray Data, each at its own pace.

Files are read by tasks; the driver gathers the documents, because ids and repetitions are found among all of them, so
its memory must hold their text once. From there on blocks of rows stream: cut, and compared with what is known; embedded
by a pool of ``ingestion.workers`` processes, each with its own model; written by a few more. Ray Data holds back whoever
is ahead. Only chunk ids and digests come back. A worker that dies is started again, and what it had in hand is done
again; rows are keyed by content, so nothing is doubled.

A directory is read on the driver's node; the embedded Milvus server, which listens on that node's loopback, is asked from
there. Everything else runs anywhere. Not covered: words that stand in two blocks of one ingest, which are embedded twice, and corpora larger than the driver's memory.
"""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import lru_cache
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster import runtime
from cluster.config import Config, KnowledgeConfig, from_json, to_json
from cluster.errors import MetierError, Unavailable
from cluster.models import resolve
from cluster.resources import Amount, Ask, check
from retrieval.chunk import CountTokens
from retrieval.embed import Embedder, embedding_text, token_counter
from retrieval.embedded import EMBEDDED
from retrieval.read import Problem, Source, read_source, sources
from retrieval.steps import Outcome, Progress, Rate, Read, Target, assemble, filled, rows, stored_vectors
from retrieval.store import PAGE, Row, Store
from retrieval.types import Document

Block = dict[str, Any]
"""Columns of a Ray Data block, as numpy arrays."""
DOCUMENTS_A_BLOCK = 32
FILES_A_TASK = 16
READ_AHEAD = 4
"""Reading tasks in flight for each embedding worker."""
WRITERS = 2
"""Writing tasks at once: what waits for them waits in Ray's object store, and then the embedders wait."""
ROWS_A_BATCH = 256
"""Rows that an embedding worker takes at once: few enough that all workers end together."""
RESTARTS = 3
"""How often a worker is started again, and what it had in hand is tried again, before the ingest ends."""


class OnRay:
    """The steps on the Ray cluster that this process is connected to (:func:`cluster.runtime.connect`)."""

    def __init__(self, config: Config, uri: str, dimension: int) -> None:
        """Be ready to run.

        Args:
            uri: where Milvus is, as seen from the workers, or from this node for the embedded server.
            dimension: of the embedder's vectors.

        Raises:
            ResourcesShort: the cluster has not the CPUs or GPUs that the embedding workers reserve.
        """
        ingestion = config.ingestion
        each = Amount(ingestion.cpus_per_worker, ingestion.gpus_per_worker)
        settings = "ingestion.workers, ingestion.cpus_per_worker"
        check([Ask("embedding workers", ingestion.workers, each, settings)], runtime.capacity())
        self._config, self._uri, self._dimension = config, uri, dimension
        node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._beside_driver: dict[str, Any] = {"scheduling_strategy": node}

    def read(self, knowledge: KnowledgeConfig, progress: Progress) -> Read:
        """All documents of `knowledge`; as :meth:`retrieval.steps.Here.read`."""
        options = self._config.storage.options
        found, problems = sources(knowledge, options)
        parts = [found[start : start + FILES_A_TASK] for start in range(0, len(found), FILES_A_TASK)]
        near = {} if "://" in (knowledge.documents or "") else self._beside_driver
        task = ray.remote(_read).options(num_cpus=0, **near)
        documents: list[Document] = []
        tasks: list[Any] = []
        for number in range(len(parts)):
            ahead = parts[len(tasks) : number + READ_AHEAD * self._config.ingestion.workers]
            tasks += [task.remote(part, knowledge.model_dump_json(), options) for part in ahead]
            with _ours():
                some, bad = ray.get(tasks[number])
            documents += some
            problems += bad
            progress("read", sum(map(len, parts[: number + 1])), len(found))
        return assemble(documents, problems, knowledge)

    def index(self, read: Read, target: Target, known: Mapping[str, Collection[str]], progress: Progress) -> Outcome:
        """Write the rows of the documents that are not `known`; as :meth:`retrieval.steps.Here.index`."""
        outcome, rate, done = Outcome(), Rate(), 0
        with _ours():
            for block in self._pipeline(read.documents, target, known).iter_batches(batch_size=None):
                for chunk_id, digest, state in zip(block["chunk_id"], block["digest"], block["state"], strict=True):
                    outcome.wanted[str(chunk_id)] = str(digest)
                    if state != KNOWN:
                        outcome.written.add(str(chunk_id))
                    outcome.embedded += int(state == EMBEDDED_NOW)
                done += int(block["closes"].sum())
                progress(rate.said(int((block["state"] != KNOWN).sum())), done, read.count)
        return outcome

    def _pipeline(self, documents: Sequence[Document], target: Target, known: Mapping[str, Collection[str]]) -> Any:
        ingestion = self._config.ingestion
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.raise_original_map_exception = True
        logging.getLogger("ray.data").setLevel(
            logging.CRITICAL
        )  # it tells of its plans, and failures with their stacks
        embedded = self._config.store.uri == EMBEDDED
        store = Store(self._config.store, self._uri)
        try:
            look = filled(store, target.collection)
        finally:
            store.close()
        config = to_json(self._config)
        beside = self._beside_driver if embedded else {}
        blocks = max(1, -(-len(documents) // DOCUMENTS_A_BLOCK))
        lines = ray.data.from_items(
            [{"document": json.dumps(asdict(document))} for document in documents], override_num_blocks=blocks
        )
        cut = lines.map_batches(
            _cut,
            fn_args=(config, self._uri, target, self._dimension, [ray.put(dict(known))], look),
            batch_size=DOCUMENTS_A_BLOCK,
            compute=ray.data.TaskPoolStrategy(min(ingestion.workers, blocks)),
            num_cpus=0,
            **beside,
        )
        vectors = cut.map_batches(
            _Embed,
            fn_constructor_args=(config,),
            batch_size=ROWS_A_BATCH,
            compute=_pool(ingestion.workers),
            num_cpus=ingestion.cpus_per_worker,
            num_gpus=ingestion.gpus_per_worker,
            max_restarts=RESTARTS,
            max_task_retries=RESTARTS,
        )
        return vectors.map_batches(
            _Write,
            fn_constructor_args=(config, self._uri, target.collection),
            batch_size=PAGE,
            compute=_pool(WRITERS),
            num_cpus=0,
            max_restarts=RESTARTS,
            max_task_retries=RESTARTS,
            **beside,
        )


KNOWN, STORED, TO_EMBED, EMBEDDED_NOW = range(4)
"""States of a row: there already; with a vector from the collection; without one; with one from the embedder."""


def _cut(
    block: Block, config: str, uri: str, target: Target, dimension: int, known: Sequence[Any], look: bool
) -> Block:
    """Documents -> rows, and the vectors that the collection has for them."""
    count, store, there = _cutter(config, uri, known[0])
    made: list[Row] = []
    closes: list[int] = []
    for line in block["document"]:
        of_document = list(rows(_document(line), target, count))
        made += of_document
        closes += [0] * (len(of_document) - 1) + [1] * bool(of_document)
    new = [row["digest"] not in there.get(row["chunk_id"], ()) for row in made]
    keys = {row["vector_key"] for row, wanted in zip(made, new, strict=True) if wanted}
    found = stored_vectors(keys, target.collection, store) if look else {}
    dense = np.zeros((len(made), dimension), np.float32)
    state = np.full(len(made), KNOWN, np.int8)
    for place, (row, wanted) in enumerate(zip(made, new, strict=True)):
        if wanted and row["vector_key"] in found:
            dense[place], state[place] = found[row["vector_key"]], STORED
        elif wanted:
            state[place] = TO_EMBED
    return {
        "chunk_id": np.array([row["chunk_id"] for row in made], object),
        "digest": np.array([row["digest"] for row in made], object),
        "row": np.array([json.dumps(row) if wanted else "" for row, wanted in zip(made, new, strict=True)], object),
        "closes": np.array(closes, np.int64),
        "state": state,
        "dense": dense,
    }


@lru_cache(1)
def _cutter(config: str, uri: str, known: Any) -> tuple[CountTokens, Store, Mapping[str, Collection[str]]]:
    """What a process that cuts keeps from one block to the next."""
    resolved = from_json(config)
    count = token_counter(resolve(resolved.embedder, resolved.models_cache), resolved.embedder)
    return count, Store(resolved.store, uri), ray.get(known)


class _Embed:
    """Rows -> rows with vectors."""

    def __init__(self, config: str) -> None:
        self._config = config
        self._embedder: Embedder | None = None

    def __call__(self, block: Block) -> Block:
        if self._embedder is None:  # not in the constructor, whose errors come back as text
            self._embedder = _embedder(from_json(self._config))
        dense, state = block["dense"].copy(), block["state"].copy()
        places: dict[str, list[int]] = defaultdict(list)
        for place in np.flatnonzero(state == TO_EMBED):
            row = json.loads(block["row"][place])
            places[embedding_text(row["title"], row["heading"], row["text"])].append(int(place))
        for same, vector in zip(places.values(), self._embedder.embed(list(places)), strict=True):
            dense[same], state[same] = vector, STORED
            state[same[0]] = EMBEDDED_NOW
        return block | {"dense": dense, "state": state}


class _Write:
    """Rows -> Milvus; what was asked for goes on."""

    def __init__(self, config: str, uri: str, collection: str) -> None:
        self._config, self._uri, self._collection = config, uri, collection
        self._store: Store | None = None

    def __call__(self, block: Block) -> Block:
        if self._store is None:
            self._store = Store(from_json(self._config).store, self._uri)
        page = [
            json.loads(row) | {"dense": dense}
            for row, dense, state in zip(block["row"], block["dense"], block["state"], strict=True)
            if state != KNOWN
        ]
        self._store.upsert(self._collection, page)
        return {name: block[name] for name in ("chunk_id", "digest", "closes", "state")}


def _read(part: list[Source], knowledge: str, options: Mapping[str, Any]) -> tuple[list[Document], list[Problem]]:
    settings = KnowledgeConfig.model_validate_json(knowledge)
    documents: list[Document] = []
    problems: list[Problem] = []
    for source in part:
        some, bad = read_source(source, settings, options)
        documents += some
        problems += bad
    return documents, problems


def _document(line: str) -> Document:
    fields = json.loads(line)
    groups = fields["groups"] if fields["groups"] is None else tuple(fields["groups"])
    return Document(**fields | {"groups": groups, "pages": tuple(fields["pages"])})


def _pool(most: int) -> Any:
    """A pool that grows with its work; all of it at once would be told apart by Ray Data as a mistake of small jobs."""
    return ray.data.ActorPoolStrategy(min_size=1, max_size=most)


def _embedder(config: Config) -> Embedder:
    """The embedder on this node, on what its process reserved: a GPU only if it has one."""
    ingestion, own = config.ingestion, config.embedder
    if not ingestion.gpus_per_worker and own.device == "auto":
        own = own.model_copy(update={"device": "cpu"})
    return Embedder(resolve(own, config.models_cache), own, threads=max(1, int(ingestion.cpus_per_worker)))


@contextmanager
def _ours() -> Iterator[None]:
    """An error of a worker as what it was there, if it is one of ours."""
    try:
        yield
    except RayError as error:
        if isinstance(error, RayTaskError) and isinstance(error.cause, MetierError):
            raise error.cause from None
        raise Unavailable(f"the ingest failed on a worker: {_last_line(error)}") from error


def _last_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
