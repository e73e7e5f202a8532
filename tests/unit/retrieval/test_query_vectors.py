"""Queries that come together are embedded together; known ones are not embedded at all."""

import asyncio
import gc
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from cluster.knowledge import EmbedderState
from retrieval.embed import Vectors
from retrieval.query_vectors import LARGEST_BATCH, QueryVectors

STATE = EmbedderState(source="tests", max_tokens=16, fingerprint="lengths", dimension=2)


class Gated:
    """Vectors of (length, 1). While ``gate`` is shut a batch waits; ``entered`` tells that one has begun."""

    fingerprint, dimension = STATE.fingerprint, STATE.dimension

    def __init__(self, fingerprint: str = STATE.fingerprint) -> None:
        self.fingerprint = fingerprint
        self.batches: list[list[str]] = []
        self.gate, self.entered = threading.Event(), threading.Event()
        self.gate.set()
        self.error: Exception | None = None

    def count_tokens(self, text: str) -> int:
        return len(text)

    def embed(self, texts: Sequence[str], *, query: bool = False) -> Vectors:
        self.batches.append(list(texts))
        self.entered.set()
        assert self.gate.wait(30)
        if self.error:
            raise self.error
        return np.array([[len(text), query] for text in texts], dtype=np.float32)


def in_line(vectors: QueryVectors, model: Gated, first: str, others: Sequence[str]) -> list[Vectors]:
    """The vectors of `first`, while whose batch all `others` came."""
    model.gate.clear()
    with ThreadPoolExecutor(1 + len(others)) as pool:
        found = [pool.submit(vectors(STATE).embed, [first], query=True)]
        assert model.entered.wait(30)
        found += [pool.submit(vectors(STATE).embed, [text], query=True) for text in others]
        queue = vectors._queues[model]
        while len(queue._waiting) < len(others):
            threading.Event().wait(0.001)
        model.gate.set()
        return [each.result() for each in found]


def test_those_that_come_during_a_batch_share_the_next() -> None:
    model = Gated()
    others = ["a" * number for number in range(2, 10)]
    found = in_line(QueryVectors(lambda _: model), model, "a", others)
    assert model.batches[0] == ["a"]
    assert sorted(model.batches[1]) == sorted(others)
    assert len(model.batches) == 2
    assert [vector.tolist() for vector in found] == [[[number, 1]] for number in range(1, 10)]


def test_the_same_question_is_embedded_once_in_a_batch() -> None:
    model = Gated()
    in_line(QueryVectors(lambda _: model, cached=0), model, "a", ["bb"] * 5)
    assert model.batches == [["a"], ["bb"]]


def test_a_burst_is_split_into_batches_of_a_bounded_size() -> None:
    model = Gated()
    others = [f"question {number}" for number in range(LARGEST_BATCH + 5)]
    in_line(QueryVectors(lambda _: model), model, "a", others)
    assert [len(batch) for batch in model.batches] == [1, LARGEST_BATCH, 5]


def test_known_queries_are_kept_and_the_least_recently_used_goes_first() -> None:
    model = Gated()
    queries = QueryVectors(lambda _: model, cached=2)(STATE)
    for text in ("a", "bb", "a", "ccc", "a", "bb"):
        assert queries.embed([text], query=True).tolist() == [[len(text), 1]]
    assert model.batches == [["a"], ["bb"], ["ccc"], ["bb"]]
    assert queries.embed(["ccc", "a", "ccc"], query=True).tolist() == [[3, 1], [1, 1], [3, 1]]
    assert queries.embed([], query=True).shape == (0, 2)


def test_what_a_caller_does_to_its_vector_stays_with_it() -> None:
    model = Gated()
    queries = QueryVectors(lambda _: model)(STATE)
    queries.embed(["a"], query=True)[0, 0] = 99
    assert queries.embed(["a"], query=True).tolist() == [[1, 1]]


def test_models_do_not_share_vectors_and_a_dropped_one_is_let_go() -> None:
    models = {"lengths": Gated(), "others": Gated("others")}
    vectors = QueryVectors(lambda state: models[state.fingerprint])
    vectors(STATE).embed(["a"], query=True)
    vectors(STATE.model_copy(update={"fingerprint": "others"})).embed(["a"], query=True)
    assert [model.batches for model in models.values()] == [[["a"]], [["a"]]]
    del models["others"]
    gc.collect()
    assert len(vectors._queues) == 1


def test_documents_go_past_batch_and_cache() -> None:
    model = Gated()
    queries = QueryVectors(lambda _: model)(STATE)
    assert queries.embed(["a"]).tolist() == queries.embed(["a"]).tolist() == [[1, 0]]
    assert len(model.batches) == 2
    assert queries.count_tokens("abc") == 3


def test_an_error_reaches_everybody_in_the_batch_and_nobody_after() -> None:
    model = Gated()
    vectors = QueryVectors(lambda _: model)
    model.error = ValueError("no memory")
    with pytest.raises(ValueError, match="no memory"):
        in_line(vectors, model, "a", ["bb", "cc"])
    model.error = None
    assert vectors(STATE).embed(["a"], query=True).tolist() == [[1, 1]]


def test_a_first_query_may_wait_for_company() -> None:
    model = Gated()
    queries = QueryVectors(lambda _: model, wait_ms=100)(STATE)
    barrier = threading.Barrier(4)

    def ask(text: str) -> None:
        barrier.wait()
        queries.embed([text], query=True)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(ask, "abcd"))
    assert sum(map(len, model.batches)) == 4
    assert len(model.batches) < 4


def test_coroutines_reach_it_through_threads() -> None:
    model = Gated()
    queries = QueryVectors(lambda _: model)(STATE)

    async def ask() -> list[Vectors]:
        asked = (asyncio.to_thread(queries.embed, ["a" * n], query=True) for n in range(1, 20))
        return list(await asyncio.gather(*asked))

    assert [int(vector[0, 0]) for vector in asyncio.run(ask())] == list(range(1, 20))
