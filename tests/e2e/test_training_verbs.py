"""Training through the command line, as a user meets it: every kind of run, and what stops one.

Killed drivers and workers are in ``test_faults.py`` and ``tests/ray``; lost nodes in ``test_node_faults.py``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests import trade

pytestmark = [pytest.mark.fault, pytest.mark.timeout(600), pytest.mark.usefixtures("nothing_left")]
ENDLESS = ("--set", "training.max_steps=100000")


def sets(**settings: Any) -> tuple[str, ...]:
    """``training.x=y`` for each, as options."""
    return tuple(word for key, value in settings.items() for word in ("--set", f"training.{key}={value}"))


def run_of(desk: trade.Desk, adapter: str) -> Any:
    """The run that trains `adapter`, once it has made a step."""
    found = [run for run in desk.ok("runs", "list", "--json").json if run["name"].startswith(f"{adapter}-")]
    return found[0] if found and found[0]["step"] else None


def test_general_and_validation_rows_stand_on_the_card_beside_the_gain(desk: trade.Desk, tmp_path: Path) -> None:
    general = tmp_path / "general.jsonl"
    talk = [{"role": "user", "content": "Two and two?"}, {"role": "assistant", "content": "four"}]
    general.write_text(json.dumps({"id": "g", "messages": talk}) + "\n")
    ran = desk.ok(
        "train",
        *sets(adapter="watched", max_steps=8, checkpoint_steps=4),
        *("--set", f"data.general=[{general}]", "--set", "data.split.validation_share=0.3"),
        *("--set", "data.split.minimum_validation=2"),
    )
    assert "gain: validation loss" in ran.err and "forgetting: general loss" in ran.err
    card = desk.ok("adapters", "show", "watched").json["card"]
    metrics = card["metrics"]
    assert metrics["validation_after"] < metrics["validation_before"]
    assert {"best_step", "general_before", "general_after"} <= metrics.keys()
    storage = Path(trade.load(desk.config).storage.url)
    assert (storage / f"runs/{card['run']}/loss.png").read_bytes().startswith(b"\x89PNG")


def test_full_and_merged_weights_become_models_that_serve_as_a_base(desk: trade.Desk, tmp_path: Path) -> None:
    desk.ok("train", *sets(adapter="whole", method="full", publish="model", max_steps=3))
    desk.ok("train", *sets(adapter="dora", publish="model", max_steps=3), "--set", "training.lora.variant=dora")
    listed = {model["name"]: model["card"] for model in desk.ok("models", "list", "--published", "--json").json}
    assert (listed["whole"]["method"], listed["dora"]["variant"]) == ("full", "dora")
    desk.ok("models", "pull", "dora", str(tmp_path / "dora"))
    again = desk.ok("train", *sets(adapter="on-top", max_steps=2), "--set", f"base.source={tmp_path}/dora")
    assert "on-top@1" in again.err


def test_a_run_is_cancelled_from_another_terminal_and_goes_on_later(desk: trade.Desk, tmp_path: Path) -> None:
    log = tmp_path / "log"
    verb = ("train", *sets(adapter="stopped"))
    child = desk.start(*verb, *ENDLESS, log=log)
    try:
        run = trade.wait_for("a step", lambda: run_of(desk, "stopped"), 240)
    except BaseException:
        child.kill()
        raise
    refused = desk.fails(4, *verb, *ENDLESS)
    assert f"run {run['name']} is being trained by pid {child.pid}" in refused
    desk.ok("runs", "cancel", run["name"])
    assert child.wait(120) == 143
    assert "was cancelled" in log.read_text()
    assert desk.ok("runs", "show", run["name"], "--json").json["state"] == "cancelled"
    assert "stopped" not in {adapter["name"] for adapter in desk.ok("adapters", "list", "--json").json}
    assert "is over already" in desk.ok("runs", "cancel", run["name"]).err


def test_workers_without_memory_are_told_what_to_change(desk: trade.Desk) -> None:
    """Ray ends workers when the machine is nearly full; here it takes a tenth of what is used for full."""
    starved = trade.Desk(desk.config, {"RAY_memory_usage_threshold": "0.01", "RAY_memory_monitor_refresh_ms": "100"})
    said = starved.fails(6, "train", *sets(adapter="starved", max_failures=0), *ENDLESS)
    assert "a training worker ran out of memory" in said and "training." in said
    starved.assert_nothing_left()


def test_what_could_never_be_served_is_refused_before_anything_starts(desk: trade.Desk) -> None:
    for said, words in {
        "no module 'q_porj'": ("--set", "training.lora.target_modules=[q_porj]"),
        "serving.generator.max_rank": (*sets(adapter="wide"), "--set", "training.lora.rank=128"),
        "dora": ("--set", "training.lora.variant=dora"),
    }.items():
        ran = desk.run("train", *words)
        assert ran.code in (2, 4) and said in ran.err, ran.err
        assert "DeepSpeed" not in ran.err


def test_the_log_of_a_run_can_be_followed_and_two_runs_compared(desk: trade.Desk, tmp_path: Path) -> None:
    for rank in (2, 4):
        desk.ok("train", *sets(adapter=f"rank{rank}", max_steps=3), "--set", f"training.lora.rank={rank}")
    names = [run["name"] for run in desk.ok("runs", "list", "--json").json if run["name"].startswith("rank")]
    assert "2 workers, DeepSpeed ZeRO-2" in desk.ok("runs", "logs", names[0]).out
    compared = desk.ok("runs", "compare", *names, "--plot", str(tmp_path / "both.png")).out
    assert "training.lora.rank" in compared
    assert (tmp_path / "both.png").is_file()


def test_rows_are_checked_mended_and_trained_on(desk: trade.Desk, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    lines = [{"instruction": f"Say number {n}.", "output": f"number {n}"} for n in range(12)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in [*lines, lines[0], {"instruction": "?", "output": ""}]))
    checked = desk.run("data", "check", str(rows), "--json")
    errors = [item for item in checked.json["report"]["findings"] if item["level"] == "error"]
    assert checked.code == 2 and [item["place"] for item in errors] == [f"{rows}:14"]
    mended = tmp_path / "mended"
    desk.run("data", "check", str(rows), "--fix", str(mended))
    assert desk.run("data", "check", str(mended / "rows.jsonl")).code == 0
    ran = desk.ok("train", *sets(adapter="mended", max_steps=2), "--set", f"data.train=[{mended}/rows.jsonl]")
    assert "train: 12 rows" in ran.err
