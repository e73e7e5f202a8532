"""``metier runs`` in process: what is listed, shown, followed, cancelled and compared.

Drivers are this process and small children. The dashboard is a web server that answers as Ray's does, so that it can
be made to stop in the middle; ``tests/ray/test_submit.py`` asks a real one.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

import metier.runs
from cluster import jobs
from cluster.config import Config, load
from cluster.errors import MetierError, Unavailable
from cluster.release import BaseRef
from cluster.storage import Storage
from tests import trade
from tests.trade import Ran, wait_for
from training import runs
from training.history import History

BASE = BaseRef(source="tiny:llama", dtype="float32", tokenizer="t", chat_template="c", architecture="a")
DEAF = """
import sys, time
from cluster.storage import Storage
from training import runs
runs.POLL_S = 1e9
with runs.claim(Storage(sys.argv[1]), sys.argv[2], {"recipe": "r", "adapter": "lamps"}):
    print("claimed", flush=True)
    time.sleep(120)
"""


class Terminal:
    """``terminal("list", …)``: ``metier runs list`` with a configuration in a directory of its own."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.file = directory / "metier.yaml"
        self.file.write_text(
            yaml.safe_dump({"storage": {"url": str(directory / "store")}, "base": {"dtype": "float32"}})
        )
        self.config = load(self.file, environ={})
        self.storage = Storage.of(self.config.storage)
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, *verb: object, group: str | None = "runs") -> Ran:
        groups = [group] if group else []
        return trade.verb(self.monkeypatch, self.capsys, *groups, *verb, "-c", self.file, width=200)

    def train(self, name: str, *overrides: str, slope: float = 0.1, ref: str = "lamps@1") -> None:
        """A run of `name` that was trained for ten steps and published."""
        config = load(self.file, ["training.adapter=lamps", *overrides], environ={})
        with runs.claim(self.storage, name, facts(config)) as run:
            history = History(self.storage, name)
            for step in range(1, 11):
                event = {"step": step, "steps": 10, "loss": 3 - slope * step, "seconds": step / 2, "tokens_per_s": 80.0}
                history.add(event)
                run.progress(event)
            history.add({"step": 10, "validation_loss": 2.5})
            history.save()
            run.log("run is published")
            run.published(ref)


def facts(config: Config, recipe: str = "r") -> dict[str, Any]:
    return runs.facts_of(config, recipe=recipe, base=BASE, dataset="d" * 64)


@pytest.fixture
def terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Terminal:
    for name, seconds in (("TICK_S", 0.02), ("POLL_S", 0.04), ("BEAT_S", 0.1)):
        monkeypatch.setattr(runs, name, seconds)
    monkeypatch.setattr(metier.runs, "POLL_S", 0.05)
    return Terminal(tmp_path, monkeypatch, capsys)


# -- list and show -----------------------------------------------------------------------------------------------


def test_list_of_nothing_and_of_runs(terminal: Terminal) -> None:
    assert terminal("list", "--json").json == []
    terminal.train("lamps-a")
    with suppress(MetierError), runs.claim(terminal.storage, "lamps-b", {"recipe": "r", "adapter": "lamps"}):
        raise Unavailable("no Milvus")
    listed = terminal("list", "--json").json
    assert [(run["name"], run["state"], run["published"]) for run in listed] == [
        ("lamps-a", "succeeded", "lamps@1"),
        ("lamps-b", "failed", None),
    ]
    assert listed[1]["error"] == "no Milvus"
    lines = terminal("list").out.splitlines()
    assert lines[0].split() == ["run", "state", "step", "loss", "tokens/s", "adapter", "started", "(UTC)", "age"]
    assert lines[1].split()[:6] == ["lamps-a", "succeeded", "10/10", "2.000", "80", "lamps@1"]
    assert lines[2].split()[:6] == ["lamps-b", "failed", "-", "-", "-", "lamps"]


