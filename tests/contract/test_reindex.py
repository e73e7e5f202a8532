"""A knowledge moves to another collection against a real milvus-lite server: while it serves, is written, is killed."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from cluster.config import Config, EmbedderConfig, IndexConfig, RetrievalConfig
from cluster.errors import Mismatch, NotFound
from cluster.models import resolve
from retrieval import knowledge
from retrieval import reindex as reindexing
from retrieval.embed import Embedder
from retrieval.embedders import Embedders
from retrieval.filters import Compare
from retrieval.forget import forget
from retrieval.ingest import ingest
from retrieval.known_items import known_items
from retrieval.reindex import abort, reindex
from retrieval.retriever import Retriever
from retrieval.store import PAGE, Store, physical
from retrieval.types import Principal, Retrieved, Snapshot
from tests.knowledge import ALL, Killed, KilledStore, Shelf, WordEmbedder, own_store, tiny_embedder

SMALL = WordEmbedder(32, "small")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    with own_store(tmp_path_factory.mktemp("milvus")) as store:
        yield store


@pytest.fixture
def shelf(store: Store, tmp_path: Path) -> Iterator[Shelf]:
    shelf = Shelf(store, tmp_path, tmp_path.name.replace("_", "-")[:60])
    shelf.others["small"] = SMALL
    shelf.write({name: f"# {name}\n\nThe {name} lamp burns {hours} hours." for name, hours in LAMPS.items()})
    shelf.ingest()
    yield shelf
    shelf.close()


LAMPS = {"alder": "three", "birch": "five", "cedar": "six", "elm": "nine"}


def test_a_move_shows_the_same_and_can_be_taken_back(shelf: Shelf) -> None:
    shelf.write({"elm": "# elm\n\nThe elm lamp is broken."})
    shelf.ingest()
    before, embedded = shelf.texts(), SMALL.embedded
    report = shelf.reindex(SMALL)
    assert (report.version, report.rows, report.embedded, report.source) == (3, 4, 4, "rows")
    assert SMALL.embedded == embedded + 4
    head = shelf.registry.knowledge_version(shelf.name)
    assert (head.kind, head.reads, head.collection, head.embedder.dimension) == (
        "reindex",
        3,
        physical(shelf.name, 3),
        32,
    )
    assert (head.documents, head.chunks) == (4, 4)
    assert shelf.store.aliased(shelf.name) == head.collection
    assert shelf.texts() == before and shelf.count() == 9
    assert shelf.find("birch lamp", mode="dense", top_k=1) == ["The birch lamp burns five hours."]
    assert shelf.find("elm lamp", 1, mode="bm25", top_k=1) == ["The elm lamp burns nine hours."], (
        "of the old collection"
    )

    with pytest.raises(Mismatch, match="metier knowledge reindex"):
        shelf.ingest()
    shelf.embedder = SMALL
    shelf.write({"fir": "# fir\n\nThe fir lamp burns four hours."})
    assert (shelf.ingest().version, shelf.count()) == (4, 10)

    assert knowledge.rollback(shelf.registry, shelf.store, shelf.name, 2).collection == physical(shelf.name, 1)
    assert shelf.texts() == before
    assert knowledge.compact(shelf.registry, shelf.store, shelf.name, 1).collections == (physical(shelf.name, 3),)


def test_the_old_collection_goes_when_no_kept_version_is_in_it(shelf: Shelf) -> None:
    shelf.reindex(SMALL)
    assert knowledge.compact(shelf.registry, shelf.store, shelf.name, 2).collections == ()
    plan = knowledge.compact(shelf.registry, shelf.store, shelf.name, 1)
    assert (plan.gone, plan.rows, plan.collections) == ((1,), 4, (physical(shelf.name, 1),))
    assert not shelf.store.exists(physical(shelf.name, 1)) and len(shelf.texts()) == 4


def test_another_index_alone_embeds_nothing_and_sheds_dead_rows(shelf: Shelf) -> None:
    shelf.write({"elm": "# elm\n\nThe elm lamp is broken."})
    shelf.ingest()
    embedded = shelf.embedder.embedded
    before = shelf.passages("lamp burns hours", mode="dense")
    report = shelf.reindex(index=IndexConfig(type="FLAT", build={}))
    assert (report.rows, report.embedded, shelf.embedder.embedded) == (4, 0, embedded)
    assert shelf.passages("lamp burns hours", mode="dense") == before
    assert shelf.registry.knowledge_version(shelf.name).details["index"]["vector"]["type"] == "FLAT"


def test_other_chunks_come_from_documents_and_other_tenants_keep_theirs(shelf: Shelf) -> None:
    text = "# gorse\n\n" + " ".join(f"The gorse lamp burns in room {room}." for room in range(8))
    shelf.write({"gorse": text})
    shelf.ingest(tenant="other")
    theirs = shelf.store.count(physical(shelf.name, 1), Compare("tenant", "==", "other"))
    shelf.write({"hazel": text.replace("gorse", "hazel")})
    report = shelf.reindex(chunk_tokens=32)
    assert report.source == "documents"
    head = shelf.registry.knowledge_version(shelf.name)
    assert (head.chunk_tokens, head.documents, head.tenant) == (32, 6, "default")
    assert shelf.store.count(head.collection, Compare("tenant", "==", "other")) == theirs
    mine = shelf.store.count(head.collection, Compare("tenant", "==", "default"))
    assert (mine, head.chunks) == (report.rows - theirs, mine)
    assert "hazel" in shelf.texts(), "the documents as they are now"
    assert shelf.ingest(chunk_tokens=32).version == head.number, "an ingest finds nothing to do"


def test_the_same_document_in_two_tenants_stays_two(shelf: Shelf) -> None:
    def compare(before: Snapshot, after: Snapshot) -> Mapping[str, Any]:
        shelf.ingest(tenant="other")
        return {}

    report = shelf.reindex(chunk_tokens=32, compare=compare)
    assert (report.version, report.rows) == (3, 8), "what the other wrote has the number that the build began with"
    shelf.write({"elm": "# elm\n\nThe elm lamp is broken."})
    assert (shelf.ingest(chunk_tokens=32).version, shelf.count(Compare("tenant", "==", "other"))) == (4, 8)
    third = shelf.reindex(chunk_tokens=16, tenant="other")
    assert (third.rows, shelf.ingest(chunk_tokens=32).version) == (8, 5), "the first tenant's are as they were"


def test_a_killed_move_changes_nothing_and_goes_on_where_it_was(shelf: Shelf) -> None:
    many = {f"note-{n:04}": f"# Note {n}\n\nLamp {n} burns {n} hours." for n in range(2 * PAGE)}
    shelf.write(many)
    shelf.ingest()
    before = shelf.find("lamp 7", top_k=1, mode="bm25")
    small = WordEmbedder(32, "small")
    with pytest.raises(Killed):
        shelf.reindex(small, KilledStore(shelf.store, 3))  # one drop, then two pages of three
    assert (shelf.registry.knowledge_head(shelf.name), shelf.find("lamp 7", top_k=1, mode="bm25")) == (2, before)
    assert shelf.registry.knowledge_build(shelf.name) is not None
    with pytest.raises(Mismatch, match="with another embedder was begun at 20"):
        shelf.reindex(WordEmbedder(16, "third"))
    shelf.write({"note-0007": "# Note 7\n\nLamp 7 is broken.", "note-0008": None})
    shelf.ingest()
    again = WordEmbedder(32, "small")
    report = shelf.reindex(again)
    assert (report.version, report.rows) == (4, 2 * PAGE + 3)
    assert 0 < again.embedded <= PAGE, "two pages were there; one row is new"
    assert shelf.texts() == shelf.texts(3) and shelf.registry.knowledge_build(shelf.name) is None


def test_a_move_that_was_killed_after_its_entry_is_known_to_be_done(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(shelf.registry, "knowledge_build_end", die)
        shelf.reindex(SMALL)
    assert shelf.snapshot().embedder.dimension == 32
    with pytest.raises(NotFound, match="was done: it is version 2"):
        abort(shelf.registry, shelf.store, shelf.name)
    assert len(shelf.texts()) == 4
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(shelf.registry, "knowledge_build_end", die)
        shelf.reindex(shelf.embedder)
    embedded = shelf.embedder.embedded
    report = shelf.reindex(shelf.embedder)
    assert (report.version, shelf.embedder.embedded) == (3, embedded)
    assert shelf.store.aliased(shelf.name) == report.collection


def test_an_aborted_move_leaves_nothing(shelf: Shelf) -> None:
    with pytest.raises(NotFound, match="no reindex"):
        abort(shelf.registry, shelf.store, shelf.name)
    with pytest.raises(Mismatch, match=r"finds 1\.000 of the sampled passages, less than the 1\.1"):
        shelf.reindex(SMALL, compare=known_items(shelf.store, shelf.embedders, RetrievalConfig()), min_recall=1.1)
    assert shelf.registry.knowledge_head(shelf.name) == 1
    green = abort(shelf.registry, shelf.store, shelf.name).collection
    assert not shelf.store.exists(green)
    assert shelf.reindex(WordEmbedder(16, "third")).collection == green


def test_the_comparison_is_kept_with_the_version(shelf: Shelf) -> None:
    compare = known_items(shelf.store, shelf.embedders, RetrievalConfig(), sample=3)
    report = shelf.reindex(SMALL, compare=compare, min_recall=0.5)
    assert report.compared["queries"] == 3 and report.compared["by"] == "chunk_id"
    assert report.compared["dense"]["recall"] == report.compared["hybrid"]["recall_before"] == 1.0
    assert shelf.registry.knowledge_version(shelf.name).details["compared"] == report.compared

    class Useless(WordEmbedder):
        def embed(self, texts: Any, *, query: bool = False) -> Any:
            return super().embed(["nothing"] * len(texts), query=query)

    shelf.others["useless"] = Useless(8, "useless")
    compare = known_items(shelf.store, shelf.embedders, RetrievalConfig(mode="dense"), k=1)
    with pytest.raises(Mismatch, match="stays where it is"):
        shelf.reindex(shelf.others["useless"], compare=compare, min_recall=0.9)
    assert shelf.registry.knowledge_head(shelf.name) == 2


def test_what_is_forgotten_while_a_collection_is_filled_does_not_arrive(shelf: Shelf) -> None:
    class Forgetting(WordEmbedder):
        def embed(self, texts: Any, *, query: bool = False) -> Any:
            if not self.embedded and not query:
                report = forget(shelf.registry, shelf.store, shelf.name, "birch")
                assert len(report.collections) == 2
            return super().embed(texts, query=query)

    def compare(before: Snapshot, after: Snapshot) -> Mapping[str, Any]:
        assert shelf.store.count(after.collection, Compare("doc_id", "==", "birch")) == 0
        assert shelf.store.count(after.collection, ALL) == 3
        return {}

    report = shelf.reindex(Forgetting(32, "small"), compare=compare)
    assert (report.rows, sorted(shelf.texts())) == (3, ["alder", "cedar", "elm"])


def test_two_moves_at_once_are_one(shelf: Shelf) -> None:
    class Inquisitive(WordEmbedder):
        def embed(self, texts: Any, *, query: bool = False) -> Any:
            with pytest.raises(Mismatch, match=r"next collection of knowledge .* is being written by this process"):
                shelf.reindex(SMALL)
            with pytest.raises(Mismatch, match="is being written"):
                abort(shelf.registry, shelf.store, shelf.name)
            with pytest.raises(Mismatch, match="is being written"):
                knowledge.drop(shelf.registry, shelf.store, shelf.name)
            return super().embed(texts, query=query)

    assert shelf.reindex(Inquisitive(32, "small")).version == 2


def test_the_last_pass_waits_for_a_writer(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a writer wrote that began just before the last pass is not lost."""
    entered, refused = threading.Event(), threading.Event()

    class Blocking(WordEmbedder):
        def embed(self, texts: Any, *, query: bool = False) -> Any:
            entered.set()
            assert refused.wait(60)
            return super().embed(texts, query=query)

    tried = 0
    claim = shelf.registry.knowledge_claim

    def counted(name: str, doing: str) -> Any:
        nonlocal tried
        tried += doing.startswith("the end")
        if tried == 2:
            refused.set()
        return claim(name, doing)

    def compare(before: Snapshot, after: Snapshot) -> Mapping[str, Any]:
        shelf.write({"fir": "# fir\n\nThe fir lamp burns four hours."})
        shelf.embedder = Blocking()
        thread.start()
        assert entered.wait(60)
        return {}

    monkeypatch.setattr(reindexing, "WAIT_POLL_S", 0.01)
    monkeypatch.setattr(shelf.registry, "knowledge_claim", counted)
    thread = threading.Thread(target=shelf.ingest)
    report = shelf.reindex(SMALL, compare=compare)
    thread.join()
    assert (report.version, report.rows) == (3, 5) and "fir" in shelf.texts()


