"""The order of the stages and what runs at once, over a store that answers from a list; Milvus itself is in contract."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from cluster.config import RetrievalConfig
from cluster.errors import BadInput, Mismatch, Unavailable
from cluster.knowledge import EmbedderState
from retrieval.embed import Vectors
from retrieval.retriever import Retriever, cleaned, merge
from retrieval.types import Passage, Principal, Snapshot

STATE = EmbedderState(source="tests", max_tokens=16, fingerprint="f", dimension=2)
SNAPSHOT = Snapshot("docs", 4, 3, "k_docs_v1", STATE)
WAIT = 30


def passage(name: str, stage: str, score: float) -> Passage:
    return Passage(name, "d", "", "", name, "d.md", 0, score, {stage: score})


class FakeStore:
    """Finds ``a b c`` by vectors and ``c d`` by words."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.words_begun = threading.Event()
        self.both = threading.Barrier(2)
        self.error: Exception | None = None

    def search_dense(self, *asked: Any) -> list[Passage]:
        self.asked.append(("dense", *asked))
        self.both.wait(WAIT)
        return [passage(name, "dense", 0.9 - 0.1 * rank) for rank, name in enumerate("abc")]

    def search_bm25(self, *asked: Any) -> list[Passage]:
        self.asked.append(("bm25", *asked))
        self.words_begun.set()
        self.both.wait(WAIT)
        if self.error:
            raise self.error
        return [passage(name, "bm25", 5.0 - rank) for rank, name in enumerate("cd")]


class FakeEmbedder:
    fingerprint, dimension = "f", 2

    def __init__(self, after: threading.Event | None = None) -> None:
        self.after = after

    def count_tokens(self, text: str) -> int:
        return 1

    def embed(self, texts: Sequence[str], *, query: bool = False) -> Vectors:
        assert query
        assert self.after is None or self.after.wait(WAIT)
        return np.ones((len(texts), 2), dtype=np.float32)


def ask(store: FakeStore, embedder: FakeEmbedder | None = None, **changes: Any) -> Any:
    retriever = Retriever(store, lambda _: embedder or FakeEmbedder())  # type: ignore[arg-type]
    return retriever.trace("What?", SNAPSHOT, principal=Principal(), settings=RetrievalConfig(**changes))


def test_words_are_searched_while_the_question_is_embedded_and_both_sides_at_once() -> None:
    store = FakeStore()
    trace = ask(store, FakeEmbedder(after=store.words_begun), candidates=7)
    assert {stage for stage, *_ in store.asked} == {"dense", "bm25"}
    assert {(collection, k) for _, collection, _, _, k in store.asked} == {("k_docs_v1", 7)}
    assert len({repr(condition) for *_, condition, _ in store.asked}) == 1
    assert (trace.retrieved.knowledge, trace.retrieved.version) == ("docs", 4)


def test_a_trace_holds_what_every_stage_said() -> None:
    trace = ask(FakeStore(), top_k=2)
    [searched] = trace.searched
    assert [found.chunk_id for found in searched.dense] == ["a", "b", "c"]
    assert [found.chunk_id for found in searched.words] == ["c", "d"]
    assert trace.ranked[0].chunk_id == "c"
    assert trace.retrieved.passages == tuple(trace.ranked[:2])
    assert (trace.cosine, trace.declined) == (0.9, False)


def test_under_the_floor_nothing_is_given_but_all_is_known() -> None:
    trace = ask(FakeStore(), min_score=0.91)
    assert trace.declined and trace.retrieved.passages == ()
    assert len(trace.ranked) == 4


def test_the_error_of_one_side_is_the_error_of_the_search() -> None:
    store = FakeStore()
    store.error = Unavailable("Milvus is away")
    with pytest.raises(Unavailable, match="away"):
        ask(store)


def test_another_model_is_refused() -> None:
    other = FakeEmbedder()
    other.fingerprint = "g"
    store = FakeStore()
    store.both.abort()
    with pytest.raises(Mismatch, match=r"'docs' v4 was embedded by another model"):
        ask(store, other)


def test_questions_are_cleaned() -> None:
    assert cleaned(" tra\u0323m \n") == "trạm"
    assert cleaned("a\ud800b") == "a?b"
    with pytest.raises(BadInput, match="empty"):
        cleaned(" \t\n")


def test_a_query_that_asks_for_the_wrong_thing_pushes_nothing_away() -> None:
    right = [passage(name, "dense", score) for name, score in (("a", 0.9), ("b", 0.8), ("c", 0.7))]
    wrong = [passage(name, "dense", score) for name, score in (("x", 0.99), ("b", 0.95), ("y", 0.3))]
    merged = merge([right, wrong])
    assert [found.chunk_id for found in merged] == ["a", "x", "b", "c", "y"]
    assert [round(found.score, 4) for found in merged] == [1, 1, round(61 / 62, 4), *[round(61 / 63, 4)] * 2]
    assert merged[2].scores == {"dense": 0.95, "queries": pytest.approx(61 / 62)}
    assert merge([right]) == right
    assert merge([[], right])[0].chunk_id == "a"
    assert merge([[], []]) == []
