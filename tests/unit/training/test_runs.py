"""Who has a run, how far it is, and who makes it stop: with real processes, on a directory.

Hosts other than this one are entries written by hand, and object stores are in ``tests/contract`` (the registry's log).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cluster.claim import LOST_S
from cluster.config import Config
from cluster.errors import BadInput, Mismatch, NotFound, Unavailable
from cluster.registry import Log
from cluster.release import BaseRef
from cluster.storage import Storage
from tests.trade import wait_for
from training import runs
from training.runs import Cancelled, claim, differences, facts_of, find, list_runs, read, read_log, request_cancel

FACTS = {"recipe": "a" * 64, "adapter": "lamps"}
ROUNDS = 30
DRIVER = """
import signal, sys
from cluster.storage import Storage
from training import runs
runs.TICK_S, runs.POLL_S, runs.BEAT_S = 0.05, 0.1, 0.2
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
with runs.claim(Storage(sys.argv[1]), sys.argv[2], {"recipe": "a" * 64, "adapter": "lamps"}) as run:
    run.state("training")
    print("claimed", flush=True)
    run.cancelled.wait(120)
    run.check_cancelled()
"""
RACER = """
import contextlib, sys, time
from cluster.errors import Mismatch
from cluster.storage import Storage
from training import runs
storage, begin, rounds = Storage(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
with contextlib.ExitStack() as held:
    for number in range(rounds):
        while time.time() < begin + 0.1 * number:
            pass
        try:
            held.enter_context(runs.claim(storage, f"race-{number}", {"recipe": "a" * 64, "adapter": "lamps"}))
            print(number, flush=True)
        except Mismatch:
            pass
    print("done", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "store"))


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "TICK_S", 0.02)
    monkeypatch.setattr(runs, "POLL_S", 0.04)
    monkeypatch.setattr(runs, "BEAT_S", 0.1)


@contextmanager
def driver(storage: Storage, name: str) -> Iterator[subprocess.Popen[str]]:
    """A process that has the run `name` and trains nothing."""
    command = [sys.executable, "-c", DRIVER, storage.url, name]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout and child.stderr
            assert child.stdout.readline() == "claimed\n", child.stderr.read()
            yield child
        finally:
            child.kill()


def foreign(storage: Storage, name: str, *, age: float, **facts: Any) -> None:
    """An attempt of a driver on another host, begun `age` seconds ago."""
    data = {
        "host": "elsewhere",
        "pids": 1,
        "pid": 7,
        "created": 1.0,
        "at": time.time() - age,
        "job": None,
        "claim": "x",
    }
    log = Log(storage, f"runs/{name}/attempts")
    log.append({**FACTS, **data, "attempt": log.head() + 1, **facts})


# -- one driver --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", ["nothing", "a dead driver"])
def test_of_drivers_that_start_at_once_exactly_one_has_the_run(storage: Storage, before: str) -> None:
    if before == "a dead driver":
        for number in range(ROUNDS):
            foreign(storage, f"race-{number}", age=LOST_S + 1)
    begin = time.time() + 3  # Python starts meanwhile
    command = [sys.executable, "-c", RACER, storage.url, str(begin), str(ROUNDS)]
    pipe = subprocess.PIPE
    racers = [subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) for _ in range(2)]
    try:
        won = [list(iter(lambda racer=racer: racer.stdout.readline().strip(), "done")) for racer in racers]  # type: ignore[misc]
    finally:
        for racer in racers:
            racer.communicate("\n", timeout=60)
    assert sorted(map(int, won[0] + won[1])) == list(range(ROUNDS)), "each run has one driver"
    attempts = 1 if before == "nothing" else 2
    assert {read(storage, f"race-{number}").attempt for number in range(ROUNDS)} == {attempts}


def test_a_run_with_a_living_driver_is_refused_and_a_dead_one_is_taken_over_at_once(storage: Storage) -> None:
    with driver(storage, "lamps-1") as child:
        running = read(storage, "lamps-1")
        assert running.state == "training" and runs.is_here(running)
        with pytest.raises(Mismatch) as refused, claim(storage, "lamps-1", FACTS):
            raise AssertionError("two drivers have one run")
        since = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(running.started))
        assert refused.value.message == (
            f"run lamps-1 is being trained by pid {child.pid} on {running.facts['host']} since {since}; wait for it, "
            "cancel it with `metier runs cancel lamps-1`, or set training.run to another name"
        )
        child.kill()
        child.wait()
        assert read(storage, "lamps-1").state == "lost"
        assert not runs.is_here(read(storage, "lamps-1"))
        with claim(storage, "lamps-1", FACTS) as run:
            assert run.attempt == 2
            assert read(storage, "lamps-1").facts["pid"] == os.getpid()
    assert read(storage, "lamps-1").state == "succeeded"


