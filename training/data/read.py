"""Sources -> records: the rows of files, directories and hub data sets as they were written, each with its place.

By ending: ``.jsonl``; ``.json`` (a list of objects, or one object a line); ``.parquet``; ``.csv`` and ``.tsv`` with a
header; ``.md`` and ``.txt`` as one raw text each. What cannot be read is a :class:`Problem` in the place of its
record, so that one bad line hides none of the others. What a record means is decided in ``training.data.shapes``.

Hidden files and directories (a leading dot) are not looked at. Rows are read as they are asked for; only a ``.json``
list and a single text are held whole. Not covered: compressed files, other encodings than UTF-8, and JSON that
wraps its rows in an object.
"""

from __future__ import annotations

import csv
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from cluster.config import HUB
from cluster.errors import BadInput, NotFound
from training.data.hub import rows_of
from training.data.problems import Problem

BOM = b"\xef\xbb\xbf"
BATCH = 256
"""Rows of Parquet held at once."""
BROKEN = re.compile("[\ud800-\udfff]")
UTF8 = "write it again as UTF-8, for example with iconv"
CELL = 2**31 - 1
"""Characters that a cell of a CSV file may hold; Python's own limit of 131,072 is too short for documents."""


@dataclass(frozen=True, slots=True)
class Record:
    """One row as it was written, under the names that ``data.columns`` gives its fields."""

    place: str
    """``file:line``, ``file:row N`` (from 1), ``hub:org/name#split row N``, or the file of a raw text."""
    fields: dict[str, Any]


def records(source: str, columns: Mapping[str, str] = {}, *, documents: bool = True) -> Iterator[Record | Problem]:
    """The records of `source`, in order; a directory's files in the order of their relative paths.

    Args:
        columns: name in the data -> name here; an empty name leaves the column out.
        documents: whether the ``.md`` and ``.txt`` files of a directory are raw texts; without it they are not read.

    Raises:
        NotFound: there is no such file, directory or hub data set.
        BadInput: the file has an ending that is not known, or the directory holds no file with a known one.
        Unavailable: the hub does not answer.
    """
    found: Iterable[Record | Problem]
    if source.startswith(HUB):
        found = (Record(place, fields) for place, fields in rows_of(source))
    else:
        files = _files(source, documents)
        found = chain.from_iterable(READERS[file.suffix.lower()](file, at) for at, file in files)
    try:
        for record in found:
            yield _renamed(record, columns) if columns and isinstance(record, Record) else record
    except OSError as error:
        raise BadInput(
            f"{error.filename or source}: cannot be read ({error.strerror}); make it readable", param=source
        ) from error


def check(source: str) -> None:
    """Raise NotFound if `source` is local and not there; a hub is not asked."""
    if not source.startswith(HUB) and not Path(source).exists():
        raise NotFound(
            f"{source}: no such file or directory; mend the name where the configuration lists its data", param=source
        )


def _files(source: str, documents: bool) -> list[tuple[str, Path]]:
    """The files of `source` with their names as `source` writes them, which begin every place."""
    check(source)
    path = Path(source)
    known = [ending for ending in READERS if documents or ending not in DOCUMENTS]
    if not path.is_dir():
        if path.suffix.lower() not in READERS:
            raise BadInput(f"{source}: not a known kind of file; use one of {', '.join(READERS)}", param=source)
        return [(source, path)]
    inside = [file.relative_to(path) for file in path.rglob("*") if file.suffix.lower() in known and file.is_file()]
    names = sorted(name.as_posix() for name in inside if not any(part.startswith(".") for part in name.parts))
    if not names:
        raise BadInput(f"{source}: holds no rows; put files there that end in {', '.join(known)}", param=source)
    return [(f"{source.rstrip('/')}/{name}", path / name) for name in names]


def _renamed(record: Record, columns: Mapping[str, str]) -> Record | Problem:
    fields: dict[str, Any] = {}
    for name, value in record.fields.items():
        target = columns.get(name, name)
        if target in fields:
            reason = f"data.columns leaves two fields of the name '{target}'"
            return Problem(record.place, name, reason, "rename only one of them, or leave one out with an empty name")
        if target:
            fields[target] = value
    return Record(record.place, fields)


def _json_lines(file: Path, at: str) -> Iterator[Record | Problem]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            text = _without_bom(line) if number == 1 else line
            if text.strip():
                yield _record(_value(text, f"{at}:{number}"), f"{at}:{number}")


