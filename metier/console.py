"""What verbs print: lines, tables that fit a terminal, JSON, progress. Results go to stdout, the rest to stderr."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)
BARS = "▁▂▃▄▅▆▇█"
SHORT = 24
"""Characters; what is as short as this is kept on one line of a table."""


def say(line: str) -> None:
    """One line of progress, on stderr."""
    err.print(line, markup=False, soft_wrap=True)


def complain(message: str) -> None:
    """An error, on stderr."""
    for line in message.splitlines():
        err.print(f"[red]error:[/red] {line.replace('[', chr(92) + '[')}", soft_wrap=True)


def print_json(value: Any) -> None:
    """`value` (plain data, dataclasses and pydantic models inside) as indented JSON, on stdout."""
    json.dump(value, sys.stdout, indent=2, ensure_ascii=False, default=_plain)
    sys.stdout.write("\n")


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], title: str | None = None) -> None:
    """A table on stdout; columns whose values are numbers are set right, and only long ones are folded."""
    grid = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for position, column in enumerate(columns):
        numeric = bool(rows) and all(isinstance(row[position], (int, float)) for row in rows)
        short = max([len(str(row[position])) for row in rows], default=0) <= SHORT
        grid.add_column(column, justify="right" if numeric else "left", overflow="fold", no_wrap=short)
    for row in rows:
        grid.add_row(*(Text(f"{value:.2f}" if isinstance(value, float) else str(value)) for value in row))
    out.print(grid)


def curve(values: Sequence[float], width: int = 48) -> str:
    """`values` as a line of block characters, averaged down to `width`."""
    if not values:
        return ""
    size = max(1, -(-len(values) // width))
    means = [sum(part) / len(part) for part in (values[i : i + size] for i in range(0, len(values), size))]
    low, high = min(means), max(means)
    span = (high - low) or 1.0
    return "".join(BARS[int((mean - low) / span * (len(BARS) - 1))] for mean in means)


@contextlib.contextmanager
def progress(what: str, total: int | None = None) -> Iterator[Callable[[int, int | None, str], None]]:
    """A progress bar on a terminal, a line every tenth elsewhere; yields ``update(done, total, note)``."""
    if err.is_terminal:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=err) as bar:
            task = bar.add_task(what, total=total, note="")
            yield lambda done, of, note: bar.update(task, completed=done, total=of, note=note)
        return
    shown = -1

    def line(done: int, of: int | None, note: str) -> None:
        nonlocal shown
        tenth = 10 * done // of if of else done
        if tenth != shown:
            shown = tenth
            say(f"  {what}: {done}{f'/{of}' if of else ''} {note}".rstrip())

    yield line


def _plain(value: Any) -> Any:
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return str(value)
