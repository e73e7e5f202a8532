"""The store against a real Milvus: what is written and found, what a collection is made of, what a search costs."""

from __future__ import annotations

import logging
import os
import re
from concurrent import futures
from typing import Any
from uuid import uuid4

import grpc
import numpy as np
import pytest
from pymilvus.grpc_gen import common_pb2, milvus_pb2, milvus_pb2_grpc

from cluster.config import IndexConfig, StoreConfig
from cluster.errors import BadInput, ConfigError, Mismatch, NotFound, Unavailable
from retrieval import lite
from retrieval.filters import Compare, ContainsAny, In
from retrieval.store import PAGE, Store, alias, outdated
from tests.contract.conftest import MakeCollection
from tests.rows import ALL, DIMENSION, EMBEDDER, ids, row, vector
from tests.trade import wait_for

TEXTS = ["refund of a ticket", "refund of a ticket after a storm", "engine start on the vessel"]


def test_rows_are_paged_counted_and_come_back_as_written(store: Store, make_collection: MakeCollection) -> None:
    rows = [row(number, metadata={"nested": [1, "é"]}, groups=["a", "b"]) for number in range(PAGE + 20)]
    name = make_collection(rows)
    assert store.count(name, ALL) == len(rows)
    assert ids(store, name, Compare("position", "<", PAGE + 10)) == {f"c{n}" for n in range(PAGE + 10)}
    [found] = store.rows(name, Compare("row_id", "==", "c7-1"), list(rows[7]))
    assert found.pop("dense") == pytest.approx(rows[7].pop("dense"))
    assert found == rows[7]
    store.upsert(name, [row(7)])
    assert store.count(name, ALL) == len(rows)
    store.delete(name, In("chunk_id", ["c1", "c2"]))
    assert store.count(name, ALL) == len(rows) - 2
    store.flush(name)
    assert store.count(name, ALL) == len(rows) - 2
    some = store.some(name, Compare("position", ">", 5), ["chunk_id", "position"], 10)
    assert len(some) == 10 and all(found["position"] > 5 for found in some)
    store.drop(name)
    assert not store.exists(name)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"source": "é" * 3000}, r"document 'doc': source of chunk 3 has 6000 bytes, and Milvus takes 4096"),
        ({"text": "x" * 65_536}, r"text of chunk 3 has 65536 bytes, and Milvus takes 65535"),
        ({"metadata": {"k": "x" * 65_536}}, "metadata of chunk 3 has 65545 bytes"),
        ({"groups": [f"g{n}" for n in range(257)]}, "names 257 groups, and a row takes 256"),
    ],
)
def test_a_row_that_does_not_fit_is_named_and_nothing_is_written(
    store: Store, make_collection: MakeCollection, values: dict[str, Any], sentence: str
) -> None:
    name = make_collection()
    with pytest.raises(BadInput, match=sentence):
        store.upsert(name, [row(1), row(2), row(3, **values)])
    assert store.count(name, ALL) == 0
    store.upsert(name, [row(3, source="é" * 2048, groups=[f"g{n}" for n in range(256)])])
    assert ids(store, name, ContainsAny("groups", ["g255"])) == {"c3"}


def test_scores_are_higher_for_better_on_both_sides(store: Store, make_collection: MakeCollection) -> None:
    name = make_collection([row(n, text=text, page=n, metadata={"n": n}) for n, text in enumerate(TEXTS)])
    query = vector("refund storm")
    for stage, found in (
        ("dense", store.search_dense(name, query, ALL, 3)),
        ("bm25", store.search_bm25(name, "refund storm", ALL, 3)),
    ):
        assert (found[0].text, found[0].page, found[0].metadata) == (TEXTS[1], 1, {"n": 1})
        assert found[0].score > found[1].score > 0
        assert found[0].scores == {stage: found[0].score}
    assert store.search_dense(name, query, ALL, 1)[0].score == pytest.approx(float(query @ vector(TEXTS[1])), abs=1e-4)
    for nothing in ("zeppelin", "?!", ""):
        assert store.search_bm25(name, nothing, ALL, 3) == []


