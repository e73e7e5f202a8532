"""What every reader speaks: where documents come from (:class:`Source`), what came out, what was left out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Source:
    """One file (or object) that may hold documents; picklable and small."""

    path: str
    """Relative to the root: NFC, ``/`` separated."""
    url: str
    """Where to open it: an absolute local path, or a URL that fsspec opens."""
    size: int
    """Bytes."""
    stamp: str
    """Changes when the content may have: time and size of a local file, the tag that an object store gives."""


@dataclass(frozen=True)
class Problem:
    """What was skipped, and why; or a note on what was left out of a document that was read."""

    source: str
    """Path relative to the directory that was read, with ``:row N`` where a row is meant."""
    reason: str
    kind: Literal["skipped", "note"] = "skipped"


class Unreadable(Exception):
    """A file that gives no document; ``str(error)`` is the reason, with the fix where there is one."""


@dataclass
class Extract:
    """What a reader found in one file."""

    text: str
    title: str = ""
    """Empty where the file names none."""
    metadata: dict[str, Any] = field(default_factory=dict)
    groups: tuple[str, ...] | None = None
    pages: tuple[int, ...] = ()
    notes: list[str] = field(default_factory=list)
    """What was left out or guessed."""
