"""``hub:`` sources of rows against a hub on loopback that knows one data set, has none of a name, or is gone.

:func:`training.data.hub.rows_of` runs in a process of its own: `datasets` reads its settings when it is imported.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
COMMIT = "c" * 40
ROWS = b"".join(b'{"prompt": "How much is %d?", "completion": "%d crowns"}\n' % (n, n) for n in range(300))
SCRIPT = b"raise SystemExit('imported')"
PROGRAM = """
import json, sys
from cluster.errors import MetierError
from training.data.hub import rows_of
try:
    print(json.dumps(list(rows_of(sys.argv[1]))))
except MetierError as error:
    print(json.dumps([type(error).__name__, str(error)]))
"""


class Hub(BaseHTTPRequestHandler):
    """``org/name`` at one commit: a file of rows and no card; ``org/code`` is a script."""

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path.startswith("/api/datasets/org/name/tree/") and not path.endswith("/data"):
            self.send([{"type": "file", "path": "train.jsonl", "size": len(ROWS), "oid": "0" * 40}])
        elif path in {
            f"/api/datasets/org/{name}{at}" for name in ("name", "code") for at in ("", f"/revision/{COMMIT}")
        }:
            self.send({"id": "/".join(path.split("/")[3:5]), "sha": COMMIT, "siblings": []})
        elif path == f"/datasets/org/name/resolve/{COMMIT}/train.jsonl":
            self.send(ROWS)
        elif path == f"/datasets/org/code/resolve/{COMMIT}/code.py":
            self.send(SCRIPT)
        else:
            known = "/org/name/" in path or "/org/code/" in path
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound" if known else "RepoNotFound")
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", "0")
            self.end_headers()

    def send(self, body: Any) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(200)
        for name, value in {"Content-Length": str(len(data)), "ETag": '"1"', "X-Repo-Commit": COMMIT}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)


@pytest.fixture
def hub() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def rows(source: str, home: Path, endpoint: str, **environment: str) -> Any:
    """What ``rows_of`` gives, or the name of the error and its sentence."""
    settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "PYTHONPATH": str(REPOSITORY)}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, source],
        capture_output=True,
        text=True,
        check=False,
        cwd=home,
        env={**os.environ, **settings, **environment},
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_rows_of_a_data_set_are_numbered_and_kept(hub: str, tmp_path: Path) -> None:
    (tmp_path / "org/name").mkdir(parents=True)  # is not taken for the data set
    found = rows("hub:org/name", tmp_path, hub)
    assert len(found) == 300
    assert found[-1] == ["hub:org/name#train row 300", {"prompt": "How much is 299?", "completion": "299 crowns"}]
    offline = {"HF_HUB_OFFLINE": "1"}
    assert rows(f"hub:org/name@{COMMIT}#train", tmp_path, hub, **offline) == found
    kind, sentence = rows(f"hub:org/name@{'d' * 40}", tmp_path, hub, **offline)
    assert kind == "Unavailable"
    assert f"the newest in the cache is {COMMIT}; check the name and the network" in sentence


@pytest.mark.parametrize(
    ("source", "kind", "sentence"),
    [
        ("hub:org/gone", "NotFound", "check name and revision, and set HF_TOKEN for a private or gated one"),
        ("hub:org/name#dev", "NotFound", "Should be one of ['train']; write another one behind the #"),
        ("hub:org/code", "BadInput", "cannot be read as rows (Dataset scripts are no longer supported"),
        ("hub:name", "BadInput", "hub:name: not the name of a data set; write hub:org/name@revision#split"),
    ],
)
def test_what_cannot_be_had_is_said(hub: str, tmp_path: Path, source: str, kind: str, sentence: str) -> None:
    found, said = rows(source, tmp_path, hub)
    assert (found, said.startswith(f"{source}: ")) == (kind, True)
    assert sentence in said


def test_a_hub_that_is_not_asked_and_an_empty_cache(hub: str, tmp_path: Path) -> None:
    kind, sentence = rows("hub:org/name", tmp_path, hub, HF_HUB_OFFLINE="1")
    assert kind == "Unavailable"
    assert "name a copy of its files as a local directory" in sentence
