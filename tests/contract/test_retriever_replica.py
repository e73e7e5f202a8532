"""The retriever stage of serving as it stands in a replica, without Ray: real Milvus, concurrent questions, its warm-up."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from cluster.config import Config, RetrievalConfig, load, to_json
from cluster.errors import Mismatch, NotFound
from cluster.registry import Registry
from cluster.storage import Storage
from retrieval.embedded import serve
from retrieval.filters import Compare
from retrieval.store import Store
from retrieval.types import Principal, Snapshot
from serving.knowledge.backend import Backend
from tests import harbour

ANY = RetrievalConfig(min_score=-1)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Config]:
    directory = tmp_path_factory.mktemp("replica")
    own = [f"storage.url={directory}/store", f"store.data_dir={directory}/milvus"]
    config = load(None, [*own, "embedder.source=tiny:bert", "knowledge.name=harbour"])
    with serve(config.store) as uri:
        config = config.model_copy(update={"store": config.store.model_copy(update={"uri": uri})})
        store = Store(config.store, uri)
        harbour.fill(config, store)
        yield config
        store.close()


@pytest.fixture(scope="module")
def make() -> Callable[[Config], Any]:
    """A replica of a configuration."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Ray's, of itself
        from serving.app import RetrieverReplica

    return lambda config: RetrieverReplica(to_json(config))


@pytest.fixture(scope="module")
def replica(config: Config, make: Callable[[Config], Any]) -> Iterator[Any]:
    replica = make(config)
    yield replica
    replica.store.close()


@pytest.fixture
def snapshot(config: Config) -> Snapshot:
    return Snapshot.of("harbour", Registry(Storage.of(config.storage)).knowledge_version("harbour"))


def test_many_questions_at_once_each_get_their_passages(replica: Any, snapshot: Snapshot) -> None:
    texts = [texts[0] for name, texts in harbour.DOCUMENTS.items() if name != "crew"]

    async def ask() -> list[str]:
        asked = (replica.retrieve(texts[n % 3], snapshot, Principal(), ANY) for n in range(40))
        return [found.passages[0].text for found in await asyncio.gather(*asked)]

    assert asyncio.run(ask()) == [texts[n % 3] for n in range(40)]


def test_several_queries_and_a_filter_pass_through(replica: Any, snapshot: Snapshot) -> None:
    where = Compare("doc_id", "==", "rules")
    found = asyncio.run(replica.retrieve(["a bicycle", "the kennel"], snapshot, Principal(), ANY, where))
    assert {passage.doc_id for passage in found.passages} == {"rules"}
    assert "queries" in found.passages[0].scores


def test_errors_are_ours(replica: Any, snapshot: Snapshot) -> None:
    with pytest.raises(Mismatch, match="reranker"):
        asyncio.run(replica.retrieve("dog", snapshot, Principal(), RetrievalConfig(rerank=5)))
    with pytest.raises(NotFound, match="reranker"):
        asyncio.run(replica.rerank("dog", ["a dog"]))


def test_it_offers_what_the_knowledge_api_calls(replica: Any, snapshot: Snapshot) -> None:
    assert all(asyncio.iscoroutinefunction(getattr(replica, each.name)) for each in fields(Backend))
    vectors, lengths = asyncio.run(replica.embed(["a dog", "a bicycle"], True))
    assert [len(vector) for vector in vectors] == [32, 32] and lengths[0] < lengths[1]
    held = asyncio.run(replica.documents(snapshot, Principal()))
    assert [document.doc_id for document in held] == ["charging", "fares", "rules"]
    texts = asyncio.run(replica.texts(snapshot, Principal(), Compare("doc_id", "==", "rules")))
    assert texts == harbour.DOCUMENTS["rules"]


def test_a_knowledge_whose_model_is_gone_does_not_keep_it_from_starting(
    config: Config, make: Callable[[Config], Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    registry = Registry(Storage.of(config.storage.model_copy(update={"url": str(other)})))
    entry = Registry(Storage.of(config.storage)).knowledge_version("harbour").model_dump(exclude={"number", "created"})
    entry["embedder"] |= {"source": "/nowhere", "fingerprint": "gone"}
    registry.knowledge_append("harbour", entry)
    changed = config.model_copy(update={"storage": config.storage.model_copy(update={"url": str(other)})})
    replica = make(changed)
    assert "the embedder of knowledge 'harbour' is not loaded" in capsys.readouterr().err
    replica.store.close()
