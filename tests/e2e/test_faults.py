"""What is left when processes are killed, interrupted or refused: nothing half-published, nothing running, a sentence.

Through the command line, as a user meets it. Killed training workers are in ``tests/ray``; a failed disk and a lost
node are not covered.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import trade

pytestmark = [pytest.mark.fault, pytest.mark.timeout(600), pytest.mark.usefixtures("nothing_left")]
QUESTION = "What glass has the elm lamp?"
STEPS = 160
"""Of a run that is to be caught in the middle, by a test that looks on from outside."""


def adapters(desk: trade.Desk, name: str) -> list[Any]:
    return [entry for entry in desk.ok("adapters", "list", "--json").json if entry["name"] == name]


def training(desk: trade.Desk, log: Path, name: str) -> tuple[subprocess.Popen[str], tuple[str, ...]]:
    """A run of `name`, begun and past its second checkpoint; and the words that begin it."""
    verb = ("train", "--set", f"training.adapter={name}", "--set", f"training.max_steps={STEPS}")
    child = desk.start(*verb, log=log)
    runs = Path(trade.load(desk.config).storage.url, "runs")

    def checkpoints() -> bool:
        assert child.poll() is None, log.read_text()
        return len(list(runs.glob(f"{name}-*/checkpoint_*"))) >= 2

    trade.wait_for("a checkpoint", checkpoints, 240)
    return child, verb


def first_step(log: str) -> int:
    """The first step that ``metier train`` reports when it is not on a terminal: ``  training: 7/40 loss …``."""
    return int(next(line for line in log.splitlines() if "training: " in line).split("training: ")[1].split("/")[0])


def test_training_that_is_killed_publishes_nothing_and_goes_on_from_its_checkpoint(
    desk: trade.Desk, tmp_path: Path
) -> None:
    child, verb = training(desk, tmp_path / "log", "killed")
    members = trade.family(child.pid)
    assert any("RayTrainWorker" in trade.command_line(member) for member in members)
    child.kill()
    child.wait()
    trade.assert_gone([member for member in members if "Agent" not in trade.command_line(member)])
    assert adapters(desk, "killed") == []

    resumed = desk.ok(*verb)
    assert first_step(resumed.err) > 2, resumed.err
    assert f"{STEPS} steps" in resumed.err
    assert [entry["version"] for entry in adapters(desk, "killed")] == [1]
    trade.assert_gone(members)


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_training_that_is_interrupted_says_so_and_leaves_nothing(
    desk: trade.Desk, tmp_path: Path, number: signal.Signals, code: int, word: str
) -> None:
    child, _ = training(desk, tmp_path / "log", word)
    members = trade.family(child.pid)
    if number == signal.SIGINT:
        trade.interrupt(child)
    else:
        child.terminate()
    assert child.wait(120) == code
    trade.assert_gone(members)
    log = (tmp_path / "log").read_text()
    trade.assert_sentence(log)
    assert log.splitlines()[-1] == f"error: {word}", log
    assert adapters(desk, word) == []


def test_a_server_that_is_killed_takes_everything_with_it_and_can_be_started_again(desk: trade.Desk) -> None:
    desk.ok("release", "create", "plain", "--no-adapter")
    desk.ok("up", "-d")
    server = desk.ok("status", "--json").json["server"]
    members = trade.family(server["pid"])
    lines = [trade.command_line(member) for member in members]
    assert any("raylet" in line for line in lines) and any("milvus" in line for line in lines)
    assert sum("ServeReplica" in line for line in lines) == 3

    os.kill(server["pid"], signal.SIGKILL)
    trade.assert_gone([member for member in members if "Agent" not in trade.command_line(member)])
    assert desk.ok("status", "--json").json["server"] is None

    desk.ok("up", "-d")
    assert desk.ok("ask", QUESTION, "--model", "plain", "--json").json["passages"]
    again = desk.ok("status", "--json").json["server"]
    assert again["pid"] != server["pid"] and again["url"] == server["url"]
    assert f"already up at {server['url']}" in desk.ok("up").err
    desk.ok("down")
    trade.assert_gone(members)


def test_a_foreground_server_ends_cleanly_with_ctrl_c(desk: trade.Desk, tmp_path: Path) -> None:
    log = tmp_path / "log"
    child = desk.start("up", log=log)

    def is_up() -> bool:
        assert child.poll() is None, log.read_text()
        return "up at http" in log.read_text()

    trade.wait_for("the server", is_up, 240)
    members = trade.family(child.pid)
    trade.interrupt(child)
    assert child.wait(120) == 0, log.read_text()
    trade.assert_gone(members)
    said = log.read_text()
    assert "shutting down" in said
    assert "Traceback" not in said and "*** SIG" not in said, said


def test_a_server_that_is_interrupted_while_it_starts_ends_at_once(desk: trade.Desk, tmp_path: Path) -> None:
    log = tmp_path / "log"
    child = desk.start("up", log=log)
    trade.wait_for("Ray", lambda: "Ray is up" in log.read_text() or child.poll() is not None, 240)
    members = trade.family(child.pid)
    trade.interrupt(child)
    assert child.wait(120) == 130, log.read_text()
    trade.assert_gone(members)
    trade.assert_sentence(log.read_text())


def test_a_port_in_use_is_refused(desk: trade.Desk) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for flags in ([], ["-d"]):
            assert f"port {port} on 127.0.0.1 is in use" in desk.fails(6, "up", *flags, "--set", f"serving.port={port}")


def test_a_server_that_cannot_start_says_why(desk: trade.Desk) -> None:
    said = desk.fails(3, "up", "--set", "serving.release=nothing")
    assert "no release 'nothing'" in said
    said = desk.fails(6, "up", "-d", "--set", "serving.generator.cpus=64")
    assert "CPUs needed" in said and "serving.generator.cpus" in said


def test_what_does_not_answer_is_named(desk: trade.Desk, tmp_path: Path) -> None:
    closed = f"http://127.0.0.1:{trade.free_port()}"
    for verb in (["index"], ["search", QUESTION], ["train"], ["check"]):
        options = [*verb, "--set", f"store.uri={closed}", "--set", "store.timeout_s=2"]
        if verb == ["check"]:
            assert closed in desk.run(*options).out
        else:
            assert closed in desk.fails(5, *options)
    missing = tmp_path / "model"
    assert str(missing) in desk.fails(3, "train", "--set", f"base.source={missing}")
    assert str(missing) in desk.fails(3, "index", "--set", f"embedder.source={missing}")
    assert "ray.address" in desk.fails(5, "train", "--set", f"ray.address=127.0.0.1:{trade.free_port()}")


def test_what_contradicts_is_refused(desk: trade.Desk, tmp_path: Path) -> None:
    assert "did you mean workers?" in desk.fails(2, "train", "--set", "training.worker=3")
    assert "knowledge.chunk_tokens (900)" in desk.fails(2, "index", "--set", "knowledge.chunk_tokens=900")
    (tmp_path / "rows.jsonl").write_text('{"id": "x", "messages": []}\n')
    assert "rows.jsonl:1: messages" in desk.fails(2, "train", "--set", f"data.train=[{tmp_path}/rows.jsonl]")

    config = trade.load(desk.config)
    base = trade.base_ref(config.base, trade.resolve(config.base, config.models_cache))
    files = trade.write_adapter(config, tmp_path / "adapter")
    trade.publish(config, files, "foreign", base=base.model_copy(update={"tokenizer": "0" * 16}))
    said = desk.fails(4, "release", "create", "--adapter", "foreign")
    assert "base.tokenizer is 0000000000000000 in the adapter" in said


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KB, which needs root and a kernel that lets us mount."""
    target = tmp_path / "disk"
    target.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", target], capture_output=True, text=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"no small file system to fill: {mounted.stderr.strip()}")
    yield target
    subprocess.run(["umount", target], check=True)


def test_a_full_disk_is_said_and_nothing_half_written_counts(
    desk: trade.Desk, tmp_path: Path, small_disk: Path
) -> None:
    config = trade.load(desk.config)
    files = trade.write_adapter(config, tmp_path / "large", rank=16)
    at = ["--set", f"storage.url={small_disk}"]
    assert "no space left" in desk.fails(6, "adapters", "add", str(files), "--name", "large", *at)
    assert desk.ok("adapters", "list", "--json", *at).json == []
    assert "free" in desk.fails(6, "models", "fetch", "--set", f"models_cache={small_disk}")
