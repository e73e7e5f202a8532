"""``metier knowledge`` in process, with a real embedded server: what each verb says and leaves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from cluster.config import load
from cluster.registry import Registry
from cluster.storage import Storage
from retrieval.embedded import serve
from tests import trade
from tests.knowledge import tiny_embedder
from tests.trade import Ran


@dataclass
class Terminal:
    """``terminal("list")``: ``metier knowledge list`` with a configuration and documents in a directory of its own."""

    directory: Path
    monkeypatch: pytest.MonkeyPatch
    capsys: pytest.CaptureFixture[str]

    @property
    def file(self) -> Path:
        return self.directory / "metier.yaml"

    def __call__(self, *verb: object, group: str = "knowledge") -> Ran:
        return trade.verb(self.monkeypatch, self.capsys, group, *verb, "-c", self.file, width=80)

    def write(self, **documents: str) -> None:
        for name, text in documents.items():
            (self.directory / "documents" / f"{name}.md").write_text(text)

    def index(self) -> None:
        assert self(group="index").code == 0

    @property
    def registry(self) -> Registry:
        return Registry(Storage.of(load(self.file, environ={}).storage))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    directory = tmp_path_factory.mktemp("models")
    return tiny_embedder(directory / "one", 16), tiny_embedder(directory / "other", 24, seed=1)


@pytest.fixture
def terminal(
    tmp_path: Path,
    models: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Iterator[Terminal]:
    """Three versions of the knowledge `shop`: 2 has another price, 3 no crew and a harbour."""
    terminal = Terminal(tmp_path, monkeypatch, capsys)
    (tmp_path / "documents").mkdir()
    settings = {
        "storage": {"url": str(tmp_path / "store")},
        "store": {"data_dir": str(tmp_path / "milvus")},
        "embedder": {"source": str(models[0]), "max_tokens": 64},
        "knowledge": {"name": "shop", "documents": str(tmp_path / "documents"), "chunk_tokens": 48},
        "base": {"source": "tiny:llama", "dtype": "float32"},
        "models_cache": str(tmp_path / "models"),
    }
    terminal.file.write_text(yaml.safe_dump(settings))
    with serve(load(terminal.file, environ={}).store):
        terminal.write(fares="# Fares\n\n## Dogs\n\nA dog costs 3 crowns.", crew="# Crew\n\nThe watch changes at noon.")
        terminal.index()
        terminal.write(fares="# Fares\n\n## Dogs\n\nA dog costs 4 crowns.")
        terminal.index()
        (tmp_path / "documents" / "crew.md").unlink()
        terminal.write(harbour="# Harbour\n\nThe quay lamp is lit at night.")
        terminal.index()
        yield terminal


def test_versions_are_listed_compared_and_taken_back(terminal: Terminal) -> None:
    [head] = terminal("list", "--json").json
    assert (head["name"], head["number"], head["documents"], head["chunks"]) == ("shop", 3, 2, 2)
    assert "shop" in (shown := terminal("list").out) and "v3" in shown and "(16)" in shown
    listed = terminal("versions", "--json").json["versions"]
    assert [(v["number"], v["kept"], v["compacted"]) for v in listed] == [
        (1, "newest", False), (2, "newest", False), (3, "head", False),
    ]  # fmt: skip
    table = terminal("versions", "shop").out
    assert "+1 ~0 -1" in table and max(map(len, table.splitlines())) <= 80

    apart = terminal("diff", 1, "v3", "--json").json["documents"]
    assert [(d["doc_id"], d["kind"], len(d["chunks"])) for d in apart] == [
        ("crew", "removed", 1), ("fares", "changed", 2), ("harbour", "added", 1),
    ]  # fmt: skip
    shown = terminal("diff", "shop", 1, 3).out
    assert "+1 -1" in shown and "Dogs" in shown and max(map(len, shown.splitlines())) <= 80
    assert "0 documents" in terminal("diff", 2, 2).err

    back = terminal("rollback", 1)
    assert back.code == 0 and "knowledge shop v4 shows what v1 showed: 2 chunks" in back.err
    assert "rollback to 1" in terminal("versions").out
    assert [v["number"] for v in terminal("versions", "--json").json["versions"]] == [1, 2, 3, 4]


def test_what_is_pinned_or_released_outlives_a_compaction(terminal: Terminal) -> None:
    assert terminal("pin", 1, "--label", "audit").code == 0
    released = terminal("create", "--no-adapter", "--knowledge-version", 2, group="release")
    assert released.code == 0, released.err
    kept = terminal("versions", "--json").json["versions"]
    assert [v["kept"] for v in kept] == ["pin audit", "release metier@1", "head"]
    assert terminal("compact", "--keep", 1, "--json").json["gone"] == []
    assert terminal("unpin", "shop", 1, "--json").json["pins"] == {}
    dry = terminal("compact", "--keep", 1, "--dry-run")
    assert "1 rows of 1 versions would go, 2 versions stay" in dry.err
    assert terminal("compact", "--keep", 1, "--json").json["gone"] == [1]
    gone = terminal("rollback", 1)
    assert gone.code == 3 and "version 1 of knowledge 'shop' was compacted" in gone.err
    assert "compacted" in terminal("versions").out
    refused = terminal("create", "--no-adapter", "--knowledge-version", 1, group="release")
    assert refused.code == 3 and "was compacted" in refused.err
    assert terminal("create", "--no-adapter", "--knowledge-version", 7, group="release").code == 3
    assert terminal("create", "--no-adapter", "--knowledge-version", "new", group="release").code == 2
    assert "named by release metier@1" in terminal("drop", "shop", "--yes").err
    assert "release metier@1: --force would be needed" in terminal("drop", "shop", "--dry-run").err
    assert terminal("drop", "shop", "--yes", "--force").code == 0
    assert terminal("list", "--json").json == []


def test_nothing_is_dropped_without_a_yes(terminal: Terminal) -> None:
    asked = terminal("drop", "shop")
    assert asked.code == 2 and "this removes 3 versions of knowledge 'shop' with 4 rows; pass --yes" in asked.err
    assert terminal("drop", "shop", "--yes", "--json").json["versions"] == 3
    assert terminal("versions").code == 3
    assert terminal("drop", "shop", "--yes").code == 3
    terminal.index()
    assert terminal("list", "--json").json[0]["number"] == 5


def test_a_document_is_forgotten_and_let_back(terminal: Terminal) -> None:
    assert terminal("forget", "fares", "--dry-run", "--json").json["rows"] == 2
    report = terminal("forget", "shop", "fares")
    assert report.code == 0 and "document fares is forgotten: 2 rows of knowledge shop" in report.err
    assert "versions" in report.out and "1, 2, 3" in report.out and max(map(len, report.out.splitlines())) <= 80
    assert terminal("diff", 1, 3, "--json").json["documents"][0]["doc_id"] == "crew"
    terminal.index()
    assert terminal.registry.knowledge_head("shop") == 3
    assert terminal("forget", "nothing").code == 3
    assert terminal("forget", "fares", "--undo", "--json").json["undone"] is True
    terminal.index()
    assert terminal("diff", 3, 4, "--json").json["documents"][0]["doc_id"] == "fares"


def test_a_knowledge_moves_to_another_embedder(terminal: Terminal, models: tuple[Path, Path]) -> None:
    moved = terminal("reindex", "--compare", "--sample", 2, "--set", f"embedder.source={models[1]}")
    assert moved.code == 0, moved.err
    assert "recall before" in moved.out and max(map(len, moved.out.splitlines())) <= 80
    assert "knowledge shop v4 is in k_shop_v4: 2 chunks, 2 embedded" in moved.err
    [head] = terminal("list", "--json").json
    assert (head["kind"], head["embedder"]["dimension"]) == ("reindex", 24)
    assert terminal("reindex", "--abort").code == 3
    plan = terminal("compact", "--keep", 1, "--json", "--dry-run").json
    assert "k_shop_v1" in plan["collections"]


def test_what_cannot_be_meant_is_refused(terminal: Terminal) -> None:
    for verb, said in (
        (("rollback", "one"), "'one' is not a version"),
        (("diff", 1), "give two versions"),
        (("forget", "a", "b", "c"), "give a document"),
    ):
        refused = terminal(*verb)
        assert refused.code == 2 and said in refused.err