def test_names_never_collide() -> None:
    names = ["a.b", "a-b", "a_b", "a_db", "a__b", "a_v1", "a", "1a"]
    assert len({alias(name) for name in names}) == len(names)
    assert all(re.fullmatch(r"[A-Za-z_]\w*", alias(name), re.ASCII) for name in names)
    assert not any(alias(one) == alias(other) + "_v1" for one in names for other in names)


def test_an_alias_moves_at_once_and_goes(store: Store, make_collection: MakeCollection) -> None:
    blue, green = make_collection(), make_collection()
    knowledge = blue.replace("_", "-")
    assert store.aliased(knowledge) is None
    for name in (blue, green, green):
        store.point(knowledge, name)
        assert store.aliased(knowledge) == name
    store.unpoint(knowledge)
    store.unpoint(knowledge)
    assert store.aliased(knowledge) is None


def test_unknown_collections_are_named(store: Store, uri: str) -> None:
    with pytest.raises(NotFound, match=f"nowhere.*{uri}"):
        store.count("nowhere", ALL)
    with pytest.raises(NotFound):
        store.search_bm25("nowhere", "x", ALL, 1)


# -- settings ----------------------------------------------------------------------------------------------------

EXAMPLES: list[dict[str, Any]] = [
    {"type": "AUTOINDEX", "build": {}},
    {"type": "FLAT", "build": {}},
    {"type": "HNSW", "build": {"M": 8, "efConstruction": 64}, "search": {"ef": 2}},
    {"type": "HNSW_SQ", "build": {}, "search": {"ef": 32}},
    {"type": "IVF_FLAT", "build": {"nlist": 4}, "search": {"nprobe": 4}},
    {"type": "IVF_SQ8", "build": {"nlist": 4}, "search": {"nprobe": 4}},
    {"type": "IVF_PQ", "build": {"nlist": 4}, "search": {"nprobe": 4}},
    {"type": "SCANN", "build": {"nlist": 4}, "search": {"nprobe": 4, "reorder_k": 2}},
    {"type": "DISKANN", "build": {}, "search": {"search_list": 20}},
    {"type": "GPU_CAGRA", "build": {}, "search": {"itopk_size": 2}},
    {"type": "GPU_IVF_FLAT", "build": {"nlist": 4}, "search": {"nprobe": 4}},
    {"type": "GPU_IVF_PQ", "build": {"nlist": 4}, "search": {"nprobe": 4}},
    {"type": "GPU_BRUTE_FORCE", "build": {}},
]


@pytest.mark.parametrize("index", EXAMPLES, ids=lambda index: index["type"])
def test_every_index_finds_the_nearest_or_is_refused_in_a_sentence(
    store: Store, store_config: StoreConfig, uri: str, make_collection: MakeCollection, index: dict[str, Any]
) -> None:
    config = store_config.model_copy(update={"index": IndexConfig(**index)})
    if lite.is_lite(store.server_version) and index["type"] not in lite.INDEXES:
        with pytest.raises(ConfigError, match=f"does not offer {index['type']}; take one of AUTOINDEX"):
            Store(config, uri)
        return
    other = Store(config, uri)
    try:
        name = make_collection([row(n) for n in range(200)], by=other)
        other.flush(name)
        assert other.search_dense(name, vector("word17"), ALL, 10)[0].chunk_id == "c17"
        assert len(other.search_dense(name, vector("word17"), ALL, 10)) == 10
    except ConfigError as error:  # a server without a GPU, or of another version
        assert error.param == "store.index.type"
    finally:
        other.close()


