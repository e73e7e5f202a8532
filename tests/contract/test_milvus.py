"""Retrieval against a real milvus-lite server on loopback: what is found, by whom, in which version, after what."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.config import Config, EmbedderConfig, KnowledgeConfig, RetrievalConfig, StoreConfig
from cluster.errors import BadInput, Mismatch, NotFound, Unavailable
from cluster.models import resolve
from retrieval.embed import Embedder, Vectors
from retrieval.embedded import running, serve
from retrieval.filters import And, Compare, Condition, ContainsAny, In, Not, Or, live, rights
from retrieval.ingest import IngestReport, ingest
from retrieval.retriever import Retriever
from retrieval.store import ALIVE, PAGE, Row, Store, alias
from retrieval.types import Principal

EVERYONE = Principal()
ALL = And(())


class WordEmbedder:
    """Hash-of-words vectors: texts that share words are near. Counts what it embeds."""

    def __init__(self, dimension: int = 64, fingerprint: str = "words") -> None:
        self.dimension = dimension
        self.fingerprint = fingerprint
        self.embedded = 0

    def count_tokens(self, text: str) -> int:
        return len(text.split())

    def embed(self, texts: Sequence[str], *, query: bool = False) -> Vectors:
        self.embedded += len(texts)
        vectors = np.full((len(texts), self.dimension), 1e-3, dtype=np.float32)
        for row, text in enumerate(texts):
            for word in re.findall(r"\w+", text.lower()):
                vectors[row, zlib.crc32(word.encode()) % self.dimension] += 1
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


class Heads:
    """A registry of knowledge versions in memory."""

    def __init__(self) -> None:
        self.entries: list[dict[str, Any]] = []

    def knowledge_head(self, name: str) -> int:
        return len(self.entries)

    def knowledge_append(self, name: str, entry: dict[str, Any]) -> int:
        self.entries.append(json.loads(json.dumps(entry)))
        return len(self.entries)


class Trade:
    """One knowledge of a test: its documents, registry, embedder and store."""

    def __init__(self, store: Store, directory: Path, name: str) -> None:
        self.store, self.directory, self.name = store, directory, name
        self.heads, self.embedder = Heads(), WordEmbedder()
        directory.mkdir(exist_ok=True)

    def write(self, **documents: str) -> None:
        for name, text in documents.items():
            (self.directory / f"{name}.md").write_text(text)

    def ingest(self, store: Store | None = None, **changes: Any) -> IngestReport:
        knowledge = KnowledgeConfig(name=self.name, documents=str(self.directory), **{"chunk_tokens": 16} | changes)
        return ingest(Config(knowledge=knowledge), store or self.store, self.embedder, self.heads)

    def find(self, query: str, version: int, principal: Principal = EVERYONE, **changes: Any) -> list[str]:
        found = Retriever(self.store, self.embedder).retrieve(
            query, knowledge=self.name, version=version, principal=principal, settings=RetrievalConfig(**changes)
        )
        return [passage.text for passage in found.passages]


@pytest.fixture(scope="session")
def uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serve(StoreConfig(data_dir=str(tmp_path_factory.mktemp("milvus")))) as uri:
        yield uri


@pytest.fixture(scope="session")
def store(uri: str) -> Iterator[Store]:
    store = Store(StoreConfig(), uri)
    yield store
    store.close()


@pytest.fixture
def trade(store: Store, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Trade]:
    name = re.sub(r"[^a-z0-9]+", "-", request.node.name.lower())[:60].strip("-")
    trade = Trade(store, tmp_path / "documents", name)
    yield trade
    store.drop(name)


def row(number: int, **values: Any) -> Row:
    text = values.pop("text", f"word{number}")
    vector = WordEmbedder().embed([text])[0].tolist()
    return {
        "row_id": f"c{number}-1", "chunk_id": f"c{number}", "doc_id": "doc", "title": "", "heading": "", "text": text,
        "search_text": text, "source": "doc.md", "position": number, "tenant": "default", "groups": ["everyone"],
        "born": 1, "died": ALIVE, "metadata": {}, "dense": vector,
    } | values  # fmt: skip


def create(store: Store, name: str, rows: list[Row]) -> None:
    store.drop(name)
    store.create(name, embedder="words", dimension=64)
    store.upsert(name, rows)


def ids(store: Store, name: str, condition: Condition) -> set[str]:
    return {found["chunk_id"] for found in store.rows(name, condition, ["chunk_id"])}


# -- the store ---------------------------------------------------------------------------------------------------


def test_rows_are_paged_counted_and_come_back_as_written(store: Store) -> None:
    rows = [row(number, metadata={"nested": [1, "é"]}, groups=["a", "b"]) for number in range(PAGE + 20)]
    create(store, "paging", rows)
    assert store.count("paging", ALL) == len(rows)
    assert ids(store, "paging", Compare("position", "<", PAGE + 10)) == {f"c{n}" for n in range(PAGE + 10)}
    [found] = store.rows("paging", Compare("row_id", "==", "c7-1"), list(rows[7]))
    assert found.pop("dense") == pytest.approx(rows[7].pop("dense"))
    assert found == rows[7]
    store.upsert("paging", [row(7)])
    assert store.count("paging", ALL) == len(rows)
    store.delete("paging", In("chunk_id", ["c1", "c2"]))
    assert store.count("paging", ALL) == len(rows) - 2
    store.drop("paging")
    assert not store.exists("paging")


def test_scores_are_higher_for_better_on_both_sides(store: Store) -> None:
    texts = ["refund of a ticket", "refund of a ticket after a storm", "engine start on the vessel"]
    create(store, "scores", [row(n, text=text) for n, text in enumerate(texts)])
    vector = WordEmbedder().embed(["refund storm"])[0]
    for stage, found in (
        ("dense", store.search_dense("scores", vector, ALL, 3)),
        ("bm25", store.search_bm25("scores", "refund storm", ALL, 3)),
    ):
        assert found[0].text == texts[1]
        assert found[0].score > found[1].score > 0
        assert found[0].scores == {stage: found[0].score}
    cosine = float(vector @ WordEmbedder().embed([texts[1]])[0])
    assert store.search_dense("scores", vector, ALL, 1)[0].score == pytest.approx(cosine, abs=1e-4)
    for nothing in ("zeppelin", "?!", ""):
        assert store.search_bm25("scores", nothing, ALL, 3) == []


def test_names_never_collide() -> None:
    names = ["a.b", "a-b", "a_b", "a_db", "a__b", "a_v1", "a", "1a"]
    assert len({alias(name) for name in names}) == len(names)
    assert all(re.fullmatch(r"[A-Za-z_]\w*", alias(name), re.ASCII) for name in names)
    assert not any(alias(one) == alias(other) + "_v1" for one in names for other in names)


def test_names_with_dots_and_dashes_work(store: Store) -> None:
    create(store, "corvane-2.1_x", [row(1)])
    assert store.count("corvane-2.1_x", ALL) == 1


def test_another_embedder_is_refused(store: Store, trade: Trade) -> None:
    trade.write(a="Dogs stay on deck.")
    trade.ingest()
    for other in (WordEmbedder(fingerprint="other"), WordEmbedder(dimension=32)):
        with pytest.raises(Mismatch, match="another model"):
            Retriever(store, other).retrieve(
                "dogs", knowledge=trade.name, version=1, principal=EVERYONE, settings=RetrievalConfig()
            )
        with pytest.raises(Mismatch, match=re.escape(trade.name)):
            store.create(trade.name, embedder=other.fingerprint, dimension=other.dimension)


def test_unknown_knowledge_is_named(store: Store, uri: str) -> None:
    with pytest.raises(NotFound, match=f"'nowhere'.*{uri}"):
        store.count("nowhere", ALL)
    with pytest.raises(NotFound):
        store.search_bm25("nowhere", "x", ALL, 1)


@pytest.mark.parametrize("listening", [False, True])
def test_an_address_that_does_not_answer_fails_in_a_sentence(listening: bool) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        if listening:
            silent.listen()
        with pytest.raises(Unavailable, match=r"does not answer.*store\.uri"):
            Store(StoreConfig(timeout_s=1), f"http://127.0.0.1:{silent.getsockname()[1]}")


# -- rights ------------------------------------------------------------------------------------------------------

GROUPS = ["everyone", "crew", "desk"]
READERS = st.builds(
    Principal,
    st.sampled_from(["acme", "blue", "nobody"]),
    st.lists(st.sampled_from([*GROUPS, "x"]), unique=True).map(tuple),
)
SUBSETS = [["everyone"], ["crew"], ["crew", "desk"], []]


@pytest.fixture(scope="session")
def guarded(store: Store) -> list[Row]:
    rows = [
        row(number, text=f"refund rule {number}", tenant=tenant, groups=groups, born=born, died=died,
            row_id=f"c{number}-{born}")
        for number, (tenant, groups, (born, died)) in enumerate(
            (tenant, groups, life)
            for tenant in ("acme", "blue") for groups in SUBSETS for life in ((1, ALIVE), (1, 3), (3, ALIVE))
        )
    ]  # fmt: skip
    create(store, "guarded", rows)
    return rows


@settings(max_examples=25, deadline=None)
@given(reader=READERS, version=st.integers(0, 4))
def test_nobody_finds_what_they_may_not_read(store: Store, guarded: list[Row], reader: Principal, version: int) -> None:
    allowed = {
        found["chunk_id"]
        for found in guarded
        if found["tenant"] == reader.tenant
        and set(found["groups"]) & set(reader.groups)
        and found["born"] <= version < found["died"]
    }
    condition = And((rights(reader), live(version)))
    assert ids(store, "guarded", condition) == allowed
    vector = WordEmbedder().embed(["refund rule"])[0]
    assert {p.chunk_id for p in store.search_dense("guarded", vector, condition, 50)} == allowed
    assert {p.chunk_id for p in store.search_bm25("guarded", "refund rule", condition, 50)} == allowed


ATTACKS = [
    'acme" or tenant != "',
    'acme" || "1" == "1',
    '" or true or tenant == "',
    "acme' or 'a' == 'a",
    'acme\\" or tenant != \\"',
    'x\\\\" or row_id != "',
    'acme") or (tenant != "',
    'everyone"]) or array_contains_any(groups, ["crew',
    "acme\\",
    "%",
    "acme; drop",
    "{tenant}",
    '"""',
    "ａｃｍｅ",
]


