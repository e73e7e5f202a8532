"""A training run from rows to a published adapter, in the order docs/architecture.md walks through it.

Everything that can be refused is refused before workers start: rows and lengths before Ray does, resources after.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from cluster import runtime
from cluster.config import Config
from cluster.errors import ConfigError, NotFound
from cluster.models import base_ref, load_tokenizer, resolve
from cluster.registry import AdapterVersion, Registry
from cluster.release import BaseRef, DatasetRef, KnowledgeRef
from cluster.resources import check, demand
from cluster.storage import Storage
from retrieval.embed import Embedder
from retrieval.embedded import serve as serve_milvus
from retrieval.filters import And, Condition, live, rights
from retrieval.prompt import Tokenizer, token_counter
from retrieval.query import search_query
from retrieval.retriever import Retriever
from retrieval.store import Store
from retrieval.types import Chunk, Principal
from training.data.encode import encode, tokens
from training.data.grounded import GroundedRow, ground_rows
from training.history import History
from training.launch import launch
from training.publish import publish
from training.data.rows import Row, digest, read_rows

Say = Callable[[str], None]


def train(
    config: Config, *, say: Say, on_event: Callable[[dict[str, Any]], None], force: bool = False
) -> AdapterVersion:
    """Fine-tune on ``data.train`` and publish the adapter.

    Args:
        say: called with one line for each step.
        on_event: called with each logged training step.
        force: train even if an adapter of this very recipe is already published.

    Raises:
        MetierError: rows, index, resources or workers; nothing is published then, and the same call goes on from
            the last checkpoint.
    """
    if not config.data.train:
        raise ConfigError("data.train names no file; list the JSONL files to train on", param="data.train")
    storage = Storage.of(config.storage)
    registry = Registry(storage)
    rows = read_rows(config.data.train)
    base_directory = resolve(config.base, config.models_cache)
    base = base_ref(config.base, base_directory)

    tokenizer = load_tokenizer(base_directory, config.base.trust_remote_code)
    grounded, knowledge = ground_on_index(config, registry, rows, tokenizer)
    dataset = DatasetRef(
        digest=digest(grounded),
        rows=len(grounded),
        documents=sorted({doc for row in grounded for doc in row.documents}),
    )
    encoded = encode(grounded, tokenizer, config.training.max_tokens)
    say(f"{len(rows)} rows, {tokens(encoded)} tokens, passages from knowledge {knowledge.name} v{knowledge.version}")

    recipe = recipe_digest(config, base, dataset)
    if not force and (known := _published(registry, config.training.adapter, recipe)):
        say(f"adapter {known.name}@{known.version} was trained with exactly this recipe; --force trains again")
        return known

    path = f"datasets/{dataset.digest}.jsonl"
    storage.write(path, "".join(row.model_dump_json() + "\n" for row in grounded).encode())
    run = f"{config.training.adapter}-{recipe[:12]}" + (f"-{int(time.time())}" if force else "")
    history = History(storage, run)

    def record(event: dict[str, Any]) -> None:
        history.add(event)
        on_event(event)

    with runtime.connect(config):
        check(demand(config, "train"), runtime.capacity())
        say(f"run {run}: {config.training.workers} workers, DeepSpeed ZeRO-{config.training.deepspeed.zero_stage}")
        checkpoint = launch(config, run=run, dataset=path, on_event=record)
        with tempfile.TemporaryDirectory(prefix="metier-adapter-") as scratch:
            directory = Path(checkpoint.to_directory(scratch))
            history.save()
            return publish(
                registry,
                config,
                directory,
                base=base,
                base_directory=base_directory,
                dataset=dataset,
                knowledge=knowledge,
                events=history.events,
                recipe=recipe,
            )


def ground_on_index(
    config: Config, registry: Registry, rows: Sequence[Row], tokenizer: Tokenizer
) -> tuple[list[GroundedRow], KnowledgeRef]:
    """`rows` with the passages the retriever returns for them on the current knowledge version."""
    version = registry.knowledge_head(config.knowledge.name)
    if version == 0:
        raise NotFound(
            f"knowledge '{config.knowledge.name}' is empty; run `metier index` first", param="knowledge.name"
        )
    principal = Principal(config.knowledge.tenant, config.knowledge.groups)
    settings = config.retrieval.model_copy(update={"top_k": config.retrieval.candidates, "min_score": -1.0})
    with serve_milvus(config.store) as uri:
        store = Store(config.store, uri)
        retriever = Retriever(store, Embedder(resolve(config.embedder, config.models_cache), config.embedder))
        chunks = _chunks(store, config.knowledge.name, And((rights(principal), live(version))))

        def retrieve(conversation: Sequence[dict[str, str]]) -> Any:
            return retriever.retrieve(
                search_query(conversation),
                knowledge=config.knowledge.name,
                version=version,
                principal=principal,
                settings=settings,
            ).passages

        grounded = list(
            ground_rows(
                rows,
                config.prompt,
                retrieve=retrieve,
                chunks_of=lambda doc_id: chunks.get(doc_id, []),
                count_tokens=token_counter(tokenizer),
                top_k=config.retrieval.top_k,
                no_gold_share=config.training.no_gold_share,
                seed=config.training.seed,
            )
        )
    return grounded, KnowledgeRef(name=config.knowledge.name, version=version)


def _chunks(store: Store, knowledge: str, condition: Condition) -> dict[str, list[Chunk]]:
    """The chunks that meet `condition`, by document."""
    columns = [field.name for field in fields(Chunk) if field.name != "metadata"]
    by_document: dict[str, list[Chunk]] = defaultdict(list)
    for row in store.rows(knowledge, condition, columns):
        by_document[row["doc_id"]].append(Chunk(**{column: row[column] for column in columns}))
    return by_document


def recipe_digest(config: Config, base: BaseRef, dataset: DatasetRef) -> str:
    """Hash of everything that decides the weights of an adapter."""
    recipe = {
        "base": base.model_dump(mode="json"),
        "dataset": dataset.digest,
        "training": config.training.model_dump(mode="json", exclude={"max_failures", "checkpoint_steps"}),
    }
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()


def _published(registry: Registry, name: str, recipe: str) -> AdapterVersion | None:
    versions = [version for version in registry.adapters() if version.name == name]
    return next((version for version in reversed(versions) if version.card.training.get("recipe") == recipe), None)
