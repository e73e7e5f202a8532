"""The embedded profile: one milvus-lite server per data directory, started by whoever needs it first.

``server.json`` in the data directory says where it listens; a second metier process reads it and uses the same
server. The server lives as long as somebody uses it, and no longer, however its users end: see
:mod:`retrieval.milvus_child`. A server that dies while in use is started again on its port by one of its users, and
what was written is there: milvus-lite logs it before it answers. One machine only, and not Windows. Not covered: a
server that hangs.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from cluster.config import StoreConfig
from cluster.errors import Unavailable
from cluster.processes import runs

log = logging.getLogger(__name__)

EMBEDDED = "embedded"
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 10.0
WATCH_S = 0.5
"""How often each user looks whether the server is there; longer after each death, up to LONGEST_WATCH_S."""
LONGEST_WATCH_S = 30.0
CHILD = Path(__file__).with_name("milvus_child.py")


@dataclass(frozen=True)
class Server:
    """A running server, as ``server.json`` states it."""

    pid: int
    created: float
    """Start of the process in seconds since the epoch: a pid alone may have been given to another."""
    port: int

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def runs(self) -> bool:
        """Whether the process is there and may still hold its files."""
        return runs(self.pid, self.created)

    def stop(self) -> None:
        """End the process and wait until it has; by force if it does not go."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            if not self.runs():
                return
            deadline = time.monotonic() + STOP_TIMEOUT_S
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)
            while self.runs() and time.monotonic() < deadline:
                time.sleep(0.02)


@contextmanager
def serve(config: StoreConfig) -> Iterator[str]:
    """The URI of the store, with the embedded server running behind it for the length of the ``with`` block.

    A ``store.uri`` other than ``embedded`` is passed on as it is.

    Raises:
        Unavailable: the server does not start; the sentence ends with the last line of its log.
    """
    if config.uri != EMBEDDED:
        yield config.uri
        return
    data_dir = Path(config.data_dir)
    data_dir.mkdir(parents=True, exist_ok=True)
    with (data_dir / "server.users").open("a+b") as users:
        with _starting(data_dir):
            fcntl.flock(users, fcntl.LOCK_SH)
            server = running(data_dir) or _start(data_dir, users.name)
        left = threading.Event()
        keeper = threading.Thread(
            target=_keep, args=(data_dir, users.name, server.port, left), name="milvus-keeper", daemon=True
        )
        keeper.start()
        try:
            yield server.uri
        finally:
            left.set()
            keeper.join()
            with _starting(data_dir):
                _leave(users.fileno(), data_dir)


def running(data_dir: str | Path) -> Server | None:
    """The server of `data_dir`, if one runs."""
    try:
        server = Server(**json.loads(_state(Path(data_dir)).read_text()))
    except FileNotFoundError:
        return None
    return server if server.runs() else None


def _keep(data_dir: Path, users_file: str, port: int, left: threading.Event) -> None:
    """Until we have `left`: start the server anew on `port` when it has died."""
    pause = WATCH_S
    while not left.wait(pause):
        if running(data_dir):
            pause = WATCH_S
            continue
        pause = min(2 * pause, LONGEST_WATCH_S)  # if it dies again at once, or cannot be started
        try:
            with _starting(data_dir):
                if not running(data_dir):
                    _start(data_dir, users_file, port)
                    log.warning("the embedded Milvus server for %s died and was started again", data_dir)
        except Unavailable as error:
            log.error("%s", error)


def _start(data_dir: Path, users_file: str, port: int = 0) -> Server:
    log_file = data_dir / "server.log"
    with log_file.open("wb") as log:
        child = subprocess.Popen(
            [sys.executable, "-P", str(CHILD), str(data_dir), users_file, str(port)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,  # Ctrl-C in the terminal is for us; we stop the server when we are done
        )
    # It may outlive our interest in it, for another user; whoever ends it, it is reaped.
    threading.Thread(target=child.wait, name="milvus-reaper", daemon=True).start()
    assert child.stdout is not None
    with child.stdout as stdout:
        ready, _, _ = select.select([stdout], [], [], START_TIMEOUT_S)
        bound = stdout.readline().strip() if ready else b""
    if not bound:
        child.kill()
        child.wait()
        lines = log_file.read_text(errors="replace").splitlines() or ["no message"]
        raise Unavailable(f"the embedded Milvus server for {data_dir} did not start: {lines[-1]} (see {log_file})")
    server = Server(child.pid, psutil.Process(child.pid).create_time(), int(bound))
    written = _state(data_dir).with_suffix(".new")
    written.write_text(json.dumps(asdict(server)))
    written.replace(_state(data_dir))
    return server


def _leave(users: int, data_dir: Path) -> None:
    """Stop the server if nobody else uses it."""
    try:
        fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    if server := running(data_dir):
        server.stop()
    _state(data_dir).unlink(missing_ok=True)


@contextmanager
def _starting(data_dir: Path) -> Iterator[None]:
    """One process at a time decides whether a server starts or stops."""
    try:
        with FileLock(data_dir / "server.lock", timeout=START_TIMEOUT_S + STOP_TIMEOUT_S):
            yield
    except Timeout:
        raise Unavailable(f"another process has been starting a Milvus server in {data_dir} for too long") from None


def _state(data_dir: Path) -> Path:
    return data_dir / "server.json"
