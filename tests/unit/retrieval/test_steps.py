"""The steps in one process against a store in memory: what is embedded, written, in which order, and how it ends."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cluster.config import KnowledgeConfig
from cluster.errors import Unavailable
from retrieval.embed import Vectors
from retrieval.filters import Condition, In
from retrieval.steps import Here, Outcome, Read, Target, assemble, rows
from retrieval.store import PAGE, Row
from retrieval.types import Document

TARGET = Target("k_docs_v1", 1, "default", ("everyone",), chunk_tokens=16, overlap_tokens=0)


class Words:
    """An embedder whose vector of a text is its length; it remembers what it was given."""

    fingerprint, dimension = "f" * 32, 1

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def count_tokens(self, text: str) -> int:
        return len(text.split())

    def embed(self, texts: Sequence[str], *, query: bool = False) -> Vectors:
        self.calls.append(list(texts))
        return np.array([[len(text)] for text in texts], dtype=np.float32).reshape(-1, 1)


class Memory:
    """The calls that steps make of a store."""

    def __init__(self) -> None:
        self.pages: list[list[Row]] = []
        self.lookups: list[set[Any]] = []
        self.failing = threading.Event()

    def upsert(self, collection: str, page: Sequence[Row]) -> None:
        if self.failing.is_set():
            raise Unavailable("Milvus is away")
        self.pages.append(list(page))

    def written(self) -> dict[str, Row]:
        return {row["row_id"]: row for page in self.pages for row in page}

    def count(self, collection: str, condition: Condition) -> int:
        return len(self.written())

    def rows(self, collection: str, condition: Condition, columns: Sequence[str]) -> Iterator[Row]:
        assert isinstance(condition, In)
        self.lookups.append(set(condition.values))
        return iter([row for row in self.written().values() if row["vector_key"] in condition.values])


def documents(count: int, words: int = 12) -> list[Document]:
    return [
        Document(f"d{n}", f"Title {n}", "\n\n".join(f"Paragraph {n}-{p} " + "word " * words for p in range(n % 5 + 1)), f"{n}.md")
        for n in range(count)
    ]  # fmt: skip


def index(given: Iterable[Document], store: Any, embedder: Any, known: Any = None, target: Target = TARGET) -> Outcome:
    given = list(given)
    return Here(store, embedder).index(Read(given, len(given)), target, known or {}, lambda *_: None)


def test_every_chunk_is_written_once_with_its_own_vector() -> None:
    store, embedder, given = Memory(), Words(), documents(500)
    outcome = index(given, store, embedder)
    made = {row["chunk_id"]: row for one in given for row in rows(one, TARGET, embedder.count_tokens)}
    assert len(made) == 1500 == outcome.embedded
    assert outcome.wanted == {key: row["digest"] for key, row in made.items()}
    assert outcome.written == made.keys() == {row["chunk_id"] for page in store.pages for row in page}
    for row in store.written().values():
        assert row["dense"][0] == len(f"{row['title']}\n{row['text']}")
    assert all(len(page) <= PAGE for page in store.pages) and store.lookups == []


def test_long_texts_are_embedded_with_long_ones() -> None:
    embedder = Words()
    index(
        documents(700, words=3) + [replace(one, doc_id=f"long-{one.doc_id}") for one in documents(700)],
        Memory(),
        embedder,
    )
    spread = [max(map(len, call)) - min(map(len, call)) for call in embedder.calls]
    everything = [text for call in embedder.calls for text in call]
    assert sum(spread) / len(spread) < (max(map(len, everything)) - min(map(len, everything))) / 2


def test_what_is_known_is_left_alone_and_words_keep_their_vector() -> None:
    store, embedder, given = Memory(), Words(), documents(40)
    first = index(given, store, embedder)
    known = {key: {digest} for key, digest in first.wanted.items()}
    again = index(given, store, embedder, known)
    assert (again.wanted, again.written, again.embedded) == (first.wanted, set(), 0)

    moved = [replace(one, source=f"moved/{one.source}") for one in given]
    outcome = index(moved, store, embedder, known, replace(TARGET, version=2))
    assert outcome.embedded == 0 and outcome.written == first.wanted.keys()
    assert outcome.wanted != first.wanted


def test_the_same_words_in_two_documents_are_embedded_once() -> None:
    store, embedder = Memory(), Words()
    twice = [*documents(300), *(replace(one, doc_id=f"again-{one.doc_id}") for one in documents(300))]
    outcome = index(twice, store, embedder)
    texts = [text for call in embedder.calls for text in call]
    assert outcome.embedded == len(texts) == len(set(texts)) == len(outcome.wanted) // 2
    vectors = {row["vector_key"]: row["dense"][0] for row in store.written().values()}
    assert all(row["dense"][0] == vectors[row["vector_key"]] for row in store.written().values())


def test_progress_counts_documents_and_tells_the_rate() -> None:
    told: list[tuple[str, int, int]] = []
    given = documents(600)
    Here(Memory(), Words()).index(Read(given, 600), TARGET, {}, lambda *said: told.append(said))  # type: ignore[arg-type]
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)
    assert told[-1][1:] == (600, 600) and told[-1][0].startswith("1,800 chunks, ")


@pytest.mark.parametrize("failing", ["store", "embedder", "chunking"])
def test_an_error_of_any_step_ends_all_of_them(failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store, embedder = Memory(), Words()
    if failing == "store":
        store.failing.set()
    elif failing == "embedder":
        monkeypatch.setattr(embedder, "embed", _interrupted)
    else:
        monkeypatch.setattr(embedder, "count_tokens", _interrupted)
    before = set(threading.enumerate())
    with pytest.raises(Unavailable if failing == "store" else KeyboardInterrupt):
        index(documents(3000), store, embedder)
    assert set(threading.enumerate()) == before
    assert len(store.pages) <= 1


def _interrupted(*_: Any, **__: Any) -> Any:
    raise KeyboardInterrupt


def test_an_interrupted_run_claims_only_what_was_written(monkeypatch: pytest.MonkeyPatch) -> None:
    store, embedder, given = Memory(), Words(), documents(1000)
    embed = embedder.embed
    monkeypatch.setattr(embedder, "embed", lambda texts: embed(texts) if len(embedder.calls) < 2 else _interrupted())
    with pytest.raises(KeyboardInterrupt):
        index(given, store, embedder)
    monkeypatch.undo()
    left = store.written()
    assert 0 < len(left) <= 2 * PAGE
    outcome = index(given, store, embedder, {row["chunk_id"]: {row["digest"]} for row in left.values()})
    assert len(outcome.written) == len(outcome.wanted) - len(left) == outcome.embedded
    assert len(store.written()) == len(outcome.wanted)


def test_of_documents_that_repeat_each_other_one_is_indexed() -> None:
    text = "The night ferry leaves at eleven and carries no cars, only people and their bicycles. " * 3
    given = [Document("a", "a", text, "a.md"), Document("b", "b", text, "b.md"), Document("a", "c", "other", "x/a.md")]
    read = assemble(given, [], KnowledgeConfig())
    assert ([one.doc_id for one in read.documents], read.count) == (["a"], 1)
    assert sorted(problem.source for problem in read.problems) == ["b.md", "x/a.md"]
    assert assemble(given, [], KnowledgeConfig(duplicates="keep")).count == 2


def test_folded_words_are_searched_for_and_not_embedded() -> None:
    document = Document("d", "Trạm", "Trạm sạc số một.", "d.md")
    plain, folded = (
        next(rows(document, replace(TARGET, fold_diacritics=fold), Words().count_tokens)) for fold in (False, True)
    )
    assert "tram" not in plain["search_text"].lower() and "tram" in folded["search_text"].lower()
    assert plain["vector_key"] == folded["vector_key"] and plain["digest"] != folded["digest"]