def test_a_driver_on_another_host_lives_as_long_as_its_heartbeat(storage: Storage) -> None:
    foreign(storage, "young", age=5)
    assert read(storage, "young").state == "preparing"
    with pytest.raises(Mismatch, match="trained by pid 7 on elsewhere"), claim(storage, "young", FACTS):
        pass

    foreign(storage, "old", age=1000)
    beat = {"attempt": 1, "state": "training", "heartbeat": time.time() - 5}
    storage.write("runs/old/state.json", json.dumps(beat).encode())
    assert read(storage, "old").state == "training", "it is its heartbeat that counts"
    storage.write("runs/old/state.json", json.dumps(beat | {"heartbeat": time.time() - LOST_S - 1}).encode())
    assert read(storage, "old").state == "lost"
    with claim(storage, "old", FACTS) as run:
        assert run.attempt == 2


def test_two_containers_with_one_host_name_are_two_hosts(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    with driver(storage, "lamps-1"):
        monkeypatch.setattr("cluster.claim.pid_namespace", lambda: 1)
        assert not runs.is_here(read(storage, "lamps-1"))
        with pytest.raises(Mismatch, match="is being trained"), claim(storage, "lamps-1", FACTS):
            pass


def test_a_name_that_was_used_for_another_recipe_is_refused(
    storage: Storage, make_config: Callable[..., Config]
) -> None:
    base = BaseRef(source="tiny:llama", dtype="float32", tokenizer="t", chat_template="c", architecture="a")
    first = facts_of(make_config("training.lora.rank=8"), recipe="1", base=base, dataset="d")
    second = facts_of(make_config(), recipe="2", base=base, dataset="e")
    with claim(storage, "mine", first):
        pass
    with pytest.raises(Mismatch) as refused, claim(storage, "mine", second):
        pass
    assert refused.value.message == (
        "run mine was begun with another recipe (training.lora.rank was 8 and is 16; the rows changed); "
        "set training.run to another name"
    )
    with claim(storage, "mine", first) as run:
        assert run.attempt == 2, "the same recipe goes on"


def test_a_driver_that_was_given_up_stops_and_writes_no_more(storage: Storage) -> None:
    with (
        pytest.raises(Mismatch, match="run lamps-1 was taken over by another driver"),
        claim(storage, "lamps-1", FACTS) as run,
    ):
        foreign(storage, "lamps-1", age=0)
        assert run.cancelled.wait(30)
        storage.write("runs/lamps-1/state.json", b'{"attempt": 2, "state": "training", "step": 9}')
        run.progress({"step": 3})
        run.check_cancelled()
    assert read(storage, "lamps-1").step == 9


# -- how far it is -----------------------------------------------------------------------------------------------


def test_a_run_says_how_far_it_is_and_how_it_ended(storage: Storage) -> None:
    with claim(storage, "lamps-1", FACTS) as run:
        assert read(storage, "lamps-1").state == "preparing"
        run.state("training")
        run.progress({"step": 3, "steps": 12, "loss": 2.5, "tokens_per_s": 80.0, "grad_norm": 1.0})
        run.progress({"step": 3, "validation_loss": 2.0})
        wait_for("the step", lambda: read(storage, "lamps-1").step == 3)
        now = read(storage, "lamps-1")
        assert (now.state, now.steps, now.loss, now.tokens_per_s) == ("training", 12, 2.5, 80.0)
        wait_for("a heartbeat", lambda: read(storage, "lamps-1").heartbeat > now.heartbeat)
        run.state("publishing")
        run.published("lamps@1")
    done = read(storage, "lamps-1")
    assert (done.state, done.adapter, done.error, done.step) == ("succeeded", "lamps@1", None, 3)
    assert done.ended is not None and done.started <= done.ended
    assert [(known.name, known.state) for known in list_runs(storage)] == [("lamps-1", "succeeded")]


@pytest.mark.parametrize(
    ("error", "state", "sentence"),
    [
        (Unavailable("Milvus does not answer; start it"), "failed", "Milvus does not answer; start it"),
        (ValueError("one\ntwo"), "failed", "ValueError: one"),
        (KeyboardInterrupt(), "cancelled", "interrupted"),
        (SystemExit(143), "cancelled", "terminated"),
    ],
)
def test_what_ended_a_run_is_recorded_and_raised(
    storage: Storage, error: BaseException, state: str, sentence: str
) -> None:
    with pytest.raises(type(error)), claim(storage, "lamps-1", FACTS):
        raise error
    assert (read(storage, "lamps-1").state, read(storage, "lamps-1").error) == (state, sentence)


def test_a_store_that_is_silent_for_a_moment_does_not_end_a_run(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused: list[str] = []
    write = Storage.write

    def out_of_order(self: Storage, path: str, data: bytes) -> None:
        if threading.current_thread().name == "metier-run" and len(refused) < 5:
            refused.append(path)
            raise Unavailable("no route")
        write(self, path, data)

    monkeypatch.setattr(Storage, "write", out_of_order)
    with claim(storage, "lamps-1", FACTS) as run:
        run.log("hello")
        run.progress({"step": 3})
        wait_for(
            "what was refused before", lambda: read(storage, "lamps-1").step == 3 and read_log(storage, "lamps-1")[1]
        )
    assert len(refused) == 5


def test_the_log_goes_on_over_attempts_and_keeps_its_newest_lines(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "LOG_LINES", 4)
    for attempt in (1, 2):
        with claim(storage, "lamps-1", FACTS) as run:
            for number in range(3):
                run.log(f"attempt {attempt} line {number}")
    dropped, lines = read_log(storage, "lamps-1")
    assert dropped == 2
    assert [line.partition(" ")[2] for line in lines] == [
        "attempt 1 line 2",
        *(f"attempt 2 line {n}" for n in range(3)),
    ]
    assert lines[0].startswith("20") and lines[0][19] == "Z"
    assert read_log(storage, "nothing") == (0, [])


# -- making it stop ----------------------------------------------------------------------------------------------


def test_a_cancelled_run_is_woken_and_a_later_attempt_is_not_meant(storage: Storage) -> None:
    called = threading.Event()
    with pytest.raises(Cancelled) as ended, claim(storage, "lamps-1", FACTS) as run:
        run.on_cancel = called.set
        run.check_cancelled()  # nobody has asked yet
        request_cancel(storage, read(storage, "lamps-1"))
        assert called.wait(30)
        raise Unavailable("the workers were ended under our feet")
    assert ended.value.message == "run lamps-1 was cancelled; the same command goes on from its last checkpoint"
    assert read(storage, "lamps-1").state == "cancelled"
    assert read(storage, "lamps-1").error == ended.value.message

    with claim(storage, "lamps-1", FACTS) as run:
        assert not run.cancelled.wait(10 * runs.POLL_S)
        request_cancel(storage, read(storage, "lamps-1"))
        assert run.cancelled.wait(30)
        with pytest.raises(Cancelled):
            run.check_cancelled()


def test_another_process_is_cancelled_through_storage(storage: Storage) -> None:
    with driver(storage, "lamps-1") as child:
        request_cancel(storage, read(storage, "lamps-1"))
        assert child.wait(60) != 0
        assert read(storage, "lamps-1").state == "cancelled"


def test_a_driver_that_died_after_it_was_cancelled_is_not_lost(storage: Storage) -> None:
    with driver(storage, "lamps-1") as child:
        os.kill(child.pid, signal.SIGSTOP)  # hung: it does not hear
        request_cancel(storage, read(storage, "lamps-1"))
        child.kill()
        child.wait()
    assert read(storage, "lamps-1").state == "cancelled"


# -- finding and telling apart -----------------------------------------------------------------------------------


def test_a_run_is_found_by_its_beginning_or_its_job(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lamps-aaa", "lamps-abb", "lamps-a"):
        foreign(storage, name, age=0)
    metadata = {"job_submission_id": "metier-train-1", "address": "http://head:8265"}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"metadata": metadata}))
    with claim(storage, "tools", FACTS):
        pass
    storage.write("runs/old-style/metrics.jsonl", b"")
    assert find(storage, "lamps-ab").name == "lamps-abb"
    assert find(storage, "lamps-a").name == "lamps-a", "the whole name is not a beginning"
    assert find(storage, "metier-train-1").name == "tools"
    assert find(storage, "tools").facts["address"] == "http://head:8265"
    with pytest.raises(BadInput, match="'lamps' is the beginning of several runs: lamps-a, lamps-aaa, lamps-abb"):
        find(storage, "lamps")
    with pytest.raises(NotFound, match="there is no run 'tolls'; did you mean tools"):
        find(storage, "tolls")
    with pytest.raises(NotFound, match="`metier runs list` shows what there is"):
        find(storage, "zzz")