def test_build_and_search_parameters_reach_the_server(
    store_config: StoreConfig, uri: str, make_collection: MakeCollection
) -> None:
    random = np.random.default_rng(0)
    vectors = random.standard_normal((1000, DIMENSION), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    nearest = [f"c{n}" for n in np.argsort(vectors @ vectors[0])[:10]]
    for nprobe in (1, 32):
        index = IndexConfig(type="IVF_FLAT", build={"nlist": 32}, search={"nprobe": nprobe})
        other = Store(store_config.model_copy(update={"index": index}), uri)
        name = make_collection([row(n, dense=vector) for n, vector in enumerate(vectors)], by=other)
        other.flush(name)

        def found_as_asked() -> bool:
            """One list of 32 misses neighbours, all of them find each; until there is an index, nothing is missed."""
            hits = [hit.chunk_id for hit in other.search_dense(name, -vectors[0], ALL, 10)]  # noqa: B023
            return (hits == nearest) == (nprobe == 32)  # noqa: B023

        wait_for("the index to be searched", found_as_asked)
        other.close()


@pytest.mark.parametrize(
    ("index", "sentence"),
    [
        ({"type": "IVF_FLAT", "build": {"M": 16}}, "store.index.build: M is no parameter of IVF_FLAT; known: nlist"),
        ({"type": "FLAT", "build": {"nlist": 1}}, "store.index.build: nlist is no parameter of FLAT; it takes none"),
        ({"type": "HNSW", "search": {"nprobe": 1}}, "store.index.search: nprobe is no parameter of HNSW; known: ef"),
    ],
)
def test_parameters_that_do_not_fit_are_named(uri: str, index: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        Store(StoreConfig(index=IndexConfig(**index)), uri).create("never", embedder="e", dimension=4)


def test_writing_with_other_settings_is_refused_and_searching_goes_on(
    store: Store, store_config: StoreConfig, uri: str, make_collection: MakeCollection
) -> None:
    name = make_collection([row(1)])
    for change, named in (
        ({"index": IndexConfig(type="FLAT", build={})}, r"store\.index\.build, store\.index\.type|store\.index\.type"),
        ({"bm25": store_config.bm25.model_copy(update={"k1": 1.2})}, r"store\.bm25\.k1"),
        ({"bm25": store_config.bm25.model_copy(update={"b": 0.75})}, r"store\.bm25\.b"),
    ):
        other = Store(store_config.model_copy(update=change), uri)
        with pytest.raises(Mismatch, match=f"({named}).*knowledge reindex"):
            other.create(name, embedder=EMBEDDER, dimension=DIMENSION)
        assert other.search_bm25(name, "word1", ALL, 1)[0].chunk_id == "c1"
        assert other.search_dense(name, vector("word1"), ALL, 1)[0].chunk_id == "c1"
        other.close()
    for fingerprint, dimension in (("other", DIMENSION), (EMBEDDER, 32)):
        with pytest.raises(Mismatch, match=f"{name}.*another model"):
            store.create(name, embedder=fingerprint, dimension=dimension)
    store.create(name, embedder=EMBEDDER, dimension=DIMENSION)
    assert store.count(name, ALL) == 1


def test_bm25_constants_reach_the_server(store_config: StoreConfig, uri: str, make_collection: MakeCollection) -> None:
    ratios = []
    for k1 in (0.1, 3.0):
        bm25 = store_config.bm25.model_copy(update={"k1": k1})
        other = Store(store_config.model_copy(update={"bm25": bm25}), uri)
        name = make_collection([row(n, text=text) for n, text in enumerate(["ferry " * 8, "ferry", "quay"])], by=other)
        often, once = other.search_bm25(name, "ferry", ALL, 2)
        ratios.append(often.score / once.score)
        other.close()
    assert ratios[1] > 1.2 * ratios[0]  # repeats count for more


def test_the_chinese_analyzer_finds_words_inside_a_sentence_or_says_what_it_needs(
    store_config: StoreConfig, uri: str, make_collection: MakeCollection
) -> None:
    config = store_config.model_copy(update={"bm25": store_config.bm25.model_copy(update={"analyzer": "chinese"})})
    try:
        other = Store(config, uri)
    except ConfigError as error:
        assert "pip install jieba" in error.message and error.param == "store.bm25.analyzer"
        return
    name = make_collection([row(1, text="我爱北京天安门"), row(2, text="ferry")], by=other)
    assert [passage.chunk_id for passage in other.search_bm25(name, "北京", ALL, 2)] == ["c1"]
    other.close()


@pytest.mark.skipif("MILVUS_URI" in os.environ, reason="a server has more")
def test_what_the_embedded_server_lacks_is_said_before_anything_is_made(uri: str) -> None:
    config = StoreConfig()
    for change, param in (
        ({"bm25": config.bm25.model_copy(update={"analyzer": "english"})}, "store.bm25.analyzer"),
        ({"replicas": 2}, "store.replicas"),
    ):
        with pytest.raises(ConfigError, match="the embedded Milvus") as caught:
            Store(config.model_copy(update=change), uri)
        assert caught.value.param == param


def test_what_a_killed_run_began_is_completed(store: Store, make_collection: MakeCollection) -> None:
    name = make_collection([row(1)])
    store._client.release_collection(name)
    store._client.drop_index(name, "dense")
    store.create(name, embedder=EMBEDDER, dimension=DIMENSION)
    assert set(store._client.list_indexes(name)) == {"dense", "sparse"}
    assert store.search_dense(name, vector("word1"), ALL, 1)[0].chunk_id == "c1"


def test_two_that_create_at_once_make_one(store: Store) -> None:
    name = f"test_{uuid4().hex}"
    with futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: store.create(name, embedder=EMBEDDER, dimension=DIMENSION), range(8)))
    store.upsert(name, [row(1)])
    assert store.count(name, ALL) == 1
    store.drop(name)


