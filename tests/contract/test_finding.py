"""The stages of retrieval against a real milvus-lite server on loopback: order, scores, rights and versions in each."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.config import RetrievalConfig, StoreConfig
from cluster.errors import BadInput, Mismatch, NotFound
from cluster.knowledge import EmbedderState
from retrieval.embed import Vectors, embedding_text
from retrieval.embedded import serve
from retrieval.filters import Compare
from retrieval.query_vectors import QueryVectors
from retrieval.rerank import Scores
from retrieval.retriever import Retriever
from retrieval.store import ALIVE, Row, Store
from retrieval.types import Principal, Snapshot
from retrieval.words import QUERY_WORDS, searchable

EVERYONE = Principal()
STATE = EmbedderState(source="tests", max_tokens=256, fingerprint="words", dimension=64)


class WordEmbedder:
    """Hash-of-words vectors: texts that share words are near. Keeps what it embeds."""

    dimension = STATE.dimension
    fingerprint = STATE.fingerprint

    def __init__(self) -> None:
        self.embedded: list[str] = []

    def count_tokens(self, text: str) -> int:
        return len(text.split())

    def embed(self, texts: Sequence[str], *, query: bool = False) -> Vectors:
        self.embedded += texts
        vectors = np.full((len(texts), self.dimension), 1e-3, dtype=np.float32)
        for row, text in enumerate(texts):
            for word in re.findall(r"\w+", text.lower()):
                vectors[row, zlib.crc32(word.encode()) % self.dimension] += 1
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


class Longest:
    """A reranker that likes long texts, and keeps what it read."""

    def __init__(self) -> None:
        self.read: list[tuple[str, list[str]]] = []

    def scores(self, query: str, texts: Sequence[str]) -> Scores:
        self.read.append((query, list(texts)))
        return np.array([len(text) / 1000 for text in texts], dtype=np.float32)


def chunks(doc_id: str, *texts: str, **values: Any) -> list[Row]:
    """Rows of one document, a line end between its chunks."""
    rows, start = [], 0
    born = values.get("born", 1)
    for position, text in enumerate(texts):
        shown = embedding_text("", values.get("heading", ""), text)
        rows.append({
            "row_id": f"{doc_id}-{position}-{born}", "chunk_id": f"{doc_id}-{position}", "doc_id": doc_id, "title": "",
            "heading": "", "text": text, "search_text": searchable(shown, True), "source": f"{doc_id}.md",
            "position": position, "page": 1, "start": start, "end": start + len(text), "digest": text[:20],
            "vector_key": text[:20], "tenant": "default", "groups": ["everyone"], "born": 1, "died": ALIVE, "metadata": {},
            "dense": WordEmbedder().embed([shown])[0].tolist(),
        } | values)  # fmt: skip
        start += len(text) + 1
    return rows


ROWS = [
    *chunks("dogs", "A dog costs 3 crowns.", "It stays on the car deck.", "A guide dog travels free."),
    *chunks("bikes", "A bicycle costs 5 crowns.", "A bicycle trailer costs 2 crowns more."),
    *chunks("cats", "A cat in a basket costs nothing at all, as long as the basket stays closed."),
    *chunks("sac", "Trạm sạc ở Đường Hòa Bình mở cửa lúc sáu giờ.", "Phí gửi xe là hai nghìn đồng."),
    *chunks("watch", "The watch changes at noon.", "The night watch has two crew.", groups=["crew"]),
    *chunks("mixed", "Crew dogs sleep below."),
    *chunks("old", "The old dog fare was 9 crowns.", died=2),
    *chunks("new", "The coming dog fare is 4 crowns.", born=3),
    *chunks("theirs", "A dog costs nothing with us.", tenant="other"),
]
# A document whose second chunk only the crew may read, and whose third is of a later version.
ROWS += [
    row | {"groups": groups, "born": born}
    for row, groups, born in zip(
        chunks("ladder", "The ladder has ten steps.", "The ladder is rotten.", "The ladder was mended."),
        (["everyone"], ["crew"], ["everyone"]),
        (1, 1, 3),
        strict=True,
    )
]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    config = StoreConfig(data_dir=str(tmp_path_factory.mktemp("milvus")))
    with serve(config) as uri:
        store = Store(config, uri)
        store.create("finding", embedder=STATE.fingerprint, dimension=STATE.dimension)
        store.upsert("finding", ROWS)
        yield store
        store.close()


def snapshot(version: int = 2) -> Snapshot:
    return Snapshot("finding", version, version, "finding", STATE)


class Finder:
    """A retriever with everything that a test wants to look at."""

    def __init__(self, store: Store) -> None:
        self.embedder, self.reranker = WordEmbedder(), Longest()
        self.retriever = Retriever(store, lambda _: self.embedder, self.reranker)

    def __call__(
        self, query: str | Sequence[str], version: int = 2, principal: Principal = EVERYONE, **changes: Any
    ) -> Any:
        where = changes.pop("where", None)
        asked = RetrievalConfig.model_validate({"min_score": -1} | changes)
        return self.retriever.retrieve(query, snapshot(version), principal=principal, settings=asked, where=where)

    def texts(self, query: str | Sequence[str], **changes: Any) -> list[str]:
        return [passage.text for passage in self(query, **changes).passages]


@pytest.fixture
def find(store: Store) -> Finder:
    return Finder(store)


@pytest.mark.parametrize("mode", ["dense", "bm25", "hybrid"])
def test_every_mode_finds_and_says_how(find: Finder, mode: str) -> None:
    found = find("What does a bicycle trailer cost?", mode=mode)
    best = found.passages[0]
    assert best.text == "A bicycle trailer costs 2 crowns more."
    assert {"dense", "bm25"} & set(best.scores) == ({"dense", "bm25"} if mode == "hybrid" else {mode})
    assert list(found.seconds) == (["search", "fuse"] if mode == "bm25" else ["embed", "search", "fuse"])
    scores = [passage.score for passage in found.passages]
    assert scores == sorted(scores, reverse=True)


def test_the_floor_is_on_the_best_cosine_and_declines(find: Finder) -> None:
    best = find("dog", mode="dense", top_k=1).passages[0].score
    for mode in ("dense", "hybrid"):
        assert find("dog", mode=mode, min_score=best - 0.01).passages
        assert find("dog", mode=mode, min_score=best + 0.01).passages == ()
        assert find("dog", mode=mode, min_score=best + 0.01, rerank=5).passages == ()
    assert find("dog", mode="bm25", min_score=best + 0.01).passages
    assert find("zeppelin", mode="bm25").passages == ()


# -- the later stages --------------------------------------------------------------------------------------------


def test_a_reranker_orders_the_best_candidates_anew(find: Finder) -> None:
    query = "Does a cat or dog cost crowns?"
    plain = find(query, top_k=4)
    anew = find(query, top_k=4, rerank=6)
    assert [p.text for p in anew.passages] != [p.text for p in plain.passages]
    [(asked, texts)] = find.reranker.read
    assert asked == query
    assert len(texts) == 6
    assert [p.score for p in anew.passages] == [p.scores["rerank"] for p in anew.passages]
    assert [len(p.text) for p in anew.passages] == sorted(map(len, texts), reverse=True)[:4]
    assert "rerank" in anew.seconds
    assert {"dense", "bm25"} <= set(anew.passages[0].scores)


def test_at_least_as_many_are_reranked_as_are_given(find: Finder) -> None:
    assert all("rerank" in passage.scores for passage in find("dog crowns", top_k=4, rerank=1).passages)
    assert len(find.reranker.read[0][1]) == 4


def test_a_reranker_that_is_not_there_is_said(store: Store) -> None:
    retriever = Retriever(store, lambda _: WordEmbedder())
    with pytest.raises(Mismatch, match=r"reranker\.source"):
        retriever.retrieve("dog", snapshot(), principal=EVERYONE, settings=RetrievalConfig(rerank=3))


def test_diversity_takes_another_subject_before_the_same_again(find: Finder) -> None:
    query = "What does a bicycle trailer cost, a bicycle, and a dog, in crowns?"
    plain, various = find.texts(query, top_k=2), find.texts(query, top_k=2, diversity=0.7)
    assert plain == ["A bicycle trailer costs 2 crowns more.", "A bicycle costs 5 crowns."]
    assert various[0] == plain[0]
    assert not various[1].startswith("A bicycle")
    assert find.texts(query, top_k=2, diversity=0.7, mode="bm25")[0] == plain[0]


def test_neighbours_are_joined_and_those_that_touch_become_one(find: Finder) -> None:
    [dogs] = find("car deck", top_k=1, neighbours=1, mode="bm25").passages
    assert dogs.text == "A dog costs 3 crowns.\nIt stays on the car deck.\nA guide dog travels free."
    assert (dogs.chunk_id, dogs.position) == ("dogs-1", 1)
    both = find("guide dog costs 3 crowns travels free", top_k=2, neighbours=1, mode="bm25").passages
    assert [p.text for p in both].count(dogs.text) == 1
    assert both[0].doc_id == "dogs"


def test_neighbours_keep_rights_and_version(find: Finder) -> None:
    crew = Principal(groups=("everyone", "crew"))
    ladder = {"query": "ladder ten steps", "top_k": 1, "neighbours": 2, "mode": "bm25"}
    assert find.texts(**ladder) == ["The ladder has ten steps."]
    assert find.texts(**ladder, principal=crew) == ["The ladder has ten steps.\nThe ladder is rotten."]
    assert find.texts(**ladder, principal=crew, version=3)[0].endswith("was mended.")


READERS = st.builds(
    Principal,
    st.sampled_from(["default", "other", "nobody"]),
    st.lists(st.sampled_from(["everyone", "crew", "x"]), unique=True).map(tuple),
)


@settings(max_examples=20, deadline=None)
@given(
    reader=READERS,
    version=st.integers(1, 4),
    mode=st.sampled_from(["dense", "bm25", "hybrid"]),
    stages=st.fixed_dictionaries({
        "rerank": st.sampled_from([0, 5]), "diversity": st.sampled_from([0.0, 0.5]), "neighbours": st.integers(0, 2)
    }),
)  # fmt: skip
def test_no_stage_shows_what_the_asker_may_not_read(
    store: Store, reader: Principal, version: int, mode: str, stages: dict[str, Any]
) -> None:
    allowed = {
        row["text"] for row in ROWS
        if row["tenant"] == reader.tenant and set(row["groups"]) & set(reader.groups)
        and row["born"] <= version < row["died"]
    }  # fmt: skip
    query = ["The dog and the ladder of the crew cost crowns", "night watch"]
    found = Finder(store)(query, version, reader, mode=mode, top_k=8, **stages)
    assert {line for passage in found.passages for line in passage.text.split("\n")} <= allowed
    assert bool(found.passages) == bool(allowed)


def test_a_filter_narrows_every_stage(find: Finder) -> None:
    where = Compare("doc_id", "==", "bikes")
    for mode in ("dense", "bm25", "hybrid"):
        found = find("dog costs crowns", mode=mode, where=where, neighbours=1, diversity=0.3)
        assert {passage.doc_id for passage in found.passages} == {"bikes"}


# -- queries -----------------------------------------------------------------------------------------------------


def test_several_queries_are_fused_and_the_first_is_reranked(find: Finder) -> None:
    found = find(["guide dog", "night ladder steps"], top_k=2, mode="bm25")
    assert {passage.doc_id for passage in found.passages} == {"dogs", "ladder"}
    assert [passage.score for passage in found.passages] == [1, 1]
    assert found.passages[0].doc_id == "dogs"
    misled = find(["A bicycle costs how many crowns, 5?", "night watch ladder"], top_k=3, mode="dense")
    assert misled.passages[0].text == "A bicycle costs 5 crowns."
    assert misled.passages[2].score < 1
    find(["guide dog", "ladder"], rerank=3)
    assert find.reranker.read[-1][0] == "guide dog"


@pytest.mark.parametrize("query", ["", " \n ", ["dog", ""], []])
def test_an_empty_question_is_refused(find: Finder, query: str | list[str]) -> None:
    with pytest.raises(BadInput, match="say what to look for"):
        find(query)


def test_a_question_of_100000_characters_is_cut_and_answered(find: Finder) -> None:
    endless = "guide dog " + " ".join(f"word{number % 5000}" for number in range(12_000))
    assert len(endless) > 100_000
    assert find(endless).passages[0].text == "A guide dog travels free."
    assert len(find.embedder.embedded[-1]) == 32 * STATE.max_tokens
    assert find("x" * 100_000 + " dog", mode="bm25").passages
    late = " ".join(["the"] * QUERY_WORDS + ["bicycle"])
    assert "A bicycle costs 5 crowns." not in find.texts(late, mode="bm25")


def test_a_half_character_is_no_crash(find: Finder) -> None:
    assert find("guide dog \ud83d").passages[0].doc_id == "dogs"


def test_a_collection_that_is_gone_is_said(find: Finder) -> None:
    gone = Snapshot("gone", 1, 1, "gone", STATE)
    with pytest.raises(NotFound, match="gone"):
        find.retriever.retrieve("dog", gone, principal=EVERYONE, settings=RetrievalConfig())


@pytest.mark.parametrize("query", ["tram sac duong hoa binh", "trạm sạc đường", "TRAM SAC", "trạm sac", "tra\u0323m"])
def test_words_are_found_with_and_without_their_diacritics(find: Finder, query: str) -> None:
    assert find.texts(query, mode="bm25", top_k=1) == ["Trạm sạc ở Đường Hòa Bình mở cửa lúc sáu giờ."]


def test_requests_at_once_find_what_they_find_alone(store: Store) -> None:
    embedder = WordEmbedder()
    retriever = Retriever(store, QueryVectors(lambda _: embedder))

    def ask(number: int) -> list[str]:
        query = f"{ROWS[number % 8]['text']}"
        found = retriever.retrieve(query, snapshot(), principal=EVERYONE, settings=RetrievalConfig(min_score=-1))
        return [passage.chunk_id for passage in found.passages]

    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(ask, range(24)))
    assert found[:8] == found[8:16] == found[16:]
    assert len({ids[0] for ids in found}) == 8
    assert sorted(embedder.embedded) == sorted(row["text"] for row in ROWS[:8])


def test_every_stage_is_timed_apart(store: Store) -> None:
    found = Finder(store)("dog crowns", rerank=3, diversity=0.2, neighbours=1)
    assert list(found.seconds) == ["embed", "search", "fuse", "rerank", "diversity", "neighbours"]
    assert all(seconds >= 0 for seconds in found.seconds.values())