def test_facts_hold_the_settings_without_secrets(make_config: Callable[..., Config]) -> None:
    config = make_config(
        "storage={url: 's3://me:hush@bucket/x', options: {key: hush, client_kwargs: {aws_secret: hush, region: eu}}}",
        "ray.runtime_env={env_vars: {HF: hush}, pip: [x]}",
        "store.uri=http://me:hush@milvus:19530",
        "training.workers=3",
    )
    base = BaseRef(source="o/n", revision="abc", dtype="float32", tokenizer="t", chat_template="c", architecture="a")
    facts = facts_of(config, recipe="r", base=base, dataset="d")
    assert "hush" not in json.dumps(facts)
    assert facts["config"]["storage"]["options"]["client_kwargs"]["region"] == "eu"
    assert facts["config"]["ray"]["runtime_env"]["pip"] == ["x"]
    assert facts["config"]["store"]["uri"] == "http://milvus:19530"
    assert (facts["base"], facts["workers"], facts["zero"]) == ("o/n@abc", 3, 2)


def test_differences_are_named_by_path() -> None:
    one = {"a": {"b": 1, "c": [1]}, "d": None, "e": {}}
    other = {"a": {"b": 2, "c": [1]}, "d": None, "e": 5, "f": 0}
    assert differences(one, other) == {"a.b": (1, 2), "e": ({}, 5), "f": (None, 0)}
    assert differences(one, one) == {}