@pytest.mark.parametrize("attack", ATTACKS)
def test_injected_text_stays_a_value(store: Store, guarded: list[Row], attack: str) -> None:
    for condition in (
        rights(Principal(attack, ("everyone",))),
        rights(Principal("acme", (attack,))),
        In("doc_id", [attack]),
        ContainsAny("groups", [attack]),
    ):
        assert ids(store, "guarded", condition) == set()
    assert len(ids(store, "guarded", Not(Compare("doc_id", "==", attack)))) == len(guarded)


@pytest.fixture(scope="session")
def literals(store: Store) -> str:
    create(store, "literals", [row(1, doc_id="another\tdocument")])
    return "literals"


@settings(max_examples=40, deadline=None)
@given(
    value=st.text(st.characters(exclude_categories=("Cc", "Cs")), max_size=30) | st.text("\"'\\ ()or=!", max_size=12)
)
def test_the_server_reads_every_literal_as_it_was_meant(store: Store, literals: str, value: str) -> None:
    store.upsert(literals, [row(2, doc_id=value)])
    assert ids(store, literals, Compare("doc_id", "==", value)) == {"c2"}
    assert ids(store, literals, Or((In("doc_id", [value, "x"]), Compare("position", "<", 0)))) == {"c2"}
    assert ids(store, literals, Compare("doc_id", "!=", value)) == {"c1"}


