"""``metier index``: which documents it takes, where it runs, what it prints. What it indexes: tests/contract."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cluster.errors import BadInput
from metier import index as verb
from metier.cli import app
from serving.knowledge.stores import Stores
from tests import trade


def run(room: Path, *arguments: str) -> Any:
    return CliRunner().invoke(app, ["index", "--config", str(trade.write_config(room)), *arguments])


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What would run as a job, instead of running."""
    calls: list[Any] = []

    def run_on(config: Any, address: Any, words: Any, **_: Any) -> bool:
        calls.append((config, address, words))
        return True

    monkeypatch.setattr(verb, "run_on", run_on)
    return calls


@pytest.mark.parametrize("place", ["s3://bucket/manuals", "/srv/it's: #1 manuals"])
def test_sync_names_the_documents_whatever_their_name(tmp_path: Path, asked: list[Any], place: str) -> None:
    assert run(tmp_path, "--sync", place, "--on", "http://head:8265").exit_code == 0
    config, address, words = asked[0]
    assert (config.knowledge.documents, address, words) == (place, "http://head:8265", ["index"])


def test_a_relative_place_counts_from_here(tmp_path: Path, asked: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(tmp_path, "--sync", "manuals", "--watch").exit_code == 0
    assert asked[0][0].knowledge.documents == str(tmp_path / "manuals") and asked[0][2] == ["index", "--watch"]


def test_what_was_done_is_told(tmp_path: Path) -> None:
    room = tmp_path / "room"
    first = run(room)
    assert first.exit_code == 0, first.output
    assert "knowledge lamps v1: 8 documents, 8 chunks (+8 ~0 -0 =0)" in first.stderr and "embedded/s" in first.stderr
    (room / "documents" / "torn.md").write_text("")
    report = run(room, "--json")
    told = json.loads(report.stdout)
    assert (told["version"], told["unchanged"], told["embedded"]) == (1, 8, 0)
    assert "skipped torn.md: empty" in report.stderr and told["problems"][0]["source"] == "torn.md"


def test_many_problems_are_not_all_told_one_by_one(tmp_path: Path) -> None:
    trade.write_config(tmp_path)
    for number in range(verb.SHOWN + 5):
        (tmp_path / "documents" / f"torn-{number}.md").write_text("")
    result = run(tmp_path)
    assert result.stderr.count("skipped torn-") == verb.SHOWN and "and 5 more" in result.stderr


def test_the_version_says_how_far_the_embedder_is_to_be_trusted(tmp_path: Path) -> None:
    config = trade.configure(tmp_path)
    assert run(tmp_path).exit_code == 0
    assert trade.registry(config).knowledge_version("lamps").details["calibration"]


def test_a_store_that_was_filled_over_the_api_keeps_its_files(tmp_path: Path) -> None:
    registry = trade.registry(trade.configure(tmp_path))
    Stores(registry).add(
        "lamps", op="create", title="Lamps", metadata={}, description=None, tenant="default", groups=[]
    )
    refused = run(tmp_path)
    assert isinstance(refused.exception, BadInput) and "would lose its files" in str(refused.exception)
    assert registry.knowledge_head("lamps") == 0
