"""``--on``: verbs as jobs of a Ray cluster of its own, started as an operator would, with token authentication on."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests import trade

TOKEN = secrets.token_hex(16)
pytestmark = pytest.mark.timeout(600)
ENDLESS = ("--set", "training.max_steps=100000")
AUTH = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}


@pytest.fixture(scope="module")
def head() -> Iterator[str]:
    """The dashboard's address of a head node on loopback; ended by its process group, as `ray stop` goes by name."""
    dashboard = trade.free_port()
    ports = {
        name: trade.free_port()
        for name in ("port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port", "metrics-export-port")
    }
    directory = tempfile.mkdtemp(prefix="mr-")  # short: it holds Unix sockets
    bin_directory = str(Path(sys.executable).parent)
    environment = {
        **os.environ,
        **AUTH,
        "PATH": f"{bin_directory}:{os.environ['PATH']}",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    command = [f"{bin_directory}/ray", "start", "--head", "--block", "--num-cpus=2", f"--temp-dir={directory}"]
    command += ["--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
    command += ["--node-ip-address=127.0.0.1", *(f"--{name}={port}" for name, port in ports.items())]
    log = Path(directory, "start.log")
    with log.open("w") as sink:
        started = subprocess.Popen(command, env=environment, stdout=sink, stderr=sink, start_new_session=True)
    address = f"http://127.0.0.1:{dashboard}"
    try:
        trade.wait_for("the dashboard", lambda: answers(address) or started.poll() is not None, 120)
        assert started.poll() is None, log.read_text()
        yield address
    finally:
        members = trade.family(started.pid)
        os.killpg(started.pid, signal.SIGKILL)
        started.wait()
        trade.assert_gone(members)
        shutil.rmtree(directory, ignore_errors=True)


def answers(address: str) -> bool:
    try:
        headers = {"Authorization": f"Bearer {TOKEN}"}
        return httpx.get(f"{address}/api/version", headers=headers, timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def test_verbs_run_as_jobs_of_a_cluster_that_asks_for_its_token(head: str, tmp_path: Path) -> None:
    config = trade.write_config(tmp_path)
    at = ["--on", head]

    with trade.desk(config, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="0" * 32) as stranger:
        assert "token" in stranger.fails(5, "index", *at)
    assert trade.registry(trade.load(config)).knowledge_head("lamps") == 0

    with trade.desk(config, **AUTH) as desk:
        indexed = desk.ok("index", *at)
        assert indexed.err.startswith("job metier-index-") and f" is submitted to {head}\n" in indexed.err
        assert "knowledge lamps v1: 8 documents" in indexed.out, "the job's log is followed to its end"
        failed = desk.fails(5, "index", *at, "--set", "knowledge.documents=/nowhere")
        assert "ended as failed" in failed


@pytest.mark.e2e
def test_training_as_a_job_uses_the_cluster_it_runs_on(head: str, tmp_path: Path) -> None:
    with trade.desk(trade.write_config(tmp_path), **AUTH) as desk:
        desk.ok("index")
        trained = desk.ok("train", "--on", head, "--set", "training.max_steps=2")
        assert "adapter lamps@1" in trained.out
        assert [adapter["version"] for adapter in desk.ok("adapters", "list", "--json").json] == [1]


@pytest.mark.fault
def test_a_job_goes_on_without_its_terminal_until_it_is_cancelled(head: str, tmp_path: Path) -> None:
    with trade.desk(trade.write_config(tmp_path), **AUTH) as desk:
        desk.ok("index")
        log = tmp_path / "log"
        child = desk.start("train", "--on", head, *ENDLESS, log=log)
        trade.wait_for("the run", lambda: "run lamps-" in log.read_text() or child.poll() is not None, 240)
        assert child.poll() is None, log.read_text()
        child.kill()
        child.wait()
        job = log.read_text().removeprefix("job ").split()[0]

        def run() -> Any:
            return next(run for run in desk.ok("runs", "list", "--on", head, "--json").json if run["job"] == job)

        seen = run()["heartbeat"]
        trade.wait_for("a heartbeat without the terminal", lambda: run()["heartbeat"] > seen, 240)
        assert run()["state"] == "training"
        shown = desk.ok("runs", "show", job, "--json").json
        driver = psutil.Process(shown["facts"]["pid"])
        assert "metier train --config" in trade.command_line(driver)
        assert f"run {shown['name']}: " in desk.ok("runs", "logs", job).out, "the run knows where it was submitted"

        assert desk.ok("runs", "cancel", job, "--json").json == {"name": shown["name"], "state": "cancelled"}
        trade.assert_gone([driver])
        assert "is over already: cancelled" in desk.ok("runs", "cancel", shown["name"]).err


def test_an_address_without_a_job_server_is_named(tmp_path: Path) -> None:
    address = f"http://127.0.0.1:{trade.free_port()}"
    with trade.desk(trade.write_config(tmp_path)) as desk:
        said = desk.fails(5, "index", "--on", address)
    assert address in said and "--on wants the address of the dashboard" in said
