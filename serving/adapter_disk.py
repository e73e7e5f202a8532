"""Adapter files on the disk of a node: fetched once, held while they are read, least recently used out first.

``<directory>/<digest>/`` holds the PEFT files of an adapter as the registry verified them, and in the marker of
:mod:`cluster.materialize` its card. All processes of a node share the directory without a server among them:

- one fetches, the others wait for it and find it done (:func:`cluster.materialize.materialize`);
- who reads holds a shared lock on the marker, which the system gives back when a process is killed. Who makes room
  takes it exclusively or passes on to the next one;
- the marker's modification time is the last use;
- what a killed process leaves has a temporary name and is removed by the next one to come.

A directory that was removed by hand, whole or in part, is fetched again. Without the storage, what is on the disk is
still served.

Not covered: files that were changed on the disk afterwards (whole files are read, but not hashed again).
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import shutil
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from cluster.adapter_files import PEFT_FILES
from cluster.errors import BadInput, NotFound
from cluster.materialize import MARKER, is_complete, lock_file, materialize
from cluster.registry import Registry, load_card
from cluster.release import AdapterCard, short

log = logging.getLogger(__name__)

DIGEST = re.compile(r"[0-9a-f]{64}")
LEFTOVER = re.compile(r"\.([0-9a-f]{64})\.[0-9a-f]{8}\.tmp")
"""What :func:`cluster.materialize.materialize` fills and what is being removed."""


@dataclass
class _Hold:
    handle: int
    """The marker's, with a shared lock on it."""
    count: int = 0


class AdapterDisk:
    """The adapters of `registry` in `directory`; safe to use from several threads, and beside other processes."""

    def __init__(self, registry: Registry, directory: Path, limit: int = 0) -> None:
        """`limit` is in bytes; 0 is none. One more adapter than fits is there while it is fetched, and all that are held stay."""
        self.registry, self.directory, self.limit = registry, directory, limit
        self._lock = threading.Lock()
        self._holds: dict[str, _Hold] = {}
        self._remove_leftovers()

    @contextmanager
    def hold(self, digest: str) -> Iterator[Path]:
        """:meth:`acquire` and :meth:`release`."""
        directory = self.acquire(digest)
        try:
            yield directory
        finally:
            self.release(digest)

    def acquire(self, digest: str) -> Path:
        """The directory of `digest`, fetched if it is not there; it stays until :meth:`release`.

        Raises:
            NotFound: the registry has no such adapter.
            Mismatch: what the storage holds is not what was published.
            Unavailable: the storage does not answer, and the adapter is not on this disk.
            ResourcesShort: the disk is full.
        """
        fetched = False
        while (directory := self.try_acquire(digest)) is None:
            self._fetch(digest)
            fetched = True
        if fetched:
            self._make_room()
        return directory

    def try_acquire(self, digest: str) -> Path | None:
        """The same if it is there; ``None`` if it has to be fetched. Reads no more than the directory."""
        if not DIGEST.fullmatch(digest):
            raise BadInput(f"'{digest}' is not a digest (64 hex digits)", param="adapter")
        directory = self.directory / digest
        with self._lock:
            hold = self._holds.get(digest)
            if hold is None or not _is_of(hold.handle, directory):
                handle = _share(directory)
                if handle is None:
                    return None
                if hold is None:
                    hold = self._holds[digest] = _Hold(handle)
                else:  # fetched again: the lock was on what somebody removed
                    os.close(hold.handle)
                    hold.handle = handle
            hold.count += 1
        return directory

    def release(self, digest: str) -> None:
        """Let others remove it again."""
        with self._lock:
            hold = self._holds[digest]
            hold.count -= 1
            if not hold.count:
                os.close(self._holds.pop(digest).handle)

    def card(self, digest: str) -> AdapterCard:
        """What a held adapter was trained on."""
        marker: dict[str, Any] = json.loads((self.directory / digest / MARKER).read_text(encoding="utf-8"))
        card = marker.get("card") or self.registry.adapter_manifest(digest)["card"]
        return load_card(card, f"the card of adapter {short(digest)}")

    def _fetch(self, digest: str) -> None:
        directory = self.directory / digest
        if is_complete(directory):  # and yet not to be had: half removed by hand, or right now by somebody else
            with FileLock(lock_file(directory)):
                if not _is_whole(directory):
                    (directory / MARKER).unlink(missing_ok=True)

        def download(out: Path, scratch: Path) -> dict[str, Any]:
            try:
                self.registry.copy_adapter(digest, out)
            except NotFound as error:
                raise NotFound(
                    f"adapter {short(digest)} is not in {self.registry.storage.url}; publish it again, or use another version"
                ) from error
            card = self.registry.adapter_manifest(digest)["card"]
            return {"source": self.registry.storage.url, "revision": digest, "card": card}

        materialize(directory, download)

    def _make_room(self) -> None:
        if not self.limit:
            return
        found: list[tuple[int, int, Path]] = []
        for directory in self.directory.iterdir():
            with suppress(OSError):  # somebody else removes it
                if DIGEST.fullmatch(directory.name):
                    used = (directory / MARKER).stat().st_mtime_ns
                    found.append((used, sum(file.stat().st_size for file in directory.iterdir()), directory))
        over = sum(size for _, size, _ in found) - self.limit
        for _, size, directory in sorted(found):
            if over <= 0:
                return
            if self._remove(directory):
                over -= size
        if over > 0:
            log.warning(
                "adapters in use take %.1f MB more than serving.generator.adapters_disk_bytes allows; raise it",
                over / 1e6,
            )

    def _remove(self, directory: Path) -> bool:
        """Remove an adapter that nobody reads; False if somebody does."""
        try:
            with FileLock(lock_file(directory), timeout=0):
                handle = os.open(directory / MARKER, os.O_RDWR)
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    going = directory.with_name(f".{directory.name}.{uuid.uuid4().hex[:8]}.tmp")
                    directory.rename(going)
                    shutil.rmtree(going, ignore_errors=True)
                finally:
                    os.close(handle)
        except (Timeout, OSError):
            return False
        log.info("removed adapter %s to make room", short(directory.name))
        return True

    def _remove_leftovers(self) -> None:
        for leftover in self.directory.glob(".*.tmp"):
            if match := LEFTOVER.fullmatch(leftover.name):
                with suppress(Timeout, OSError), FileLock(lock_file(self.directory / match[1]), timeout=0):
                    shutil.rmtree(leftover, ignore_errors=True)


def _is_whole(directory: Path) -> bool:
    return all((directory / name).is_file() for name in (MARKER, *PEFT_FILES))


def _is_of(handle: int, directory: Path) -> bool:
    """Whether `directory` is whole, and `handle` is its marker's and not that of one which was there before."""
    try:
        return _is_whole(directory) and os.path.samestat(os.fstat(handle), (directory / MARKER).stat())
    except FileNotFoundError:
        return False


def _share(directory: Path) -> int | None:
    """A handle of the marker with a shared lock on it, its time set to now; ``None`` if `directory` is not there or about to go."""
    marker = directory / MARKER
    try:
        handle = os.open(marker, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        if _is_of(handle, directory):
            with suppress(OSError):  # a directory that came with the image
                now = time.time_ns()  # the system's own "now" is of its last tick, the same for many uses
                os.utime(marker, ns=(now, now))
            return handle
    except BlockingIOError:
        pass
    os.close(handle)
    return None
