"""Milvus away at the start, in the middle, slow, restarted: what goes on, what ends in one sentence, what is left.

A proxy on loopback stands between the store and the server and loses what a network loses; the embedded server is
killed by its pid. Nothing here depends on how fast the machine is.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from cluster.config import RetrievalConfig, StoreConfig
from cluster.errors import Unavailable
from retrieval.embedded import running, serve
from retrieval.filters import Compare
from retrieval.retriever import Retriever
from retrieval.store import Store
from retrieval.types import Principal
from tests.contract.conftest import MakeCollection
from tests.knowledge import Shelf
from tests.rows import ALL, DIMENSION, EMBEDDER, ids, row, vector

pytestmark = pytest.mark.skipif("MILVUS_URI" in os.environ, reason="faults are made on a server of our own")

FARES = "# Fares\n\n## Dogs\n\nA dog costs 3 crowns.\n\n## Bicycles\n\nA bicycle costs 5 crowns.\n"
CHANGED = FARES.replace("3 crowns", "4 crowns")
QUERY = "dog bicycle crowns watch"


class Proxy:
    """TCP to `target`, until it is told otherwise."""

    def __init__(self, target: str) -> None:
        host, port = target.removeprefix("http://").split(":")
        self._target = host, int(port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.uri = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.refuse = 0
        """So many connections are closed as soon as they are made."""
        self.down = False
        """Every connection is; :meth:`cut` ends those that are open."""
        self.lose_answers = False
        """What the server says is dropped, and the connection with it."""
        self.hold = threading.Event()
        """While it is set, what the server says is kept back."""
        self.connections = 0
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        for one in self._open:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        self._open.clear()

    def close(self) -> None:
        self.down = True
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            if self.down or self.refuse:
                self.refuse = max(0, self.refuse - 1)
                client.close()
                continue
            try:
                server = socket.create_connection(self._target)
            except OSError:
                client.close()
                continue
            self._open += [client, server]
            threading.Thread(target=self._pump, args=(client, server, False), daemon=True).start()
            threading.Thread(target=self._pump, args=(server, client, True), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, answers: bool) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                while answers and self.hold.is_set():
                    threading.Event().wait(0.01)
                if answers and self.lose_answers:
                    self.lose_answers = False
                    break
                sink.sendall(data)
        for one in (source, sink):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()


@pytest.fixture
def proxy(uri: str) -> Iterator[Proxy]:
    proxy = Proxy(uri)
    yield proxy
    proxy.close()


Connect = Callable[..., Store]


@pytest.fixture
def connect(proxy: Proxy, store_config: StoreConfig) -> Iterator[Connect]:
    """A store behind the proxy, with other waiting times."""
    made: list[Store] = []

    def connect(**waits: float) -> Store:
        made.append(Store(store_config.model_copy(update=waits), proxy.uri))
        return made[-1]

    yield connect
    for store in made:
        store.close()


# -- at the start ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("listening", [False, True])
def test_an_address_that_does_not_answer_ends_in_a_sentence(listening: bool) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        if listening:
            silent.listen()
        with pytest.raises(Unavailable, match=r"does not answer \(no connection; tried .*check .*store\.uri"):
            Store(StoreConfig(timeout_s=0.5, retry_s=0.6), f"http://127.0.0.1:{silent.getsockname()[1]}")


def test_a_milvus_that_comes_up_late_is_waited_for(proxy: Proxy, connect: Connect) -> None:
    proxy.refuse = 5
    assert not connect().exists("anything")
    assert proxy.connections > 5


# -- in the middle -----------------------------------------------------------------------------------------------


def test_a_connection_that_is_cut_is_made_again(
    proxy: Proxy, connect: Connect, make_collection: MakeCollection
) -> None:
    name, through = make_collection([row(n) for n in range(20)]), connect()
    calls: list[Callable[[], Any]] = [
        lambda: through.search_dense(name, vector("word7"), ALL, 1)[0].chunk_id,
        lambda: through.search_bm25(name, "word7", ALL, 1)[0].chunk_id,
        lambda: len(ids(through, name, ALL)),
        lambda: len(through.some(name, ALL, ["chunk_id"], 100)),
        lambda: through.count(name, ALL),
        lambda: through.upsert(name, [row(7)]),
        lambda: through.delete(name, ALL),
    ]
    assert [call() for call in calls[:-1]] == ["c7", "c7", 20, 20, 20, None]
    for call, expected in zip(calls, ["c7", "c7", 20, 20, 20, None, None], strict=True):
        proxy.refuse = 2
        proxy.cut()
        assert call() == expected
    assert through.count(name, ALL) == 0


def test_a_page_that_is_lost_on_the_way_is_asked_again(
    proxy: Proxy, connect: Connect, make_collection: MakeCollection
) -> None:
    name, through = make_collection([row(n) for n in range(1200)]), connect()
    found = []
    for number, one in enumerate(through.rows(name, ALL, ["chunk_id", "text"])):
        if number % 500 == 250:
            proxy.cut()
        found.append(one["chunk_id"])
    assert sorted(found) == sorted(f"c{n}" for n in range(1200))


def test_a_write_whose_answer_was_lost_is_done_once(
    proxy: Proxy, connect: Connect, make_collection: MakeCollection
) -> None:
    name, through = make_collection(), connect()
    through.upsert(name, [row(0)])
    proxy.lose_answers = True
    through.upsert(name, [row(n) for n in range(50)])
    assert not proxy.lose_answers
    assert through.count(name, ALL) == 50
    proxy.lose_answers = True
    through.set_died(name, [f"c{n}-1" for n in range(50)], 2)
    assert {found["died"] for found in through.rows(name, ALL, ["died"])} == {2}
    assert through.count(name, ALL) == 50


def test_searches_give_up_early_and_come_back_by_themselves(
    proxy: Proxy, connect: Connect, make_collection: MakeCollection
) -> None:
    name, through = make_collection([row(1)]), connect(retry_s=2.0)
    proxy.down = True
    proxy.cut()
    messages = []
    for search in (through.search_bm25, through.count):
        with pytest.raises(Unavailable) as caught:
            search(*((name, "word1", ALL, 1) if search == through.search_bm25 else (name, ALL)))  # type: ignore[operator]
        messages.append(float(caught.value.message.split(" times in ")[1].split(" s)")[0]))
    assert messages[0] < messages[1]
    proxy.down = False
    assert through.search_bm25(name, "word1", ALL, 1)[0].chunk_id == "c1"


def test_a_retriever_answers_again_when_milvus_is_back(
    proxy: Proxy, connect: Connect, store: Store, tmp_path: Path
) -> None:
    shelf = Shelf(store, tmp_path, "answers-again")
    shelf.write({"fares": FARES})
    shelf.ingest()
    behind = connect(retry_s=0.5)
    retriever = Retriever(behind, shelf.embedders)

    def ask() -> list[str]:
        settings = RetrievalConfig(min_score=-1)
        found = retriever.retrieve("dog crowns", shelf.snapshot(), principal=Principal(), settings=settings)
        return [passage.text for passage in found.passages]

    before = ask()
    proxy.down = True
    proxy.cut()
    for _ in range(3):
        with pytest.raises(Unavailable, match="does not answer"):
            ask()
    proxy.down = False
    assert ask() == before != []
    shelf.close()


# -- slow --------------------------------------------------------------------------------------------------------


def test_a_server_that_is_slow_once_is_asked_again_and_one_that_stays_so_is_named(
    proxy: Proxy, connect: Connect, make_collection: MakeCollection
) -> None:
    name, through = make_collection([row(1)]), connect(timeout_s=1.0, retry_s=15.0)
    assert through.count(name, ALL) == 1
    proxy.hold.set()
    free = threading.Timer(1.5, proxy.hold.clear)
    free.start()
    assert through.count(name, ALL) == 1
    free.join()
    proxy.hold.set()
    with pytest.raises(Unavailable, match=r"deadline exceeded.*store\.timeout_s"):
        through.search_bm25(name, "word1", ALL, 1)
    proxy.hold.clear()
    assert through.search_bm25(name, "word1", ALL, 1)[0].chunk_id == "c1"


def test_a_server_that_hangs_is_given_up_and_may_go_on(tmp_path: Path) -> None:
    config = StoreConfig(data_dir=str(tmp_path), timeout_s=1, retry_s=0)
    with serve(config) as uri:
        store = Store(config.model_copy(update={"timeout_s": 20.0}), uri)
        store.create("hanging", embedder=EMBEDDER, dimension=DIMENSION)
        store.upsert("hanging", [row(1)])
        hasty = Store(config, uri)
        server = running(tmp_path)
        assert server is not None
        os.kill(server.pid, signal.SIGSTOP)
        for call in (
            lambda: hasty.count("hanging", ALL),
            lambda: hasty.some("hanging", ALL, ["chunk_id"], 1),
            lambda: hasty.search_bm25("hanging", "word1", ALL, 1),
            lambda: hasty.upsert("hanging", [row(2)]),
        ):
            with pytest.raises(Unavailable, match=r"deadline exceeded|no connection"):
                call()
        os.kill(server.pid, signal.SIGCONT)
        assert ids(store, "hanging", Compare("position", "==", 1)) == {"c1"}
        hasty.close()
        store.close()


# -- an ingest ---------------------------------------------------------------------------------------------------


class Faulty:
    """The store, with something that happens before its `calls`-th write."""

    def __init__(self, store: Store, calls: int, happens: Callable[[], Any]) -> None:
        self._store, self._calls, self._happens = store, calls, happens

    def __getattr__(self, name: str) -> Any:
        if name in ("upsert", "set_died", "delete"):
            self._calls -= 1
            if self._calls == -1:
                self._happens()
        return getattr(self._store, name)


@pytest.mark.parametrize("calls", range(5))
def test_an_ingest_goes_on_through_the_death_of_the_server(tmp_path: Path, calls: int) -> None:
    config = StoreConfig(data_dir=str(tmp_path / "milvus"))
    with serve(config) as uri:
        store = Store(config, uri)
        shelf = Shelf(store, tmp_path, "fares")
        shelf.write({"fares": FARES, "crew": "# Crew\n\nThe watch changes at noon."})
        shelf.ingest()
        before = shelf.find(QUERY, mode="dense", min_score=-1)

        def kill() -> None:
            server = running(config.data_dir)
            assert server is not None
            os.kill(server.pid, signal.SIGKILL)

        shelf.write({"fares": CHANGED, "crew": None})
        assert shelf.ingest(Faulty(store, calls, kill)).version == 2
        assert shelf.find(QUERY, 1, mode="dense", min_score=-1) == before
        assert sorted(shelf.find(QUERY, mode="bm25")) == ["A bicycle costs 5 crowns.", "A dog costs 4 crowns."]
        assert shelf.count() == 4
        store.close()


@pytest.mark.parametrize("calls", range(4))
def test_an_ingest_without_milvus_ends_in_a_sentence_shows_nothing_and_is_taken_up(
    proxy: Proxy, connect: Connect, store: Store, tmp_path: Path, calls: int
) -> None:
    shelf = Shelf(store, tmp_path, f"taken-up-{calls}")
    shelf.write({"fares": FARES, "crew": "# Crew\n\nThe watch changes at noon."})
    shelf.ingest()
    before = shelf.find(QUERY, mode="dense", min_score=-1)
    shelf.write({"fares": CHANGED, "crew": None})

    def part() -> None:
        proxy.down = True
        proxy.cut()

    behind = connect(retry_s=0.3)
    with pytest.raises(Unavailable, match="does not answer"):
        shelf.ingest(Faulty(behind, calls, part))
    assert shelf.find(QUERY, mode="dense", min_score=-1) == before
    proxy.down = False
    assert shelf.ingest(behind).version == 2
    assert sorted(shelf.find(QUERY, mode="bm25")) == ["A bicycle costs 5 crowns.", "A dog costs 4 crowns."]
    assert shelf.find(QUERY, 1, mode="dense", min_score=-1) == before
    assert shelf.count() == 4
    shelf.close()
