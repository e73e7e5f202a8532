"""The note that `metier up` leaves: found while its process lives, removed when it does not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable

import psutil

from cluster.config import Config
from metier import process


def test_own_note_is_found(make_config: Callable[..., Config]) -> None:
    config = make_config()
    process.write(config, "http://127.0.0.1:8000")
    found = process.read(config)
    assert found is not None
    assert (found.pid, found.url) == (os.getpid(), "http://127.0.0.1:8000")


def test_note_of_a_dead_or_other_process_is_removed(make_config: Callable[..., Config]) -> None:
    config = make_config()
    process.write(config, "http://127.0.0.1:8000")
    file = process.state_file(config)
    note = json.loads(file.read_text())
    file.write_text(json.dumps(note | {"created": note["created"] - 5}))  # the pid was given to another
    assert process.read(config) is None
    assert not file.exists()


def test_half_written_note_is_removed(make_config: Callable[..., Config]) -> None:
    config = make_config()
    process.write(config, "http://127.0.0.1:8000")
    process.state_file(config).write_text('{"pid": 1')
    assert process.read(config) is None


def test_stop_kills_what_does_not_end() -> None:
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(60)"
    for program, by_itself in (("import time; print(flush=True); time.sleep(60)", True), (deaf, False)):
        child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
        assert child.stdout is not None
        with child.stdout as stdout:
            stdout.readline()
        up = process.Up(child.pid, psutil.Process(child.pid).create_time(), "")
        assert process.stop(up, patience_s=1.0) is by_itself
        child.wait()
        assert not up.alive