# -- under load --------------------------------------------------------------------------------------------------


class Load:
    """Threads that ask the newest version all the time, as serving does, and keep every answer."""

    def __init__(self, shelf: Shelf, retriever: Retriever, threads: int = 3) -> None:
        self.shelf, self.retriever = shelf, retriever
        self.answers: list[tuple[str, Retrieved]] = []
        self.errors: list[BaseException] = []
        self._answered = threading.Condition()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(n,)) for n in range(threads)]

    def ask(self, question: str, version: int | None = None) -> Retrieved:
        found = self.shelf.registry.knowledge_latest(self.shelf.name)
        if version is not None:
            found = self.shelf.registry.knowledge_version(self.shelf.name, version)
        assert found is not None
        return self.retriever.retrieve(
            question,
            Snapshot.of(self.shelf.name, found),
            principal=Principal(),
            settings=RetrievalConfig(mode="dense", min_score=-1, top_k=4),
        )

    def _ask(self, number: int) -> None:
        questions = [f"the {lamp} lamp" for lamp in LAMPS]
        while not self._stop.is_set():
            question = questions[number % len(questions)]
            number += 1
            try:
                answer = self.ask(question)
            except BaseException as error:
                self.errors.append(error)
            else:
                with self._answered:
                    self.answers.append((question, answer))
                    self._answered.notify_all()

    def wait_for(self, version: int) -> None:
        """Until a question was answered from `version`."""
        with self._answered:
            assert self._answered.wait_for(lambda: self.answers and self.answers[-1][1].version == version, 120)

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def check(self) -> set[int]:
        """Every answer is that of its version, to the last digit of its scores; returns which versions answered."""
        assert self.errors == []
        given = {(question, answer.version): set[Any]() for question, answer in self.answers}
        for question, answer in self.answers:
            given[question, answer.version].add(decided(answer))
        for (question, version), answers in given.items():
            assert answers == {decided(self.ask(question, version))}, (question, version)
        return {version for _, version in given}


