"""The embedded server as a process: who starts it, who stops it, what is left when somebody is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pytest

from cluster.config import StoreConfig
from cluster.errors import Unavailable
from retrieval.embedded import Server, running, serve
from retrieval.store import Store
from tests.rows import ALL, DIMENSION, EMBEDDER, row, vector
from tests.trade import wait_for


def there(data_dir: Path) -> Server:
    server = running(data_dir)
    assert server is not None
    return server


def test_a_server_that_dies_while_in_use_is_started_again_where_it_was(tmp_path: Path) -> None:
    config = StoreConfig(data_dir=str(tmp_path))
    with serve(config) as uri:
        store = Store(config, uri)
        store.create("durable", embedder=EMBEDDER, dimension=DIMENSION)
        store.upsert("durable", [row(number) for number in range(30)])
        for _ in range(2):
            killed = there(tmp_path)
            os.kill(killed.pid, signal.SIGKILL)
            assert store.count("durable", ALL) == 30
            assert there(tmp_path).uri == uri and there(tmp_path) != killed
        assert store.search_bm25("durable", "word7", ALL, 1)[0].chunk_id == "c7"
        assert store.search_dense("durable", vector("word7"), ALL, 1)[0].chunk_id == "c7"
        store.close()
    assert running(tmp_path) is None
    with serve(config) as uri:
        store = Store(config, uri)
        assert store.count("durable", ALL) == 30
        store.close()


def test_of_many_users_one_starts_it_again(tmp_path: Path) -> None:
    config = StoreConfig(data_dir=str(tmp_path))
    with serve(config) as uri, serve(config) as same, serve(config):
        other = user(tmp_path)
        assert other.stdout is not None and other.stdout.readline().strip() == uri == same
        os.kill(there(tmp_path).pid, signal.SIGKILL)
        store = Store(config, uri)
        assert not store.exists("anything")
        store.close()
        assert len([child for child in psutil.Process().children(recursive=True) if serves(child, tmp_path)]) == 1
        other.communicate("done")
    assert running(tmp_path) is None


def serves(process: psutil.Process, data_dir: Path) -> bool:
    return process.status() != psutil.STATUS_ZOMBIE and str(data_dir) in process.cmdline()


def test_a_second_process_uses_the_same_server_and_may_outlive_the_first(tmp_path: Path) -> None:
    config = StoreConfig(data_dir=str(tmp_path))
    with serve(config) as uri:
        other = user(tmp_path)
        assert other.stdout is not None and other.stdout.readline().strip() == uri
    server = there(tmp_path)
    assert server.uri == uri
    Store(config, uri).close()
    other.communicate("done")
    assert other.returncode == 0 and not server.runs()
    assert not (tmp_path / "server.json").exists()


def test_the_server_goes_with_its_killed_user_and_the_next_start_is_clean(tmp_path: Path) -> None:
    other = user(tmp_path)
    assert other.stdout is not None and other.stdout.readline().startswith("http://127.0.0.1:")
    server = there(tmp_path)
    other.kill()
    other.communicate()
    wait_for("the server to go", lambda: not server.runs())
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
