"""Who works on a thing in storage, and whether they are still there: one living process at a time may have it.

A claim on ``PATH`` is a file ``PATH/000001.json``, ``000002.json``, …, each created exclusively: of two processes that
ask at once one has it. Beside it the holder renews ``.beat``, and says there that it is done. A process that ended
without a word is taken over: at once on its own host, elsewhere when its last heartbeat is older than :data:`LOST_S`
(clocks may differ by much less). Training runs keep more than that beside theirs (:mod:`training.runs`) and share
what decides about life and death.

Not covered: fencing off a holder that was silent for so long and comes back; it asks :meth:`Claim.check` before it
makes anything visible.
"""

from __future__ import annotations

import json
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from cluster import processes
from cluster.errors import MetierError, Mismatch, NotFound
from cluster.storage import Storage

BEAT_S = 5.0
"""Between heartbeats."""
LOST_S = 60.0
"""A holder on another host is given up when its last heartbeat is older."""


def me() -> dict[str, Any]:
    """What tells this process from every other: host, process and when it began."""
    process = psutil.Process()
    return {
        "host": socket.gethostname(),
        "pids": pid_namespace(),
        "pid": process.pid,
        "created": process.create_time(),
    }


def lives(holder: Mapping[str, Any], heartbeat: float) -> bool:
    """Whether the process that :func:`me` described as `holder` is still there, as far as can be seen from here."""
    if is_same_host(holder):
        return processes.runs(holder["pid"], holder["created"])
    return time.time() - heartbeat < LOST_S


def is_same_host(holder: Mapping[str, Any]) -> bool:
    """Whether `holder` is a process whose id means the same here."""
    return bool(holder["host"] == socket.gethostname() and holder["pids"] == pid_namespace())


def pid_namespace() -> int:
    """Which process ids mean the same: two containers may share a host name and count from 1 each."""
    try:
        return Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        return 0


class Claim:
    """A claim that this process holds."""

    def __init__(self, storage: Storage, path: str, number: int, what: str) -> None:
        self._storage, self._path, self._number, self._what = storage, path, number, what
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="metier-claim", daemon=True)

    def check(self) -> None:
        """Whether it is still ours; silent if so.

        Raises:
            Mismatch: this process was silent for so long that another one took it over.
        """
        if _newest(self._storage, self._path) != self._number:
            raise Mismatch(
                f"another process took {self._what} over, because this one gave no sign of life for {LOST_S:g} s; "
                "nothing of it became visible: run it again when the other has ended"
            )

    def _open(self) -> None:
        self._beat(ended=False)
        self._thread.start()

    def _close(self) -> None:
        self._done.set()
        self._thread.join(timeout=10)
        with suppress(MetierError):  # a store that is gone will find the process gone too
            self._beat(ended=True)

    def _renew(self) -> None:
        while not self._done.wait(BEAT_S):
            with suppress(MetierError):  # the next beat tries again
                self._beat(ended=False)

    def _beat(self, *, ended: bool) -> None:
        note = {"at": time.time(), "ended": ended}
        self._storage.write(f"{self._path}/{self._number:06}.beat", json.dumps(note).encode())


@contextmanager
def claim(storage: Storage, path: str, what: str, doing: str) -> Iterator[Claim]:
    """Hold the claim at `path` for the length of a ``with``.

    Args:
        what: what is claimed, for messages: ``knowledge 'default'``.
        doing: what is done with it, for those who are refused: ``metier index``.

    Raises:
        Mismatch: a living process holds it; the sentence names it.
    """
    held = Claim(storage, path, _take(storage, path, what, doing), what)
    held._open()
    try:
        yield held
    finally:
        held._close()


def _take(storage: Storage, path: str, what: str, doing: str) -> int:
    body = json.dumps({"id": uuid.uuid4().hex, "at": time.time(), "doing": doing, **me()}).encode()
    while True:
        newest = _newest(storage, path)
        if newest:
            _check_free(storage, path, newest, what)
        file = f"{path}/{newest + 1:06}.json"
        # Refused, but ours: the store's client lost the first answer and asked again.
        if not storage.create(file, body) and storage.read(file) != body:
            continue
        # Who was slow may have made a number anew that was tidied away; the newest is never.
        if _newest(storage, path) == newest + 1:
            _tidy(storage, path, newest + 1)
            return newest + 1


def _check_free(storage: Storage, path: str, number: int, what: str) -> None:
    try:
        holder = json.loads(storage.read(f"{path}/{number:06}.json"))
    except NotFound:  # tidied away by a newer holder, who is met in the next round
        return
    beat = {"at": holder["at"], "ended": False}
    with suppress(NotFound):
        beat = json.loads(storage.read(f"{path}/{number:06}.beat"))
    if not beat["ended"] and lives(holder, beat["at"]):
        here = (
            "this process" if (holder["pid"], is_same_host(holder)) == (os.getpid(), True) else f"pid {holder['pid']}"
        )
        since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(holder["at"]))
        raise Mismatch(
            f"{what} is being written by {here} on {holder['host']} since {since} ({holder['doing']}); "
            "wait until it has ended and try again"
        )


def _newest(storage: Storage, path: str) -> int:
    return max((int(name[:6]) for name in storage.list(path) if re.fullmatch(r"\d{6}\.json", name)), default=0)


def _tidy(storage: Storage, path: str, number: int) -> None:
    for name in storage.list(path):
        if re.fullmatch(r"\d{6}\.(json|beat)", name) and int(name[:6]) < number:
            storage.delete(f"{path}/{name}")