def decided(answer: Retrieved) -> tuple[tuple[float, ...], frozenset[tuple[str, str, float]]]:
    """What an answer is by its scores alone: every score, and the passages above the last one.

    Which of several passages with the last score takes the last place is the index's choice.
    """
    scores = tuple(passage.score for passage in answer.passages)
    return scores, frozenset((p.chunk_id, p.text, p.score) for p in answer.passages if p.score > min(scores))


def test_no_query_fails_while_a_knowledge_is_written_and_moves(shelf: Shelf) -> None:
    shelf.write({f"note-{n}": f"# Note {n}\n\nThe lamp of room {n} is out." for n in range(60)})
    shelf.ingest()
    with Load(shelf, Retriever(shelf.store, shelf.embedders)) as load:
        shelf.write({"elm": "# elm\n\nThe elm lamp is broken."})
        shelf.ingest()
        shelf.reindex(SMALL)
        load.wait_for(4)
        blue, shelf.embedder = shelf.embedder, SMALL
        shelf.others[blue.fingerprint] = blue
        shelf.write({"elm": "# elm\n\nThe elm lamp is mended."})
        shelf.ingest()
        knowledge.rollback(shelf.registry, shelf.store, shelf.name, 3)
        load.wait_for(6)
    assert {4, 6} <= load.check() <= {2, 3, 4, 5, 6}


