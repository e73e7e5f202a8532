"""Sources -> rows of the one form, checked: what training takes (:func:`load_rows`) and a checker reports (:func:`scan`).

A source has one shape: the one ``data.shape`` names, or that of the first of its rows that has one. Not covered:
the quality of what rows say, and held-out questions, which ``training.data.rows.read_rows`` reads.
"""

from __future__ import annotations

import difflib
import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from cluster.config import DataConfig, Shape
from cluster.errors import ConfigError, MetierError
from training.data.problems import Problem, refuse
from training.data.read import Record, check, records
from training.data.rows import AnyRow
from training.data.shapes import FIELDS, detect, ignored, to_row, unknown_shape

Objective = Literal["sft", "domain"]


@dataclass(frozen=True)
class Loaded:
    """Rows that are fit for training, in the order of the sources."""

    rows: list[AnyRow]
    shapes: dict[str, Shape]
    """Source -> the shape its rows have there."""
    ignored: dict[str, tuple[str, ...]]
    """Source -> fields that were left out, where there are any."""


@dataclass
class Scan:
    """What sources hold, the bad with the good."""

    rows: list[tuple[str, AnyRow]] = field(default_factory=list)
    """(place, row)."""
    problems: list[Problem] = field(default_factory=list)
    shapes: dict[str, Shape] = field(default_factory=dict)
    ignored: dict[str, tuple[str, ...]] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    """Id -> place of the row that has it."""
    copies: dict[str, int] = field(default_factory=dict)
    """Id made from content -> rows that have this content."""


def load_rows(data: DataConfig, sources: Sequence[str], objective: Objective) -> Loaded:
    """All rows of `sources` in the one form.

    Args:
        data: says shape and names of columns.
        objective: ``sft`` takes conversations, ``domain`` raw text.

    Raises:
        NotFound: a source is not there.
        Unavailable: a hub does not answer.
        BadInput: a row cannot be used, an id occurs twice, a source is empty; one line each for the first ten.
    """
    for source in sources:
        check(source)
    found = Scan()
    with _no_collection():
        for source in sources:
            _scan(found, source, data, objective)
    if found.problems:
        raise refuse(found.problems, "`metier data check --all` lists all of them")
    return Loaded([row for _, row in found.rows], found.shapes, found.ignored)


def scan(data: DataConfig, sources: Sequence[str], objective: Objective) -> Scan:
    """The same without stopping at what is wrong; a row with a problem is not among the rows."""
    found = Scan()
    with _no_collection():
        for source in sources:
            try:
                _scan(found, source, data, objective)
            except ConfigError:
                raise
            except MetierError as error:
                reason, _, fix = error.message.removeprefix(f"{source}: ").partition("; ")
                found.problems.append(Problem(source, "source", reason, fix))
    return found


@contextmanager
def _no_collection() -> Iterator[None]:
    """Reading makes a million objects without cycles; looking for some would take half of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _scan(found: Scan, source: str, data: DataConfig, objective: Objective) -> None:
    _check_columns(data)
    shape: Shape | None = None if data.shape == "auto" else data.shape
    left_out: dict[str, None] = {}
    names: tuple[str, ...] = ()
    nothing = True
    for record in records(source, data.columns, documents=objective == "domain"):
        nothing = False
        if isinstance(record, Problem):
            found.problems.append(record)
            continue
        own = detect(record.fields)
        shape = shape or own
        if shape is None:
            found.problems.append(unknown_shape(record))
            continue
        if source not in found.shapes:
            found.shapes[source] = shape
            if (shape == "text") != (objective == "domain"):
                found.problems.append(_against(objective, shape, record))
                return
        if data.shape == "auto" and own != shape:
            found.problems.append(_mixed(record, own, shape) if own else unknown_shape(record))
            continue
        row = to_row(record, shape)
        if isinstance(row, Problem):
            found.problems.append(row)
            continue
        if tuple(record.fields) != names:
            names = tuple(record.fields)
            left_out |= dict.fromkeys(ignored(names, shape))
        _add(found, record, row)
    if nothing:
        found.problems.append(Problem(source, "source", "holds no rows", "put rows there or leave it out"))
    if left_out:
        found.ignored[source] = tuple(left_out)


def _add(found: Scan, record: Record, row: AnyRow) -> None:
    if record.fields.get("id") in (None, ""):
        count = found.copies[row.id] = found.copies.get(row.id, 0) + 1
        if count > 1:
            row = row.model_copy(update={"id": f"{row.id}-{count}"})
    if row.id in found.places:
        reason = f"'{row.id}' was already used at {found.places[row.id]}"
        found.problems.append(Problem(record.place, "id", reason, "give every row an id of its own"))
        return
    found.places[row.id] = record.place
    found.rows.append((record.place, row))


def _check_columns(data: DataConfig) -> None:
    for name, meaning in data.columns.items():
        if meaning and meaning not in FIELDS:
            near = difflib.get_close_matches(meaning, sorted(FIELDS), n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(sorted(FIELDS))}"
            raise ConfigError(
                f"data.columns: '{meaning}', which '{name}' is to be called, is no field of a row; {hint}",
                param="data.columns",
            )


def _against(objective: Objective, shape: Shape, record: Record) -> Problem:
    if objective == "sft":
        reason = "is raw text, which holds no answers to learn under training.objective=sft"
        return Problem(record.place, "text", reason, "set training.objective=domain, or give conversations")
    reason = f"is of shape {shape}, a conversation, where training.objective=domain learns raw text"
    return Problem(record.place, "row", reason, "set training.objective=sft, or give rows with text")


def _mixed(record: Record, own: Shape, shape: Shape) -> Problem:
    reason = f"is of shape {own}, but the rows before it of shape {shape}"
    return Problem(record.place, "row", reason, "keep rows of one shape in one source, or set data.shape")
