"""Adapters to and from a hub on loopback that speaks what huggingface_hub speaks: repositories, LFS, commits.

The command line runs in processes of its own: huggingface_hub reads its settings when it is imported. The fake keeps
what was committed and serves it again; Xet, which real hubs offer besides LFS, is switched off.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from cluster.release import DatasetRef
from tests import trade

TOKEN = "hf_writer"
CLOSED = "http://127.0.0.1:9"


class Hub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.created: list[dict[str, Any]] = []
        self.commits: list[dict[str, bytes]] = []
        self.blobs: dict[str, bytes] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def files(self) -> dict[str, bytes]:
        """What stands at the head."""
        return {name: data for commit in self.commits for name, data in commit.items()}

    @property
    def head(self) -> str:
        return f"{len(self.commits):040x}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = self.path.partition("?")[0]
        if path == "/api/validate-yaml":
            return self.send({"errors": [], "warnings": []})
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            return self.refuse(401)
        if path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            return self.send({"url": f"{self.server.url}/org/lamps", "name": "org/lamps"})
        if path == "/api/models/org/lamps/preupload/main":
            modes = [
                {"path": file["path"], "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular"}
                | {"shouldIgnore": False, "oid": None}
                for file in json.loads(body)["files"]
            ]
            return self.send({"files": modes})
        if path == "/org/lamps.git/info/lfs/objects/batch":
            objects = [
                {**thing, "actions": {"upload": {"href": f"{self.server.url}/lfs/{thing['oid']}", "header": {}}}}
                for thing in json.loads(body)["objects"]
            ]
            return self.send({"transfer": "basic", "objects": objects}, "application/vnd.git-lfs+json")
        if path == "/api/models/org/lamps/commit/main":
            commit = {}
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    commit[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    commit[value["path"]] = self.server.blobs[value["oid"]]
            self.server.commits.append(commit)
            url = f"{self.server.url}/org/lamps/commit/{self.server.head}"
            return self.send({"commitUrl": url, "commitOid": self.server.head, "success": True})
        return self.refuse(404)

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        oid = self.path.rpartition("/")[2]
        assert hashlib.sha256(data).hexdigest() == oid
        self.server.blobs[oid] = data
        self.send({})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path, files, head = self.path.partition("?")[0], self.server.files, self.server.head
        if self.headers["Authorization"] != f"Bearer {TOKEN}":  # the repository is private
            return self.refuse(404)
        if path in {f"/api/models/org/lamps{at}" for at in ("", "/revision/main", f"/revision/{head}")}:
            siblings = [{"rfilename": name} for name in files]
            return self.send({"id": "org/lamps", "sha": head, "siblings": siblings})
        if path.startswith("/api/models/org/lamps/tree/"):
            return self.send([{"type": "file", "path": n, "size": len(d), "oid": _oid(d)} for n, d in files.items()])
        if path.startswith(f"/org/lamps/resolve/{head}/") and (name := path.rpartition("/")[2]) in files:
            headers = {"ETag": f'"{_oid(files[name])}"', "X-Repo-Commit": head}
            return self.send_bytes(files[name], headers)
        return self.refuse(404)

    def refuse(self, status: int) -> None:
        self.send_response(status)
        if status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def send(self, value: Any, kind: str = "application/json") -> None:
        self.send_bytes(json.dumps(value).encode(), {"Content-Type": kind})

    def send_bytes(self, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(200)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _oid(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def desk(hub: Hub, tmp_path: Path) -> Iterator[trade.Desk]:
    """A terminal whose hub is the fake, and which holds a token in a file as `hf auth login` leaves it."""
    (tmp_path / "huggingface").mkdir()
    (tmp_path / "huggingface" / "token").write_text(TOKEN)
    config = trade.configure(tmp_path)
    dataset = DatasetRef(digest="d" * 64, rows=16)
    trade.publish(config, trade.write_adapter(config, tmp_path / "trained"), "lamps", dataset=dataset)
    environment = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "huggingface"),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": TOKEN,
        "no_proxy": "127.0.0.1",
    }
    with trade.desk(tmp_path / "metier.yaml", **environment) as made:
        yield made


def test_an_adapter_goes_to_a_hub_in_one_commit_and_comes_back(hub: Hub, desk: trade.Desk, tmp_path: Path) -> None:
    pushed = desk.ok("adapters", "push", "lamps", "hub:org/lamps", "--json").json
    assert hub.created == [{"name": "lamps", "organization": "org", "visibility": "private"}]
    assert len(hub.commits) == 1
    assert set(hub.files) == {"README.md", "adapter_config.json", "adapter_model.safetensors", "metier-card.json"}
    trained = (tmp_path / "trained" / "adapter_model.safetensors").read_bytes()
    assert list(hub.blobs.values()) == [trained], "weights go over LFS"
    pulled = desk.ok("adapters", "pull", "hub:org/lamps", "--name", "copy", "--json").json
    assert (pulled["name"], pulled["digest"]) == ("copy", pushed["digest"])
    assert desk.ok("adapters", "pull", f"hub:org/lamps@{hub.head}", "--name", "copy", "--json").json["version"] == 1


def test_the_token_is_that_of_the_environment_and_no_other(hub: Hub, desk: trade.Desk) -> None:
    desk.environment["HF_TOKEN"] = ""
    said = desk.fails(2, "adapters", "push", "lamps", "hub:org/lamps")
    assert "hub:org/lamps: set HF_TOKEN to a token that may write there" in said
    said = desk.fails(3, "adapters", "pull", "hub:org/lamps", "--name", "copy")
    assert "there is no such repository or revision, or it is private" in said
    desk.environment["HF_TOKEN"] = "hf_reader"
    said = desk.fails(5, "adapters", "push", "lamps", "hub:org/lamps")
    assert "the hub answered 401; check that HF_TOKEN may write there" in said
    assert "hf_reader" not in said
    assert (hub.created, hub.commits) == ([], [])


def test_a_hub_that_is_gone_and_a_name_that_is_none_are_one_sentence(desk: trade.Desk) -> None:
    desk.environment["HF_ENDPOINT"] = CLOSED
    said = desk.fails(5, "adapters", "push", "lamps", "hub:org/lamps")
    assert f"hub:org/lamps ({CLOSED}) does not answer" in said
    assert "'hub:lamps' is not a repository; write hub:org/name" in desk.fails(
        2, "adapters", "pull", "hub:lamps", "--name", "copy"
    )