def test_show_has_facts_what_is_no_default_and_losses(terminal: Terminal) -> None:
    terminal.train("lamps-a", "training.lora.rank=8")
    shown = terminal("show", "lamps", "--json").json
    assert shown["changed"]["training.lora.rank"] == [16, 8]
    assert "training.lora.alpha" not in shown["changed"]
    assert (shown["results"]["loss_last"], shown["results"]["validation_last"]) == (2.0, 2.5)
    assert len(shown["events"]) == 11
    ran = terminal("show", "lamps-a")
    assert ["training.lora.rank", "8", "16"] in [line.split() for line in ran.out.splitlines()]
    assert ["published", "lamps@1"] in [line.split() for line in ran.out.splitlines()]
    assert "2.9000 -> 2.0000" in ran.err and "validation loss 2.5000 at 10" in ran.err


def test_a_name_that_is_none_says_what_is_near(terminal: Terminal) -> None:
    terminal.train("lamps-a")
    for verb in ("show", "logs", "cancel"):
        ran = terminal(verb, "lumps-a")
        assert ran.code == 3 and "there is no run 'lumps-a'; did you mean lamps-a?" in ran.err


# -- logs --------------------------------------------------------------------------------------------------------


def test_logs_are_followed_to_the_end_of_the_run(terminal: Terminal) -> None:
    with runs.claim(terminal.storage, "lamps-a", facts(terminal.config)) as run:
        run.log("first")
        wait_for("the line", lambda: runs.read_log(terminal.storage, "lamps-a")[1])
        assert terminal("logs", "lamps-a").out.endswith("Z first\n")
    later = threading.Thread(target=_talk, args=(terminal.storage, terminal.config))
    later.start()
    wait_for("the second attempt", lambda: not runs.read(terminal.storage, "lamps-a").is_over)
    ran = terminal("logs", "lamps-a", "--follow")
    later.join()
    assert [line.partition(" ")[2] for line in ran.out.splitlines()] == ["first", *(f"line {n}" for n in range(20))]
    assert terminal("logs", "lamps-a", "--json").json["lines"] == ran.out.splitlines()
    assert terminal("logs", "lamps-a", "--follow", "--json").code == 2


def _talk(storage: Storage, config: Config) -> None:
    with runs.claim(storage, "lamps-a", facts(config)) as run:
        for number in range(20):
            run.log(f"line {number}")
            time.sleep(0.05)


# -- cancel ------------------------------------------------------------------------------------------------------


def test_cancel_waits_for_the_driver_and_says_so_again(terminal: Terminal) -> None:
    driver = threading.Thread(target=_until_cancelled, args=(terminal.storage, terminal.config))
    driver.start()
    wait_for("the run", lambda: terminal.storage.exists("runs/lamps-a/state.json"))
    ran = terminal("cancel", "lamps-a")
    driver.join()
    assert (ran.code, ran.err.strip()) == (0, "run lamps-a is over: cancelled")
    again = terminal("cancel", "lamps-a")
    assert (again.code, again.err.strip()) == (0, "run lamps-a is over already: cancelled")
    assert terminal("cancel", "lamps-a", "--json").json == {"name": "lamps-a", "state": "cancelled"}


def _until_cancelled(storage: Storage, config: Config) -> None:
    with suppress(runs.Cancelled), runs.claim(storage, "lamps-a", facts(config)) as run:
        run.cancelled.wait(60)
        run.check_cancelled()


