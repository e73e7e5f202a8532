"""One thing that is wrong with a row, where it stands and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.errors import BadInput

SHOWN = 10
"""Problems that an error lists before it only counts."""


@dataclass(frozen=True)
class Problem:
    """``str(problem)`` is the line a user reads: ``place: field: reason; fix``."""

    place: str
    """``file:line`` of a text file, ``file:row N`` of a table, ``hub:org/name#split row N`` of a hub."""
    field: str
    """The field at fault, such as ``messages.2.content``; ``row`` or ``file`` where it is all of it."""
    reason: str
    fix: str

    def __str__(self) -> str:
        return f"{self.place}: {self.field}: {self.reason}; {self.fix}"


def refuse(problems: Sequence[Problem], advice: str | None = None) -> BadInput:
    """The error that lists the first ten of `problems` and counts the rest; `advice` says what to do about those."""
    lines = [str(problem) for problem in problems[:SHOWN]]
    if len(problems) > SHOWN:
        lines.append(f"… and {len(problems) - SHOWN} more" + (f"; {advice}" if advice else ""))
    return BadInput("\n".join(lines), param=problems[0].place)
