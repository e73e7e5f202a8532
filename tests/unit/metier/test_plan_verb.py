"""``metier plan`` in process: what it prints for a shape by name, and what a user gets wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from metier.__main__ import main


def plan(monkeypatch: pytest.MonkeyPatch, *argv: object) -> int:
    """Exit code of ``metier plan ARGV``."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("sys.argv", ["metier", "plan", *map(str, argv)])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_one_command_says_how_many_gpus_70b_takes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan(monkeypatch, "--model", "llama-3.1-70b", "--gpu-memory", 80) == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    start = next(number for number, line in enumerate(lines) if "fewest GPUs" in line)
    fewest = {line.split()[0]: line for line in lines[start + 1 : start + 4]}
    assert " 3 GPUs, 1 node" in fewest["lora"]
    assert " 1 GPU, 1 node" in fewest["qlora"]
    assert [line.split()[0] for line in lines if line.startswith("*") and "configured" not in line] == ["*lora"]


def test_the_tables_fit_80_columns(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(monkeypatch, "--model", "llama-3.1-70b", "--gpus", 8) == 0
    printed = capsys.readouterr().out
    table = printed[printed.index("method") : printed.index("* as configured")]
    assert len(table.splitlines()) == 16
    assert max(map(len, table.splitlines())) <= 80


def test_json_holds_every_way_in_bytes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code = plan(monkeypatch, "--model", "smollm2-135m", "--gpus", 2, "--gpu-memory", 24, "--json")
    found = json.loads(capsys.readouterr().out)
    assert code == 0
    assert found["shape"]["parameters"] == 134_515_008
    assert len(found["ways"]) == 15
    assert found["fits"] is True
    assert found["advice"] == []
    assert found["fewest_gpus"]["full"]["gpus"] == 1
    assert found["asked"]["workers"] == 2


def test_what_does_not_fit_is_followed_by_what_would(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan(monkeypatch, "--model", "llama-3.1-8b", "--gpu-memory", 16, "--gpus", 4) == 0
    printed = capsys.readouterr().out
    assert "lora with ZeRO-2 does not fit. What would, cheapest first:" in printed
    assert "  training.deepspeed.zero_stage=3: " in printed or "  training.method=qlora: " in printed


def test_the_configured_base_is_planned_by_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    models = f"models_cache={tmp_path}"
    assert plan(monkeypatch, "--set", "base.source=tiny:llama", "--set", models) == 0
    assert "tiny:llama: 0.00 billion parameters" in capsys.readouterr().out


def test_an_unknown_model_is_refused_with_the_names_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan(monkeypatch, "--model", "llama-9", "--set", f"models_cache={tmp_path}") == 3
    said = capsys.readouterr().err
    assert "'llama-9' is no shape that metier knows" in said
    assert "llama-3.1-70b" in said
