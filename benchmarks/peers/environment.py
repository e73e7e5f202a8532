"""Environments of peers that cannot live in ours because their pins are others.

A peer's requirements stand in ``benchmarks/peers/NAME.txt``. Its environment is made once, beside the models in the
cache, and again when that file changes. Not covered: removing old ones.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import venv
from pathlib import Path

CACHE = Path("~/.cache/metier/peers").expanduser()
NEEDED_BYTES = 4 << 30
"""What an environment with PyTorch for the CPU takes, and as much again while pip unpacks it."""


UNLOADABLE = ("torchvision", "torchaudio", "torchcodec")
"""Taken out again: their wheels on the package index are built for CUDA and fail to load beside PyTorch for the CPU."""


def python(name: str) -> Path:
    """The interpreter of the environment of peer `name`, made with pip unless it is there.

    Raises:
        RuntimeError: the disk has not enough room, or pip failed; the message ends with what pip said last.
    """
    if interpreter := made(name):
        return interpreter
    requirements, directory = _paths(name)
    interpreter, finished = directory / "bin" / "python", directory / "finished"
    CACHE.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(CACHE).free) < NEEDED_BYTES:
        raise RuntimeError(
            f"{CACHE} has {free >> 30} GiB free and the environment of {name} takes {NEEDED_BYTES >> 30}"
        )
    print(f"making the environment of {name} in {directory}", file=sys.stderr)
    venv.create(directory, clear=True, with_pip=True)
    for arguments in (["install", "--requirement", str(requirements)], ["uninstall", "--yes", *UNLOADABLE]):
        command = [str(interpreter), "-m", "pip", *arguments, "--quiet"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"pip could not {arguments[0]} for {name}: {done.stderr.strip()[-500:]}")
    finished.touch()
    return interpreter


def made(name: str) -> Path | None:
    """The interpreter of the environment of peer `name` if it is there already."""
    _, directory = _paths(name)
    return directory / "bin" / "python" if (directory / "finished").exists() else None


def tcmalloc() -> Path | None:
    """Debian's ``libtcmalloc_minimal``, unpacked beside the environments, not installed; ``None`` where apt has none."""
    directory = CACHE / "tcmalloc"
    if not directory.exists():
        directory.mkdir(parents=True)
        for command in ("apt-get download libtcmalloc-minimal4", "dpkg-deb --extract *.deb ."):
            subprocess.run(["sh", "-c", command], cwd=directory, capture_output=True)
    return next(directory.rglob("libtcmalloc_minimal.so.4"), None)


def _paths(name: str) -> tuple[Path, Path]:
    """Requirements and directory of an environment."""
    requirements = Path(__file__).with_name(f"{name}.txt")
    return requirements, CACHE / f"{name}-{hashlib.sha256(requirements.read_bytes()).hexdigest()[:12]}"
