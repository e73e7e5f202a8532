"""Make a directory once, whole or not at all, for all threads and processes of a node.

Used for everything a node keeps: models and fetched adapters. The directory is filled under a temporary name beside
its target and renamed when :data:`MARKER` has been written into it, last; one lock file per target makes a second
process wait and find it done. What a killed process leaves is a temporary directory that the next one removes.

Not covered: making room by removing old directories.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock

from cluster.errors import ConfigError, MetierError, ResourcesShort

log = logging.getLogger(__name__)

MARKER = ".complete.json"
"""Says what a directory holds (`source`, `revision`, `created`); a directory without it is not finished."""


def lock_file(target: Path) -> Path:
    """What is locked while `target` is made; who removes it again locks it too."""
    return target.parent / f".{target.name}.lock"


def materialize(target: Path, make: Callable[[Path, Path], dict[str, Any]]) -> Path:
    """Return `target`, filling it first if it is not complete.

    Args:
        make: called as ``make(out, scratch)`` with two empty directories: what it leaves in `out` becomes `target`,
            `scratch` is thrown away. It returns what the marker should say besides ``created``.

    Raises:
        ResourcesShort: no space left.
        ConfigError: the parent directory cannot be made or written; besides whatever `make` raises.
    """
    if is_complete(target):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{target.parent} cannot be made ({error.strerror}); use another directory") from error
    if not os.access(target.parent, os.W_OK):
        raise ConfigError(
            f"{target.parent} cannot be written and holds no finished {target.name}; use another directory"
        )
    try:
        with FileLock(lock_file(target)):
            if not is_complete(target):
                _make_and_rename(target, make)
    except MetierError:
        raise
    except Exception as error:
        if is_disk_full(error):
            raise ResourcesShort(
                f"no space left on the disk of {target.parent}; free some, or use another directory"
            ) from error
        raise
    return target


def save_model(model: Any, out: Path) -> None:
    """Write a transformers `model` to `out`, whatever this process's rank.

    In a process group transformers lets rank 0 alone write, and everybody else returns in silence; but each node keeps a
    copy of its own, and there its first process makes it.
    """
    model.should_save_on_this_rank = lambda _: True
    model.save_pretrained(out)


def is_complete(directory: Path) -> bool:
    """Whether `directory` was finished by :func:`materialize`."""
    return (directory / MARKER).is_file()


def check_space(directory: Path, need: int, what: str) -> None:
    """Raise :class:`ResourcesShort` if the disk of `directory` has less than `need` bytes left."""
    free = shutil.disk_usage(directory).free
    if free < need:
        raise ResourcesShort(
            f"{what} needs {need / 1e9:.2f} GB in {directory}, where {free / 1e9:.2f} GB are free; free some, or use another directory"
        )


def is_disk_full(error: BaseException) -> bool:
    """Whether `error` is a full disk or quota; libraries written in Rust only say so in words."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return full or "No space left on device" in str(error)


def _make_and_rename(target: Path, make: Callable[[Path, Path], dict[str, Any]]) -> None:
    for abandoned in target.parent.glob(f".{target.name}.*.tmp"):
        shutil.rmtree(abandoned, ignore_errors=True)
    work = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.tmp"
    out, scratch = work / "out", work / "scratch"
    try:
        out.mkdir(parents=True)
        scratch.mkdir()
        started = time.monotonic()
        record = make(out, scratch) | {"created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        marker = out / MARKER
        marker.write_text(json.dumps(record, indent=1), encoding="utf-8")
        # safetensors writes 0600; on a cache shared by users every file should have the mode of a normal new file.
        for file in out.rglob("*"):
            if file.is_file():
                file.chmod(marker.stat().st_mode)
        if target.exists():  # Half a copy made by hand: nothing of ours is ever there without its marker.
            target.rename(work / "replaced")
        out.rename(target)
        log.info("ready: %s", target, extra={"seconds": round(time.monotonic() - started, 1)})
    finally:
        shutil.rmtree(work, ignore_errors=True)