def test_a_driver_that_does_not_hear_gets_a_signal(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metier.runs, "GRACE_S", 0.2)
    command = [sys.executable, "-c", DEAF, terminal.storage.url, "lamps-a"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout and child.stdout.readline() == "claimed\n"
            os.kill(child.pid, signal.SIGSTOP)
            ran = terminal("cancel", "lamps-a", "--wait", "1")
            assert ran.code == 5
            assert f"has not stopped in 1 s although process {child.pid} was sent SIGTERM; it stays asked to" in ran.err
            os.kill(child.pid, signal.SIGCONT)
            assert child.wait(60) == -signal.SIGTERM
        finally:
            child.kill()
    assert terminal("list", "--json").json[0]["state"] == "cancelled"


# -- compare -----------------------------------------------------------------------------------------------------


def test_compare_shows_what_differs_and_what_came_out(terminal: Terminal, tmp_path: Path) -> None:
    terminal.train("lamps-a", "training.lora.rank=8")
    terminal.train("tools-b", "training.learning_rate=0.001", slope=0.2)
    picture = tmp_path / "both.png"
    compared = terminal("compare", "lamps", "tools", "--plot", picture, "--json").json
    assert compared["changed"] == {"training.lora.rank": [8, 16], "training.learning_rate": [0.0005, 0.001]}
    assert [result["loss_last"] for result in compared["results"]] == [2.0, 1.0]
    assert picture.read_bytes().startswith(b"\x89PNG")
    rows = [line.split() for line in terminal("compare", "lamps", "tools").out.splitlines()]
    assert ["training.lora.rank", "8", "16"] in rows
    assert ["final", "loss", "2", "1"] in rows
    assert ["best", "validation", "loss", "2.5", "2.5"] in rows
    assert terminal("compare", "lamps").code == 2


# -- jobs --------------------------------------------------------------------------------------------------------


class Dashboard(ThreadingHTTPServer):
    """Ray's job server, as far as its client asks: jobs by id, each with status, metadata and log."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.jobs: dict[str, dict[str, Any]] = {}
        self.asked: list[str] = []
        self.address = f"http://127.0.0.1:{self.server_port}"

    def add(self, job: str, status: str, verb: str = "train", log: str = "") -> None:
        self.jobs[job] = {
            "type": "SUBMISSION",
            "submission_id": job,
            "status": status,
            "entrypoint": f"metier {verb}",
            "start_time": 1000,
            "metadata": {"metier": verb, "adapter": "lamps"} if verb else {},
            "log": log,
        }

    def go_away(self) -> None:
        self.shutdown()
        self.server_close()


class Answer(BaseHTTPRequestHandler):
    server: Dashboard

    def log_message(self, *_: object) -> None:
        return

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        self.server.asked.append(f"{self.command} {self.path}")
        parts = self.path.strip("/").split("/")
        known = self.server.jobs
        if parts[:2] == ["api", "version"]:
            return self._say({"version": "4", "ray_version": "2.60.0", "ray_commit": ""})
        if len(parts) == 2:
            return self._say([{k: v for k, v in job.items() if k != "log"} for job in known.values()])
        job = known.get(parts[2])
        if job is None:
            return self._say(f"Job {parts[2]} does not exist", 404)
        if parts[3:] == ["logs"]:
            return self._say({"logs": job["log"]})
        if parts[3:] == ["stop"]:
            running = job["status"] == "RUNNING"
            job["status"] = "STOPPED" if running else job["status"]
            return self._say({"stopped": running})
        return self._say({k: v for k, v in job.items() if k != "log"})

    def _say(self, value: Any, code: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def dashboard(monkeypatch: pytest.MonkeyPatch) -> Iterator[Dashboard]:
    monkeypatch.setattr(jobs, "POLL_S", 0.05)
    made = Dashboard()
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield made
    made.go_away()
    thread.join()


def test_jobs_without_a_run_are_listed_logged_and_stopped(terminal: Terminal, dashboard: Dashboard) -> None:
    dashboard.add("metier-train-1", "RUNNING", log="preparing\n")
    dashboard.add("metier-train-2", "SUCCEEDED")
    dashboard.add("metier-index-3", "RUNNING", verb="index")
    dashboard.add("somebody-else", "RUNNING", verb="")
    at = ("--on", dashboard.address)
    listed = terminal("list", "--json", *at).json
    assert [(run["name"], run["state"], run["adapter"]) for run in listed] == [("metier-train-1", "running", "lamps")]
    assert terminal("list", "--json").json == []
    assert terminal("list", "--json", "-s", f"ray.address={dashboard.address}").json == listed
    assert terminal("logs", "metier-train-1", *at).out == "preparing\n"

    stopped = terminal("cancel", "metier-train-1", *at)
    assert (stopped.code, stopped.err.strip()) == (0, "job metier-train-1 is over: stopped")
    assert "is over already: stopped" in terminal("cancel", "metier-train-1", *at).err
    assert dashboard.jobs["metier-index-3"]["status"] == "RUNNING"


def test_a_run_that_was_a_job_is_shown_once_and_its_log_is_the_jobs(
    terminal: Terminal, dashboard: Dashboard, monkeypatch: pytest.MonkeyPatch
) -> None:
    dashboard.add("metier-train-1", "FAILED", log="from ray\n")
    metadata = {"job_submission_id": "metier-train-1", "address": dashboard.address}
    monkeypatch.setenv(jobs.ENVIRONMENT, json.dumps({"metadata": metadata}))
    terminal.train("lamps-a")
    assert [run["job"] for run in terminal("list", "--json", "--on", dashboard.address).json] == ["metier-train-1"]
    assert terminal("logs", "lamps-a").out == "from ray\n"
    assert terminal("logs", "metier-train-1", "--follow").out == "from ray\n"
    dashboard.jobs.clear()  # the cluster was started anew
    ran = terminal("logs", "lamps-a")
    assert ran.out.endswith("run is published\n") and "has no job 'metier-train-1'" in ran.err


def test_a_dashboard_that_dies_is_said_and_so_is_that_the_job_may_go_on(
    terminal: Terminal, dashboard: Dashboard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "PATIENCE_S", 0.3)
    dashboard.add("metier-train-1", "RUNNING", log="step 1\n")

    def die(text: str) -> None:
        seen.append(text)
        dashboard.go_away()

    seen: list[str] = []
    with pytest.raises(Unavailable) as lost:
        jobs.follow(dashboard.address, "metier-train-1", die)
    assert seen == ["step 1\n"]
    assert lost.value.message == (
        f"the Ray job server at {dashboard.address} stopped answering; job metier-train-1 may go on, and "
        f"`metier runs logs metier-train-1 --on {dashboard.address} --follow` shows it when the server is back"
    )
    ran = terminal("list", "--on", dashboard.address)
    assert ran.code == 5 and f"no Ray job server answers at {dashboard.address}" in ran.err
    quiet = terminal("list", "-s", f"ray.address={dashboard.address}")
    assert quiet.code == 0 and "jobs of that cluster are not shown" in quiet.err


def test_a_dashboard_that_is_silent_for_a_moment_is_waited_for(
    dashboard: Dashboard, monkeypatch: pytest.MonkeyPatch
) -> None:
    dashboard.add("metier-train-1", "RUNNING", log="step 1\n")
    job = dashboard.jobs["metier-train-1"]
    failures = iter([500, 500])
    say = Answer._say

    def sometimes(self: Answer, value: Any, code: int = 200) -> None:
        say(self, value, next(failures, 200) if self.path.endswith("/logs") else code)

    monkeypatch.setattr(Answer, "_say", sometimes)
    seen: list[str] = []

    def on_log(text: str) -> None:
        seen.append(text)
        job.update(status="SUCCEEDED", log="step 1\nstep 2\n")

    assert jobs.follow(dashboard.address, "metier-train-1", on_log) == "succeeded"
    assert seen == ["step 1\n", "step 2\n"]
    assert next(failures, None) is None, "it did not answer twice"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_whatever_ends_the_terminal_the_job_goes_on_and_is_named(
    terminal: Terminal, dashboard: Dashboard, number: signal.Signals, code: int
) -> None:
    dashboard.add("metier-train-1", "RUNNING", log="step 1\n")
    with trade.desk(terminal.file) as desk:
        child = desk.start("runs", "logs", "metier-train-1", "--follow", "--on", dashboard.address)
        assert child.stdout and child.stdout.readline() == "step 1\n"
        child.send_signal(number)
        _, err = child.communicate(timeout=60)
    assert child.returncode == code
    assert err.startswith(
        f"job metier-train-1 goes on; `metier runs logs metier-train-1 --on {dashboard.address} --follow` shows it, "
        f"`metier runs cancel metier-train-1 --on {dashboard.address}` ends it\n"
    )
    assert not any(asked.endswith("/stop") for asked in dashboard.asked)
    assert dashboard.jobs["metier-train-1"]["status"] == "RUNNING"


def test_what_on_cannot_be_is_refused(terminal: Terminal, tmp_path: Path) -> None:
    ran = terminal("list", "--on", "head:8265")
    assert (
        ran.code == 2 and "'head:8265' is not the address of a Ray dashboard; write it as http://head:8265" in ran.err
    )
    for verb in ("train", "index"):
        ran = terminal(verb, "--detach", group=None)
        assert ran.code == 2 and "--detach needs --on" in ran.err
    rows = tmp_path / "rows.jsonl"
    rows.write_text("")
    ran = terminal("eval", "--on", "http://head:8265", "-o", "x", "-s", f"data.heldout=[{rows}]", group=None)
    assert ran.code == 2 and "leave it out" in ran.err
