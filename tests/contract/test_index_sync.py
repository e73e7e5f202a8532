"""``metier index`` as a process: documents that are added, changed and taken away, once and while it watches.

Real files, a real Milvus server, and for ``s3://`` a real S3 server (moto's, on loopback, in a process of its own).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import fsspec
import pytest

from cluster.config import Config
from retrieval.embedded import serve
from retrieval.filters import live
from retrieval.store import Store
from tests import trade

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return trade.configure(tmp_path)


def command(room: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "metier", "index", "--config", str(room / "metier.yaml"), *arguments]


def index(room: Path, *arguments: str, code: int = 0) -> Any:
    done = subprocess.run(command(room, *arguments), cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout) if done.stdout else done.stderr


def known(config: Config) -> set[str]:
    """Documents of the head."""
    head = trade.registry(config).knowledge_version("lamps")
    with serve(config.store) as uri:
        store = Store(config.store, uri)
        try:
            return {row["doc_id"] for row in store.rows(head.collection, live(head.reads), ["doc_id"])}
        finally:
            store.close()


class Watching:
    """A ``metier index --watch``, its lines as they come."""

    def __init__(self, room: Path, *arguments: str) -> None:
        self.process = subprocess.Popen(
            command(room, "--watch", *arguments),
            cwd=REPOSITORY,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"COLUMNS": "400"},
            start_new_session=True,
            preexec_fn=trade.hear_ctrl_c,
        )

    def line(self, part: str) -> str:
        """The next line that holds `part`."""
        assert self.process.stderr is not None
        seen = []
        for line in self.process.stderr:
            if part in line:
                return line
            seen.append(line)
        raise AssertionError("".join(seen))

    def __enter__(self) -> Watching:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


def test_sync_adds_changes_and_takes_away(config: Config, tmp_path: Path) -> None:
    other = tmp_path / "other place"
    trade.write_documents(other)
    first = index(tmp_path, "--sync", str(other), "--json")
    assert (first["version"], first["documents"], first["removed"]) == (1, 8, 0)
    (other / "lamp-elm.md").unlink()
    (other / "lamp-fir.md").write_text("# Lamp fir\n\nThe fir lamp is broken.\n")
    (other / "lamp-ivy.md").write_text("# Lamp ivy\n\nThe ivy lamp has clear glass.\n")
    second = index(tmp_path, "--sync", str(other), "--json")
    assert (second["version"], second["embedded"]) == (2, 2)
    assert known(config) == {f"lamp-{name}" for name in [*trade.LAMPS, "ivy"]} - {"lamp-elm"}

    (tmp_path / "empty").mkdir()
    for gone in ("nowhere", "empty"):
        assert "error: " in index(tmp_path, "--sync", str(tmp_path / gone), code=3)
    assert index(tmp_path, "--sync", str(other), "--json")["version"] == 2


def test_an_object_store_is_kept_in_step(config: Config, tmp_path: Path, s3: dict[str, Any]) -> None:
    files = fsspec.filesystem("s3", **s3)
    files.mkdir("manuals")
    for name in ("oil", "wick"):
        files.pipe_file(f"manuals/shop/{name}.md", f"# About {name}\n\nKeep the {name} dry.".encode())
    options = ["--sync", "s3://manuals/shop", "--set", f"storage.options={json.dumps(s3)}"]
    options += ["--set", "ingestion.interval_s=0.2", "--set", f"storage.url={tmp_path}/store"]
    with Watching(tmp_path, *options) as watching:
        watching.line("v1: 2 documents")
        files.pipe_file("manuals/shop/glass.md", b"# About glass\n\nWash the glass.")
        watching.line("v2: 1 documents, 1 chunks (+1 ~0 -0 =0)")
        files.rm_file("manuals/shop/oil.md")
        watching.line("v3: 0 documents, 0 chunks (+0 ~0 -1 =0)")
        trade.interrupt(watching.process)
        watching.line("no longer watching s3://manuals/shop")
        assert watching.process.wait(60) == 0
    assert known(config) == {"glass", "wick"}


def test_watching_a_directory_outlives_what_passes(config: Config, tmp_path: Path) -> None:
    documents = tmp_path / "documents"
    with Watching(tmp_path, "--set", "ingestion.interval_s=0.2") as watching:
        watching.line("v1: 8 documents")
        (documents / "lamp-ivy.md").write_text("# Lamp ivy\n\nThe ivy lamp has clear glass.\n")
        watching.line("v2: 1 documents")
        documents.rename(tmp_path / "away")
        watching.line("no such directory")
        (tmp_path / "away" / "lamp-elm.md").unlink()
        (tmp_path / "away").rename(documents)
        watching.line("v3: 0 documents")
        trade.interrupt(watching.process)
        watching.line("no longer watching")
        assert watching.process.wait(60) == 0
    assert known(config) == {f"lamp-{name}" for name in [*trade.LAMPS, "ivy"]} - {"lamp-elm"}
    assert index(tmp_path, "--json")["version"] == 3