def _record(value: Any, place: str) -> Record | Problem:
    if isinstance(value, Problem):
        return value
    if isinstance(value, dict):
        return Record(place, value)
    return Problem(place, "row", f"is a {type(value).__name__}, not an object", "write one {…} for each row")


def _without_bom(text: bytes) -> bytes:
    return text.removeprefix(BOM)


def _value(text: bytes, place: str) -> Any:
    """The JSON value in `text`, or the :class:`Problem` with it."""
    try:
        return from_json(text)
    except ValueError as error:
        reason, fix = str(error), "mend the JSON"
    try:
        text.decode()
    except UnicodeDecodeError as error:
        reason, fix = f"UTF-8 breaks off at byte {error.start}", UTF8
    return Problem(place, "row", f"cannot be read ({reason})", fix)


def _json(file: Path, at: str) -> Iterator[Record | Problem]:
    with file.open("rb") as lines:
        first = next((line for line in map(_without_bom, lines) if line.strip()), b"")
    if first.lstrip().startswith(b"{") and isinstance(_value(first, at), dict):
        yield from _json_lines(file, at)
        return
    values = _value(_without_bom(file.read_bytes()), at) if first else []
    if isinstance(values, Problem):
        yield values
    elif isinstance(values, list):
        for number, value in enumerate(values, 1):
            yield _record(value, f"{at}:row {number}")
    else:
        yield Problem(at, "file", f"holds one {type(values).__name__}", "write a list of objects, or one object a line")


def _table(file: Path, at: str) -> Iterator[Record | Problem]:
    """Rows of CSV or TSV as strings; an empty cell is an empty string."""
    csv.field_size_limit(CELL)
    with file.open("rb") as lines:
        rows = csv.reader(_decoded(lines), strict=True, delimiter="\t" if file.suffix.lower() == ".tsv" else ",")
        header: list[str] | None = None
        for number in count():
            place = f"{at}:row {number}" if header else at
            problem: Problem | None
            try:
                cells = next(rows)
                problem = _cells_problem(cells, header, place)
            except StopIteration:
                return
            except csv.Error as error:
                cells, problem = [], Problem(place, "row", f"cannot be read ({error})", "mend its quotes and line ends")
            if problem:
                yield problem
            elif header and cells:
                yield Record(place, dict(zip(header, cells, strict=True)))
            if header is None and problem:
                return
            header = header or cells or None


def _cells_problem(cells: list[str], header: list[str] | None, place: str) -> Problem | None:
    if any(not cell.isascii() and BROKEN.search(cell) for cell in cells):
        return Problem(place, "row", "is not UTF-8", UTF8)
    if header is None:
        twice = next((name for name in cells if cells.count(name) > 1), None)
        if twice is not None:
            return Problem(place, twice, "names two columns of the header", "give every column a name of its own")
    elif cells and len(cells) != len(header):
        reason = f"has {len(cells)} cells where the header has {len(header)}"
        return Problem(place, "row", reason, "put cells that hold the separator or a line end into quotes")
    return None


def _decoded(lines: Iterable[bytes]) -> Iterator[str]:
    """Lines as text; bytes that are no UTF-8 stay visible as lone surrogates (:data:`BROKEN`)."""
    for number, line in enumerate(lines):
        yield (line if number else _without_bom(line)).decode("utf-8", "surrogateescape")


def _parquet(file: Path, at: str) -> Iterator[Record | Problem]:
    import pyarrow.parquet
    from pyarrow import ArrowException

    try:
        number = 0
        with pyarrow.parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=BATCH):
                for fields in batch.to_pylist():
                    number += 1
                    yield Record(f"{at}:row {number}", fields)
    except (ArrowException, OSError) as error:
        reason = f"cannot be read as Parquet ({str(error).splitlines()[0]})"
        yield Problem(at, "file", reason, "write it again, for example with pyarrow")


def _document(file: Path, at: str) -> Iterator[Record | Problem]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        yield Problem(at, "file", f"is not UTF-8 (byte {error.start})", UTF8)
        return
    if "\0" in text:
        yield Problem(at, "file", "is not a text (it holds NUL bytes)", "take it out of the directory")
        return
    yield Record(at, {"text": text, "document": unicodedata.normalize("NFC", file.stem)})


DOCUMENTS = (".md", ".txt")
"""Endings of files that are one raw text each; the stem of the name is the document's id, as in the index."""
READERS: dict[str, Callable[[Path, str], Iterator[Record | Problem]]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".parquet": _parquet,
    ".csv": _table,
    ".tsv": _table,
    **dict.fromkeys(DOCUMENTS, _document),
}
