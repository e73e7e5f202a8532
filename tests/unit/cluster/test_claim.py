"""One living process at a time: claims on a real directory, against processes that live, died, or are far away."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from cluster import claim as claims
from cluster.claim import LOST_S, claim
from cluster.errors import Mismatch
from cluster.storage import Storage

WHAT = "knowledge 'a'"


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "storage"))


def held_elsewhere(storage: Storage, number: int, age: float, ended: bool = False) -> None:
    """A claim of a process on another host, whose last heartbeat is `age` seconds old."""
    at = time.time() - age
    note = {"id": "x", "at": at, "doing": "an ingest", "host": "elsewhere", "pids": 0, "pid": 12, "created": 1.0}
    storage.create(f"w/{number:06}.json", json.dumps(note).encode())
    storage.write(f"w/{number:06}.beat", json.dumps({"at": at, "ended": ended}).encode())


def test_a_second_is_refused_until_the_first_has_ended(storage: Storage) -> None:
    with claim(storage, "w", WHAT, "an ingest") as held:
        with pytest.raises(
            Mismatch, match=r"is being written by this process on .* since 20.* UTC \(an ingest\); wait"
        ):
            claim(storage, "w", WHAT, "another").__enter__()
        held.check()
    with claim(storage, "w", WHAT, "another"):
        assert [name for name in storage.list("w") if name.endswith(".json")] == ["000002.json"], (
            "the first is tidied away"
        )


def test_an_error_in_the_body_ends_the_claim(storage: Storage) -> None:
    with pytest.raises(KeyboardInterrupt), claim(storage, "w", WHAT, "an ingest"):
        raise KeyboardInterrupt
    with claim(storage, "w", WHAT, "another"):
        pass


def test_a_killed_process_is_taken_over_at_once(storage: Storage, tmp_path: Path) -> None:
    code = f"""
import time
from pathlib import Path
from cluster.claim import claim
from cluster.storage import Storage
with claim(Storage({storage.root!r}), "w", "x", "an ingest"):
    print("held", flush=True)
    time.sleep(600)
"""
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=Path(__file__).parents[3])
    assert child.stdout is not None and child.stdout.readline() == b"held\n"
    with pytest.raises(Mismatch, match=f"by pid {child.pid} on"):
        claim(storage, "w", WHAT, "another").__enter__()
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()
    with claim(storage, "w", WHAT, "another"):
        pass


def test_another_host_has_it_as_long_as_its_heart_beats(storage: Storage) -> None:
    held_elsewhere(storage, 1, age=LOST_S - 5)
    with pytest.raises(Mismatch, match="by pid 12 on elsewhere since"):
        claim(storage, "w", WHAT, "an ingest").__enter__()
    storage.delete("w")
    held_elsewhere(storage, 1, age=LOST_S + 1)
    with claim(storage, "w", WHAT, "an ingest"):
        pass
    storage.delete("w")
    held_elsewhere(storage, 1, age=0, ended=True)
    with claim(storage, "w", WHAT, "an ingest"):
        pass


def test_the_heart_beats(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "BEAT_S", 0.01)
    with claim(storage, "w", WHAT, "an ingest"):
        first = json.loads(storage.read("w/000001.beat"))["at"]
        deadline = time.monotonic() + 60
        while json.loads(storage.read("w/000001.beat"))["at"] == first:
            assert time.monotonic() < deadline
    assert json.loads(storage.read("w/000001.beat"))["ended"] is True


def test_who_was_taken_over_is_told(storage: Storage) -> None:
    with claim(storage, "w", WHAT, "an ingest") as held:
        held_elsewhere(storage, 2, age=0)
        with pytest.raises(Mismatch, match=r"took knowledge 'a' over, because this one gave no sign of life for 60 s"):
            held.check()


def test_of_many_at_once_one_has_it(storage: Storage) -> None:
    inside, most, got = 0, 0, 0
    lock = threading.Lock()

    def try_() -> None:
        nonlocal inside, most, got
        for _ in range(10):
            try:
                with claim(storage, "w", WHAT, "an ingest"):
                    with lock:
                        inside += 1
                        most, got = max(most, inside), got + 1
                    with lock:
                        inside -= 1
            except Mismatch:
                pass

    threads = [threading.Thread(target=try_) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1 and got > 0