# -- what a search costs, and who answers ------------------------------------------------------------------------


class Recorder(grpc.GenericRpcHandler):
    """A gRPC server in front of Milvus that passes calls on as bytes and remembers their names."""

    def __init__(self, target: str) -> None:
        self.calls: list[str] = []
        self._channel = grpc.insecure_channel(target.removeprefix("http://"))

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        self.calls.append(details.method.rsplit("/", 1)[-1])
        forward = self._channel.unary_unary(details.method)
        return grpc.unary_unary_rpc_method_handler(lambda request, context: forward(request))


@pytest.mark.skipif("MILVUS_URI" in os.environ, reason="the recorder speaks no TLS")
def test_a_search_is_one_call(uri: str, make_collection: MakeCollection) -> None:
    name = make_collection([row(n) for n in range(5)])
    recorder = Recorder(uri)
    server = grpc.server(futures.ThreadPoolExecutor(4), handlers=[recorder])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    through = Store(StoreConfig(), f"http://127.0.0.1:{port}")
    for search in (
        lambda: through.search_dense(name, np.asarray(vector("word1")), ALL, 3),
        lambda: through.search_bm25(name, "word1", ALL, 3),
        lambda: through.some(name, ALL, ["chunk_id"], 3),
    ):
        recorder.calls.clear()
        assert search()
        assert len(recorder.calls) == 1
    through.close()
    server.stop(0).wait()


class OldMilvus(milvus_pb2_grpc.MilvusServiceServicer):
    """As much of a server as a client asks when it connects."""

    def __init__(self, version: str = "v2.6.9", refuse: bool = False) -> None:
        self.version, self.refuse = version, refuse

    def Connect(self, request: Any, context: grpc.ServicerContext) -> Any:
        if self.refuse:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "auth check failure")
        return milvus_pb2.ConnectResponse(status=common_pb2.Status())

    def GetVersion(self, request: Any, context: grpc.ServicerContext) -> Any:
        return milvus_pb2.GetVersionResponse(status=common_pb2.Status(), version=self.version)


@pytest.fixture
def old(request: pytest.FixtureRequest) -> Any:
    server = grpc.server(futures.ThreadPoolExecutor(2))
    milvus_pb2_grpc.add_MilvusServiceServicer_to_server(OldMilvus(**request.param), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"http://127.0.0.1:{port}"
    server.stop(0).wait()


@pytest.mark.parametrize("old", [{}], indirect=True)
def test_a_server_with_known_holes_is_warned_of(old: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "retrieval.store"):
        Store(StoreConfig(), old).close()
    assert "2.6.9" in caplog.text and "CVE-2026-26190" in caplog.text and "upgrade to" in caplog.text


def test_which_versions_are_old() -> None:
    assert [v for v in ("v2.4.24", "2.5.26", "v2.5.27", "2.6.9-gpu", "v2.6.10", "3.0.1", "milvus") if outdated(v)] == [
        "v2.4.24", "2.5.26", "2.6.9-gpu"
    ]  # fmt: skip


@pytest.mark.parametrize("old", [{"refuse": True}], indirect=True)
def test_a_refused_token_names_the_variable(old: str) -> None:
    with pytest.raises(Unavailable, match="refuses our credentials; set METIER_MILVUS_TOKEN"):
        Store(StoreConfig(), old)
