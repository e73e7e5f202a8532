"""Verbs that need no server, run in process: what they print, and the exit code of what a user gets wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from metier.__main__ import main

ROOT = Path(__file__).parents[3]


def metier(monkeypatch: pytest.MonkeyPatch, *argv: object) -> int:
    """Exit code of ``metier ARGV``."""
    monkeypatch.setattr("sys.argv", ["metier", *map(str, argv)])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "metier.yaml"
    settings = {
        "name": "desk",
        "storage": {"url": str(tmp_path / "store")},
        "store": {"data_dir": str(tmp_path / "milvus")},
        "state_dir": str(tmp_path / "run"),
        "models_cache": str(tmp_path / "models"),
        "base": {"source": "tiny:llama", "dtype": "float32"},
    }
    file.write_text(yaml.safe_dump(settings))
    return file


def test_config_show_resolves_and_masks(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("METIER_MILVUS_TOKEN", "root:secret")
    code = metier(monkeypatch, "config", "show", "--json", "-c", config, "--set", "training.epochs=7")
    out = capsys.readouterr().out
    shown = json.loads(out)
    assert code == 0
    assert shown["training"]["epochs"] == 7
    assert shown["store"]["token"] == "**********"
    assert "secret" not in out


def test_unknown_key_names_line_and_near_key(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config.write_text("name: desk\ntraining:\n  epoch: 3\n")
    assert metier(monkeypatch, "config", "validate", config) == 2
    assert f"{config}:3: training.epoch is not a setting; did you mean epochs?" in capsys.readouterr().err


def test_missing_file(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert metier(monkeypatch, "status", "-c", "/nowhere/metier.yaml") == 2
    assert "no such file" in capsys.readouterr().err


def test_status_of_an_empty_house(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert metier(monkeypatch, "status", "--json", "-c", config) == 0
    state = json.loads(capsys.readouterr().out)
    assert state["server"] is None
    assert (state["knowledge"]["version"], state["adapters"], state["releases"]) == (0, 0, 0)


def test_release_without_adapter_or_knowledge_then_alias_moves(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = ("release", "create", "--no-adapter", "--no-knowledge", "--json", "-c", config)
    assert metier(monkeypatch, *bare, "--promote", "prod") == 0
    first = json.loads(capsys.readouterr().out)
    assert first["name"] == "desk"
    assert first["aliases"] == ["prod"]

    assert metier(monkeypatch, *bare, "--set", "retrieval.top_k=5") == 0
    second = json.loads(capsys.readouterr().out)
    assert second["digest"] != first["digest"]

    assert metier(monkeypatch, "release", "promote", "desk@2", "-c", config) == 0
    assert metier(monkeypatch, "release", "rollback", "desk", "-c", config) == 0
    capsys.readouterr()
    assert metier(monkeypatch, "release", "list", "--json", "-c", config) == 0
    listed = json.loads(capsys.readouterr().out)
    assert {made["version"]: made["aliases"] for made in listed} == {1: ["prod"], 2: []}


@pytest.mark.parametrize(
    ("argv", "code", "says"),
    [
        (("release", "create"), 3, "there is no adapter"),
        (("release", "show", "nope"), 3, "there is no release 'nope'"),
        (("release", "create", "tiny-llama", "--no-adapter"), 2, "choose another name"),
        (("release", "create", "--no-adapter"), 2, "run `metier index`"),
        (("search", "anything"), 3, "run `metier index`"),
        (("train",), 2, "data.train names no rows"),
        (("eval",), 2, "data.heldout names no file"),
        (("ask", "anything", "--set", "serving.port=1"), 5, "start one with `metier up`"),
        (("index",), 3, "knowledge.documents"),
        (("status", "--set", "nonsense"), 2, "key.path=value"),
        (("down",), 0, "nothing is up"),
    ],
)
def test_what_a_user_gets_wrong(
    argv: tuple[str, ...],
    code: int,
    says: str,
    config: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    extra = ("--set", "embedder.source=tiny:bert") if argv[0] in ("index", "search") else ()
    assert metier(monkeypatch, *argv, "-c", config, *extra) == code
    captured = capsys.readouterr()
    assert says in captured.err.replace("\n", " ")
    assert "Traceback" not in captured.err


def test_a_pickled_adapter_is_refused(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "adapter"
    directory.mkdir()
    (directory / "adapter_model.bin").write_bytes(b"\x80\x04.")
    (directory / "adapter_config.json").write_text("{}")
    assert metier(monkeypatch, "adapters", "add", directory, "--name", "bad", "-c", config) in (2, 4)
    assert "adapter_model.bin" in capsys.readouterr().err
