"""An ingest on a real local Ray does what the same ingest does in one process, also when workers die under it.

Embedders are the random one of :mod:`cluster.tiny`; what they say makes no sense, and is the same wherever it is said.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster import runtime
from cluster.config import Config
from cluster.errors import NotFound, ResourcesShort, Unavailable
from cluster.models import resolve
from retrieval.embed import Embedder
from retrieval.embedded import serve
from retrieval.filters import Compare
from retrieval.ingest import IngestReport, ingest
from retrieval.ingest_ray import OnRay
from retrieval.steps import Here
from retrieval.store import Store
from tests import trade

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # Ray's, of itself
ROWS = ["row_id", "chunk_id", "digest", "doc_id", "text", "groups", "metadata", "born", "died", "dense"]


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ingest")


@pytest.fixture(scope="module", autouse=True)
def ray(room: Path) -> Iterator[None]:
    with runtime.connect(configure(room, "ray.num_cpus=2")):
        yield
    trade.assert_no_children()


@pytest.fixture(scope="module")
def uri(room: Path) -> Iterator[str]:
    with serve(configure(room).store) as uri:
        yield uri


def configure(room: Path, *overrides: str) -> Config:
    return trade.configure(
        room, "embedder.device=cpu", "ingestion.workers=2", "ingestion.cpus_per_worker=0.5", *overrides
    )


class Ingests:
    """Ingests of one configuration into collections of their own."""

    def __init__(self, config: Config, uri: str) -> None:
        self.config, self.uri = config, uri
        self.store = Store(config.store, uri)
        self.embedder = Embedder(resolve(config.embedder, config.models_cache), config.embedder)
        self.registry = trade.registry(config)

    def run(self, name: str, steps: Any, **knowledge: Any) -> IngestReport:
        changed = self.config.knowledge.model_copy(update={"name": name, **knowledge})
        config = self.config.model_copy(update={"knowledge": changed})
        return ingest(config, self.store, self.embedder, self.registry, steps=steps)

    def on_ray(self, name: str, **knowledge: Any) -> IngestReport:
        return self.run(name, OnRay(self.config, self.uri, self.embedder.dimension), **knowledge)

    def here(self, name: str, **knowledge: Any) -> IngestReport:
        return self.run(name, Here(self.store, self.embedder), **knowledge)

    def rows(self, name: str) -> dict[str, dict[str, Any]]:
        collection = self.registry.knowledge_version(name).collection
        return {row["row_id"]: row for row in self.store.rows(collection, Compare("born", ">=", 0), ROWS)}


@pytest.fixture
def ingests(room: Path, uri: str) -> Ingests:
    return Ingests(configure(room), uri)


def write(directory: Path) -> Path:
    """Seventy documents, so that there are several blocks and files a task: rows of a table, files, broken ones."""
    trade.write_documents(directory)
    for number in range(60):
        text = f"# Note {number}\n\n" + " ".join(f"Lamp {number} has part {part}." for part in range(1 + number % 23))
        (directory / f"note-{number:02}.md").write_text(text)
    lines = [
        {"id": "a", "text": "Đèn số một.", "groups": ["crew"], "year": 3},
        {"id": "b", "text": "Lamp b.", "x": [1]},
    ]
    (directory / "table.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (directory / "copy.md").write_text((directory / "note-07.md").read_text())
    (directory / "empty.md").write_text("")
    return directory


def counts(report: IngestReport) -> dict[str, Any]:
    return {key: value for key, value in report.to_dict().items() if key not in ("knowledge", "seconds")}


def test_the_same_rows_as_in_one_process(ingests: Ingests, room: Path) -> None:
    documents = str(write(room / "many"))
    here = ingests.here("one", documents=documents)
    there = ingests.on_ray("two", documents=documents)
    assert counts(there) == counts(here)
    assert (there.documents, len(there.problems)) == (70, 2)
    ours, theirs = ingests.rows("one"), ingests.rows("two")
    assert ours.keys() == theirs.keys() and len(ours) == there.chunks == there.embedded
    for row_id, row in ours.items():
        dense, other = row.pop("dense"), theirs[row_id].pop("dense")
        assert row == theirs[row_id]
        assert np.allclose(dense, other, atol=5e-3)

    assert ingests.on_ray("two", documents=documents).version == there.version
    (room / "many" / "note-03.md").write_text("# Note 3\n\nAnother lamp.")
    (room / "many" / "note-04.md").unlink()
    changed = ingests.on_ray("two", documents=documents)
    assert (changed.version, changed.added, changed.embedded) == (there.version + 1, 1, 1)
    assert changed.removed > 1 and changed.chunks == there.chunks + 1 - changed.removed
    assert counts(ingests.here("one", documents=documents)) == counts(changed)


def test_a_killed_worker_is_replaced_and_nothing_is_lost(
    ingests: Ingests, room: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = str(write(room / "killed"))
    killed: list[int] = []

    def kill(*_: object) -> None:
        for process in trade.family():
            if not killed and "_Embed" in trade.command_line(process):
                os.kill(process.pid, signal.SIGKILL)
                killed.append(process.pid)

    steps = OnRay(ingests.config, ingests.uri, 32)
    pipeline = steps._pipeline
    monkeypatch.setattr(steps, "_pipeline", lambda *args: _Watched(pipeline(*args), kill))
    report = ingests.run("killed", steps, documents=documents)
    assert killed
    assert report.chunks == len(ingests.rows("killed")) == len(report_ids(ingests, "killed"))
    assert ingests.here("killed", documents=documents).version == report.version


class _Watched:
    """A data set whose first worker dies while it is consumed."""

    def __init__(self, data: Any, kill: Any) -> None:
        self.data, self.kill = data, kill

    def iter_batches(self, **options: Any) -> Iterator[Any]:
        for block in self.data.iter_batches(**options):
            self.kill()
            yield block


def report_ids(ingests: Ingests, name: str) -> set[str]:
    return {row["chunk_id"] for row in ingests.rows(name).values()}


def test_what_the_cluster_has_not_is_said_in_numbers(ingests: Ingests, room: Path) -> None:
    with pytest.raises(ResourcesShort, match=r"8 CPUs needed, 2 there .*Lower ingestion.workers"):
        OnRay(configure(room, "ingestion.workers=4", "ingestion.cpus_per_worker=2"), ingests.uri, 32)


def test_errors_of_workers_are_sentences(ingests: Ingests, room: Path) -> None:
    steps = OnRay(configure(room, f"models_cache={room}/other", "embedder.source=./nothing"), ingests.uri, 32)
    with pytest.raises(NotFound, match="nothing"):
        ingests.run("broken", steps)
    assert ingests.registry.knowledge_latest("broken") is None
    with pytest.raises(NotFound, match="no such directory"):
        ingests.on_ray("broken", documents=str(room / "nowhere"))
    away = configure(room, "store.timeout_s=0.5", "store.retry_s=0")
    with pytest.raises(Unavailable):
        ingests.run("away", OnRay(away, f"http://127.0.0.1:{trade.free_port()}", 32))
