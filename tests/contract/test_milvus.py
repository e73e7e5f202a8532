"""Ingest and retrieval against a real Milvus: what is found in which version, after what."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from cluster.config import Config, EmbedderConfig, KnowledgeConfig, RetrievalConfig
from cluster.errors import Mismatch, NotFound
from cluster.knowledge import KnowledgeVersion
from cluster.models import resolve
from retrieval.embed import Embedder
from retrieval.filters import And, live
from retrieval.ingest import IngestReport, ingest
from retrieval.retriever import Retriever
from retrieval.store import Store, physical
from retrieval.types import Principal, Snapshot
from tests.knowledge import Killed, KilledStore, WordEmbedder
from tests.trade import wait_for

EVERYONE = Principal()
ALL = And(())


class Heads:
    """A registry of knowledge versions in memory."""

    def __init__(self) -> None:
        self.entries: list[dict[str, Any]] = []

    def knowledge_next(self, name: str) -> int:
        return len(self.entries) + 1

    def knowledge_latest(self, name: str) -> KnowledgeVersion | None:
        return self.version(len(self.entries)) if self.entries else None

    def version(self, number: int) -> KnowledgeVersion:
        fields = {"reads": number, "number": number, "created": ""}
        return KnowledgeVersion.model_validate(fields | self.entries[number - 1])

    def knowledge_append(self, name: str, entry: dict[str, Any]) -> int:
        self.entries.append(json.loads(json.dumps(entry)))
        return len(self.entries)


class Trade:
    """One knowledge of a test: its documents, registry, embedder and store."""

    def __init__(self, store: Store, directory: Path, name: str) -> None:
        self.store, self.directory, self.name = store, directory, name
        self.heads, self.embedder = Heads(), WordEmbedder()
        directory.mkdir(exist_ok=True)

    @property
    def collection(self) -> str:
        return physical(self.name, 1)

    def snapshot(self, version: int) -> Snapshot:
        return Snapshot.of(self.name, self.heads.version(version))

    def write(self, **documents: str) -> None:
        for name, text in documents.items():
            (self.directory / f"{name}.md").write_text(text)

    def ingest(self, store: Store | None = None, **changes: Any) -> IngestReport:
        knowledge = KnowledgeConfig(name=self.name, documents=str(self.directory), **{"chunk_tokens": 16} | changes)
        return ingest(Config(knowledge=knowledge), store or self.store, self.embedder, self.heads)

    def find(self, query: str, version: int, principal: Principal = EVERYONE, **changes: Any) -> list[str]:
        found = Retriever(self.store, lambda _: self.embedder).retrieve(
            query,
            self.snapshot(version),
            principal=principal,
            settings=RetrievalConfig(**changes),
        )
        return [passage.text for passage in found.passages]


@pytest.fixture
def trade(store: Store, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Trade]:
    name = re.sub(r"[^a-z0-9]+", "-", request.node.name.lower())[:40].strip("-") + f"-{uuid4().hex[:8]}"
    trade = Trade(store, tmp_path / "documents", name)
    yield trade
    store.unpoint(name)
    store.drop(trade.collection)


# -- ingest ------------------------------------------------------------------------------------------------------

FARES = "# Fares\n\nOwner: desk.\n\n## Dogs\n\nA dog costs 3 crowns.\n\n## Bicycles\n\nA bicycle costs 5 crowns.\n"


def test_twice_changes_nothing(trade: Trade) -> None:
    trade.write(fares=FARES, crew="# Crew\n\nThe watch changes at noon.")
    first = trade.ingest()
    assert (first.version, first.documents, first.chunks, first.added, first.embedded) == (1, 2, 4, 4, 4)
    second = trade.ingest()
    assert (second.version, second.unchanged, second.added, second.removed, second.embedded) == (1, 4, 0, 0, 0)
    assert len(trade.heads.entries) == 1 and trade.embedder.embedded == 4
    assert trade.heads.entries[0]["chunks"] == 4 and "version" not in trade.heads.entries[0]
    assert json.loads(json.dumps(second.to_dict()))["problems"] == []


def test_a_version_keeps_its_answers_when_documents_change_and_go(trade: Trade) -> None:
    trade.write(fares=FARES, crew="# Crew\n\nThe watch changes at noon.")
    trade.ingest()
    trade.write(fares=FARES.replace("3 crowns", "4 crowns"))
    second = trade.ingest()
    assert (second.version, second.added, second.removed, second.unchanged, second.embedded) == (2, 1, 1, 3, 1)
    (trade.directory / "crew.md").unlink()
    third = trade.ingest()
    assert (third.version, third.added, third.removed, third.unchanged) == (3, 0, 1, 3)
    dog = {"query": "what does a dog cost", "top_k": 1, "min_score": -1}
    assert [trade.find(version=v, **dog) for v in (1, 2, 3)] == [["A dog costs 3 crowns."]] + [
        ["A dog costs 4 crowns."]
    ] * 2
    watch = [trade.find("when does the watch change at noon", v, mode="bm25", top_k=1) for v in (0, 1, 2, 3)]
    assert watch == [[], ["The watch changes at noon."], ["The watch changes at noon."], []]


def test_a_change_of_rights_is_a_change_and_takes_over_vectors(trade: Trade) -> None:
    trade.write(fares=FARES)
    trade.ingest()
    second = trade.ingest(groups=("crew",))
    assert (second.version, second.updated, second.added, second.removed, second.embedded) == (2, 3, 0, 0, 0)
    query = {"query": "dog crowns", "min_score": -1, "mode": "dense"}
    assert len(trade.find(version=1, **query)) == 3
    assert trade.find(version=2, **query) == []
    crew = Principal(groups=("crew",))
    assert trade.find(version=2, principal=crew, **query)[0] == "A dog costs 3 crowns."


def test_a_change_of_title_is_embedded_again(trade: Trade) -> None:
    trade.write(fares=FARES)
    trade.ingest()
    trade.write(fares=FARES.replace("# Fares", "# Prices", 1))
    second = trade.ingest()
    assert (second.updated, second.embedded) == (3, 3)
    assert len(trade.find("prices", 2, mode="bm25")) == 3
    assert trade.find("prices", 1, mode="bm25") == []


def test_tenants_of_one_knowledge_do_not_touch_each_other(trade: Trade) -> None:
    trade.write(fares=FARES)
    trade.ingest(tenant="acme")
    assert trade.ingest(tenant="blue").version == 2
    trade.write(fares="# Fares\n\nAll is free.")
    assert trade.ingest(tenant="acme").removed == 3
    query = {"query": "dog crowns", "version": 3, "mode": "bm25"}
    assert trade.find(principal=Principal("acme"), **query) == []
    assert "A dog costs 3 crowns." in trade.find(principal=Principal("blue"), **query)


def test_bad_files_are_in_the_report_and_an_empty_directory_is_refused(trade: Trade) -> None:
    trade.write(fares=FARES, empty="")
    assert [problem.source for problem in trade.ingest().problems] == ["empty.md"]
    (trade.directory / "fares.md").unlink()
    with pytest.raises(NotFound, match=r"empty\.md: empty"):
        trade.ingest()
    assert trade.find("dog", 1, mode="bm25") == ["A dog costs 3 crowns."]


@pytest.mark.parametrize("calls", range(6))
def test_a_run_killed_anywhere_changes_no_answer_and_the_next_repairs(trade: Trade, calls: int) -> None:
    trade.write(fares=FARES, crew="# Crew\n\nThe watch changes at noon.")
    trade.ingest()
    before = trade.find("dog crowns watch", 1, mode="dense", min_score=-1, top_k=10)
    trade.write(fares=FARES.replace("3 crowns", "4 crowns"))
    (trade.directory / "crew.md").unlink()
    append, trade.heads.knowledge_append = trade.heads.knowledge_append, _die  # type: ignore[method-assign]
    with pytest.raises(Killed):
        trade.ingest(KilledStore(trade.store, calls))  # type: ignore[arg-type]
    trade.heads.knowledge_append = append  # type: ignore[method-assign]
    assert trade.find("dog crowns watch", 1, mode="dense", min_score=-1, top_k=10) == before

    trade.write(fares=FARES.replace("3 crowns", "6 crowns"))
    assert trade.ingest().version == 2
    assert trade.find("dog crowns watch", 1, mode="dense", min_score=-1, top_k=10) == before
    assert sorted(trade.find("dog crowns watch", 2, mode="bm25", top_k=10, candidates=10)) == [
        "A bicycle costs 5 crowns.", "A dog costs 6 crowns."
    ]  # fmt: skip
    assert trade.store.count(trade.collection, ALL) == 5


def test_words_of_a_later_document_weigh_as_much_as_those_of_the_others(trade: Trade) -> None:
    trade.write(**{f"lamp{n}": f"Lamp {n} burns oil of grade {n}." for n in range(40)}, first="The beacon burns peat.")
    trade.ingest()
    trade.write(second="The beacon by day burns peat.")
    trade.ingest()

    def alike() -> bool:
        first, second, *_ = trade.store.search_bm25(trade.collection, "beacon peat", live(2), 2)
        return first.score < 1.5 * second.score

    wait_for("the server to merge what it holds", alike)


def _die(name: str, entry: dict[str, Any]) -> int:
    raise Killed


def test_a_collection_of_another_registry_is_left_alone(trade: Trade) -> None:
    trade.write(fares=FARES)
    trade.ingest()
    trade.write(fares=FARES + "\nmore")
    trade.ingest()
    heads, trade.heads = trade.heads, Heads()
    with pytest.raises(Mismatch, match=r"storage\.url and store\.uri"):
        trade.ingest()
    trade.heads = heads
    assert len(trade.find("crowns", 2, mode="bm25")) == 2


def test_another_embedder_is_refused(trade: Trade) -> None:
    trade.write(a="Dogs stay on deck.")
    trade.ingest()
    for other in (WordEmbedder(fingerprint="other"), WordEmbedder(dimension=32)):
        with pytest.raises(Mismatch, match="another model"):
            Retriever(trade.store, lambda _, other=other: other).retrieve(
                "dogs", trade.snapshot(1), principal=EVERYONE, settings=RetrievalConfig()
            )
        with pytest.raises(Mismatch, match=trade.collection):
            trade.store.create(trade.collection, embedder=other.fingerprint, dimension=other.dimension)


# -- retrieval with the real embedder ----------------------------------------------------------------------------


@pytest.fixture(scope="session")
def minilm() -> Embedder:
    return Embedder(resolve(EmbedderConfig(), Path(Config().models_cache).expanduser()), EmbedderConfig())


def test_hybrid_finds_paraphrases_and_codes_and_declines_what_is_not_there(trade: Trade, minilm: Embedder) -> None:
    trade.embedder = minilm  # type: ignore[assignment]
    trade.write(
        fares="# Fares\n\n## Animals\n\nA dog travels for 3 crowns.\n\n## Freight\n\n- F5A: a lorry costs 148 crowns.\n- F5U: a trailer costs 232 crowns.",
        night="# Night watch\n\nThe gangway is raised at 23:30 and the quay lamp is lit.",
    )
    trade.ingest(chunk_tokens=24)
    assert "dog" in trade.find("How much to take my puppy aboard?", 1, top_k=1)[0]
    assert "F5U" in trade.find("F5U", 1, top_k=1, min_score=-1)[0]
    assert trade.find("Who composed the opera Rusalka?", 1) == []
    assert trade.find("Who composed the opera Rusalka?", 1, min_score=-1) != []
    retriever = Retriever(trade.store, lambda _: minilm)
    found = retriever.retrieve("price of a dog", trade.snapshot(1), principal=EVERYONE, settings=RetrievalConfig())
    assert set(found.passages[0].scores) == {"dense", "bm25", "fused"}
    assert {"embed", "search"} <= set(found.seconds)