def test_control_characters_never_reach_the_server(store: Store, guarded: list[Row]) -> None:
    with pytest.raises(BadInput):
        ids(store, "guarded", rights(Principal('acme"\n or tenant != "', ("everyone",))))


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


class Killed(Exception):
    """Stands for SIGKILL at a call of the store."""


class KilledStore:
    """The store, for a process that dies at its `calls`-th write."""

    def __init__(self, store: Store, calls: int) -> None:
        self._store, self._calls = store, calls

    def __getattr__(self, name: str) -> Any:
        if name in ("upsert", "set_died", "delete"):
            self._calls -= 1
            if self._calls < 0:
                raise Killed
        return getattr(self._store, name)


@pytest.mark.parametrize("calls", range(6))
def test_a_run_killed_anywhere_changes_no_answer_and_the_next_repairs(trade: Trade, calls: int) -> None:
    trade.write(fares=FARES, crew="# Crew\n\nThe watch changes at noon.")
    trade.ingest()
    before = trade.find("dog crowns watch", 1, mode="bm25", top_k=10, candidates=10)
    trade.write(fares=FARES.replace("3 crowns", "4 crowns"))
    (trade.directory / "crew.md").unlink()
    append, trade.heads.knowledge_append = trade.heads.knowledge_append, _die  # type: ignore[method-assign]
    with pytest.raises(Killed):
        trade.ingest(KilledStore(trade.store, calls))  # type: ignore[arg-type]
    trade.heads.knowledge_append = append  # type: ignore[method-assign]
    assert trade.find("dog crowns watch", 1, mode="bm25", top_k=10, candidates=10) == before

    trade.write(fares=FARES.replace("3 crowns", "6 crowns"))
    assert trade.ingest().version == 2
    assert trade.find("dog crowns watch", 1, mode="bm25", top_k=10, candidates=10) == before
    assert sorted(trade.find("dog crowns watch", 2, mode="bm25", top_k=10, candidates=10)) == [
        "A bicycle costs 5 crowns.", "A dog costs 6 crowns."
    ]  # fmt: skip
    assert trade.store.count(trade.name, ALL) == 5


