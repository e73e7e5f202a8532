"""The process of ``metier up`` on this machine: where it notes itself, and whether it still lives."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from cluster.config import Config
from cluster.processes import runs

STOP_SECONDS = 60.0


@dataclass(frozen=True)
class Up:
    """What a running ``metier up`` says of itself."""

    pid: int
    created: float
    """Start time of the process (seconds since the epoch), so that a reused pid is not taken for it."""
    url: str

    @property
    def alive(self) -> bool:
        return runs(self.pid, self.created)


def state_file(config: Config) -> Path:
    """Where ``metier up`` of `config` notes itself."""
    return Path(config.state_dir) / f"{config.name}.json"


def log_file(config: Config) -> Path:
    """Where a detached ``metier up`` writes."""
    return Path(config.state_dir) / f"{config.name}.log"


def write(config: Config, url: str) -> None:
    """Note this process; by rename, so that a reader sees all of it or none."""
    file = state_file(config)
    file.parent.mkdir(parents=True, exist_ok=True)
    up = Up(os.getpid(), psutil.Process().create_time(), url)
    temporary = file.with_suffix(f".{up.pid}")
    temporary.write_text(json.dumps(asdict(up)))
    temporary.replace(file)


def forget(config: Config) -> None:
    """Remove the note of this process; that of another one, which came first, stays."""
    if (up := read(config)) and up.pid == os.getpid():
        state_file(config).unlink(missing_ok=True)


def read(config: Config) -> Up | None:
    """The living ``metier up`` of `config`; a note left by a killed one is removed."""
    file = state_file(config)
    try:
        up = Up(**json.loads(file.read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        file.unlink(missing_ok=True)
        return None
    if up.alive:
        return up
    file.unlink(missing_ok=True)
    return None


def stop(up: Up, patience_s: float = STOP_SECONDS) -> bool:
    """Ask `up` to end, wait `patience_s`, and kill it if it has not; True if it went by itself."""
    os.kill(up.pid, signal.SIGTERM)
    deadline = time.monotonic() + patience_s
    while up.alive and time.monotonic() < deadline:
        time.sleep(0.1)
    if not up.alive:
        return True
    os.kill(up.pid, signal.SIGKILL)
    return False