def test_real_embedders_change_under_load(store: Store, tmp_path: Path) -> None:
    other = EmbedderConfig(source=str(tiny_embedder(tmp_path / "tiny", 48)), max_tokens=64)
    cache = Config().models_cache
    minilm = Embedder(resolve(EmbedderConfig(), Path(cache).expanduser()), EmbedderConfig())
    shelf = Shelf(store, tmp_path, "real")
    shelf.write({name: f"# {name}\n\nThe {name} lamp burns {hours} hours." for name, hours in LAMPS.items()})
    config = shelf.config()
    ingest(config, store, minilm, shelf.registry)
    moved = config.model_copy(update={"embedder": other})
    embedders = Embedders(EmbedderConfig(), cache)
    with Load(shelf, Retriever(store, embedders), threads=2) as load:
        tiny = Embedder(Path(other.source), other)
        build: dict[str, Any] = {}

        def compare(before: Snapshot, after: Snapshot) -> Mapping[str, Any]:
            coming = shelf.registry.knowledge_build(shelf.name)
            assert coming is not None
            embedders.prepare(coming.embedder)
            build["embedder"] = coming.embedder
            return {}

        report = reindex(moved, store, tiny, shelf.registry, compare=compare)
        load.wait_for(report.version)
    assert load.check() == {1, 2}
    assert build["embedder"].dimension == 48
    shelf.close()