def _die(name: str, entry: dict[str, Any]) -> int:
    raise Killed


def test_a_collection_of_another_registry_is_left_alone(trade: Trade) -> None:
    trade.write(fares=FARES)
    trade.ingest()
    trade.write(fares=FARES + "\nmore")
    trade.ingest()
    trade.heads = Heads()
    with pytest.raises(Mismatch, match=r"storage\.url and store\.uri"):
        trade.ingest()
    assert len(trade.find("crowns", 2, mode="bm25")) == 2


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
    retriever = Retriever(trade.store, minilm)
    found = retriever.retrieve(
        "price of a dog", knowledge=trade.name, version=1, principal=EVERYONE, settings=RetrievalConfig()
    )
    assert set(found.passages[0].scores) == {"dense", "bm25", "rrf"}
    assert set(found.seconds) == {"embed", "search"}


# -- the embedded server -----------------------------------------------------------------------------------------


def test_rows_survive_a_killed_server(tmp_path: Path) -> None:
    config = StoreConfig(data_dir=str(tmp_path))
    with serve(config) as first:
        lost = Store(config, first)
        create(lost, "durable", [row(number) for number in range(30)])
        server = running(tmp_path)
        assert server is not None
        os.kill(server.pid, signal.SIGKILL)
        until(lambda: not server.runs())
        with pytest.raises(Unavailable, match=first):
            lost.count("durable", ALL)
        with serve(config) as second:
            store = Store(config, second)
            assert store.count("durable", ALL) == 30
            assert store.search_bm25("durable", "word7", ALL, 1)[0].chunk_id == "c7"
            store.close()
        lost.close()
    assert running(tmp_path) is None


def test_a_server_that_hangs_is_given_up(tmp_path: Path) -> None:
    config = StoreConfig(data_dir=str(tmp_path), timeout_s=1)
    with serve(config) as uri:
        store = Store(config, uri)
        create(store, "hanging", [row(1)])
        server = running(tmp_path)
        assert server is not None
        os.kill(server.pid, signal.SIGSTOP)
        with pytest.raises(Unavailable, match=r"store\.timeout_s = 1"):
            store.count("hanging", ALL)
        os.kill(server.pid, signal.SIGCONT)
        assert store.count("hanging", ALL) == 1
        store.close()


def test_a_second_process_uses_the_same_server_and_may_outlive_the_first(tmp_path: Path) -> None:
    config = StoreConfig(data_dir=str(tmp_path))
    with serve(config) as uri:
        other = user(tmp_path)
        assert other.stdout is not None and other.stdout.readline().strip() == uri
    server = running(tmp_path)
    assert server is not None and server.uri == uri
    Store(config, uri).close()
    other.communicate("done")
    assert other.returncode == 0 and not server.runs()
    assert not (tmp_path / "server.json").exists()


def test_the_server_goes_with_its_killed_user_and_the_next_start_is_clean(tmp_path: Path) -> None:
    other = user(tmp_path)
    assert other.stdout is not None and other.stdout.readline().startswith("http://127.0.0.1:")
    server = running(tmp_path)
    assert server is not None
    other.kill()
    other.communicate()
    until(lambda: not server.runs())
    assert (tmp_path / "server.json").exists()
    with serve(StoreConfig(data_dir=str(tmp_path))) as uri:
        Store(StoreConfig(), uri).close()


def test_a_stale_state_file_does_not_count(tmp_path: Path) -> None:
    own = psutil.Process()
    state = {"pid": own.pid, "created": own.create_time() - 100, "port": 1}
    (tmp_path / "server.json").write_text(json.dumps(state))
    assert running(tmp_path) is None


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    (tmp_path / "collections").write_text("not a directory")
    with (
        pytest.raises(Unavailable, match=r"did not start: .*collections.*server\.log"),
        serve(StoreConfig(data_dir=str(tmp_path))),
    ):
        pass


def test_a_real_address_is_passed_on() -> None:
    with serve(StoreConfig(uri="http://milvus:19530", data_dir="/nowhere")) as uri:
        assert uri == "http://milvus:19530"


def user(data_dir: Path) -> subprocess.Popen[str]:
    """A process that uses the embedded server of `data_dir`, prints its URI and waits for a line."""
    code = f"""
        from cluster.config import StoreConfig
        from retrieval.embedded import serve
        with serve(StoreConfig(data_dir={str(data_dir)!r})) as uri:
            print(uri, flush=True)
            input()
    """
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip


def until(condition: Any, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)
