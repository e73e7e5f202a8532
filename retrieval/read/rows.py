"""JSONL, CSV and Parquet -> a document a row.

``knowledge.columns`` says what columns mean; without it the usual names are taken (:data:`USUAL`), among them those of
BEIR. Other columns become attributes. A row that cannot be used costs that row only. CSV has a header and is separated
by commas, semicolons or tabs, whichever the header has most of.

Not covered: compressed JSONL and CSV, JSON that is not one object a line, Parquet files made to unpack without end
(what they hold is limited as it is read, 256 rows at a time).
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic_core import from_json

from cluster.config import KnowledgeConfig
from retrieval.read.base import Problem, Source, Unreadable
from retrieval.read.clean import clean, one_line
from retrieval.read.decode import decode
from retrieval.read.places import suffix
from retrieval.read.plain import attributes, groups_of
from retrieval.structure import title_of
from retrieval.types import Document

USUAL = {
    "text": ("text", "content", "contents", "body", "passage"),
    "title": ("title",),
    "id": ("id", "_id", "doc_id"),
    "source": ("source", "url"),
    "groups": ("groups",),
}
"""Meaning -> names of columns that are taken for it, the first that is there."""
NESTED = "metadata"
"""A column whose object holds attributes, as in BEIR."""
MOST_PROBLEMS = 20
"""Rows of a file that are reported one by one."""
LONGEST_ID = 1024
"""Bytes."""
BATCH = 256


@dataclass
class _Rows:
    """What the rows of one file gave."""

    source: Source
    name: str
    """What ids are made of where rows have none."""
    documents: list[Document] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    dropped: dict[str, None] = field(default_factory=dict)
    """Columns that were too large for attributes."""
    skipped: int = 0

    def skip(self, number: int, reason: str) -> None:
        self.skipped += 1
        if self.skipped <= MOST_PROBLEMS:
            self.problems.append(Problem(f"{self.source.path}:row {number}", reason))


def read_rows(
    data: bytes, source: Source, knowledge: KnowledgeConfig, name: str
) -> tuple[list[Document], list[Problem]]:
    """The documents in the rows of a file, and the rows that were skipped.

    Args:
        name: begins the ids of rows that have none; the rest is a digest of what they say.

    Raises:
        Unreadable: the file is not what its ending says, or has no column of text.
    """
    found = _Rows(source, name)
    room = int(knowledge.max_file_mb * 1_000_000)
    if suffix(source.path) == PARQUET:
        rows = _parquet(data, knowledge.columns)
    else:
        text, note = decode(data)
        rows = LINES[suffix(source.path)](text, knowledge.columns)
        if note:
            found.problems.append(Problem(source.path, note, "note"))
    for number, row in rows:
        try:
            if isinstance(row, Unreadable):
                raise row
            document = _document(found, row, knowledge.columns)
        except Unreadable as error:
            found.skip(number, str(error))
            continue
        room -= len(document.text)
        if room < 0:
            raise Unreadable("its rows unpack to more than knowledge.max_file_mb; split it or raise the limit")
        found.documents.append(document)
    if found.skipped > MOST_PROBLEMS:
        more = found.skipped - MOST_PROBLEMS
        found.problems.append(Problem(source.path, f"{more:,} more rows were skipped for reasons like these"))
    if found.dropped:
        note = f"left out columns that are too large for attributes: {', '.join(found.dropped)}"
        found.problems.append(Problem(source.path, note, "note"))
    if not found.documents and not found.skipped:
        raise Unreadable("empty")
    return found.documents, found.problems


def _document(found: _Rows, row: Mapping[str, Any], columns: Mapping[str, str]) -> Document:
    means = _meanings(row, columns)
    if not means["text"]:
        raise Unreadable(_no_text(row))
    parts = [clean(value) for name in means["text"] if isinstance(value := row[name], str) and value.strip()]
    title = one_line(_word(row, means["title"]))
    text = "\n\n".join(parts) or title
    if not text.strip():
        raise Unreadable("its text is empty")
    if not means["groups"] and "groups" in columns.values():
        raise Unreadable(
            "has no column of groups, though knowledge.columns names one; null there means those of the knowledge"
        )
    groups = groups_of(row[means["groups"][0]]) if means["groups"] else None
    taken = {name for names in means.values() for name in names}
    others = {name: value for name, value in row.items() if name not in taken}
    if isinstance(nested := others.get(NESTED), Mapping):
        others = {**{name: value for name, value in others.items() if name != NESTED}, **nested}
    metadata, dropped = attributes(others)
    found.dropped |= dict.fromkeys(dropped)
    own = clean(_word(row, means["id"])).strip()
    doc_id = own or f"{found.name}:{_digest(title, text, str(groups))}"
    if len(doc_id.encode()) > LONGEST_ID:
        raise Unreadable(f"its id is longer than {LONGEST_ID} bytes")
    return Document(
        doc_id=doc_id,
        title=title or title_of(text),
        text=text,
        source=clean(_word(row, means["source"])).strip() or found.source.path,
        metadata=metadata,
        groups=groups,
    )


def _meanings(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, list[str]]:
    """Meaning -> the columns of `row` that have it; several only for text, where the configuration says so."""
    named: dict[str, list[str]] = {meaning: [] for meaning in USUAL}
    for name, meaning in columns.items():
        if name in row and meaning in named:
            named[meaning].append(name)
    small = {name.strip().lower(): name for name in row if name not in columns}
    for meaning, names in USUAL.items():
        if meaning not in columns.values():
            named[meaning] = [small[name] for name in names if name in small][:1]
    return named


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def _no_text(names: Mapping[str, Any]) -> str:
    listed = ", ".join(f"'{name}'" for name in list(names)[:8])
    return f"no column of text among {listed}; name it, for example knowledge.columns={{body: text}}"


def _word(row: Mapping[str, Any], names: list[str]) -> str:
    value = row[names[0]] if names else None
    return str(value) if isinstance(value, str | int) and not isinstance(value, bool) else ""


Row = Mapping[str, Any] | Unreadable


def _json_lines(text: str, _: Mapping[str, str]) -> Iterator[tuple[int, Row]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = from_json(line)
        except ValueError as error:
            yield number, Unreadable(f"not JSON ({error}); mend it")
            continue
        yield number, value if isinstance(value, dict) else Unreadable("not an object; write one {…} a line")


def _csv(text: str, columns: Mapping[str, str]) -> Iterator[tuple[int, Row]]:
    csv.field_size_limit(2**31 - 1)  # Python's own limit of 131,072 is too short for documents
    first = text[: text.find("\n") + 1 or None]
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=first.count), strict=True)
    try:
        header = [name.strip() for name in next(rows, [])]
    except csv.Error as error:
        raise Unreadable(f"its header cannot be read ({error}); mend its quotes") from None
    if not header:
        raise Unreadable("empty")
    if twice := next((name for name in header if header.count(name) > 1), ""):
        raise Unreadable(f"two columns of its header are named '{twice}'; give each a name of its own")
    if not _meanings(dict.fromkeys(header), columns)["text"]:
        raise Unreadable(_no_text(dict.fromkeys(header)))
    number = 1
    while True:
        number += 1
        try:
            cells = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            yield number, Unreadable(f"cannot be read ({error}); mend its quotes")
            continue
        if len(cells) == len(header):
            yield number, dict(zip(header, cells, strict=True))
        elif cells:
            yield (
                number,
                Unreadable(f"has {len(cells)} cells where the header has {len(header)}; quote what holds a separator"),
            )


def _parquet(data: bytes, columns: Mapping[str, str]) -> Iterator[tuple[int, Row]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(pyarrow.BufferReader(data)) as file:
            names = dict.fromkeys(file.schema_arrow.names)
            if not _meanings(names, columns)["text"]:
                raise Unreadable(_no_text(names))
            for batch in file.iter_batches(batch_size=BATCH):
                for fields in batch.to_pylist():
                    number += 1
                    yield number, fields
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise Unreadable(f"cannot be read as Parquet ({reason}); write it again") from None


LINES: dict[str, Callable[[str, Mapping[str, str]], Iterator[tuple[int, Row]]]] = {".jsonl": _json_lines, ".csv": _csv}
PARQUET = ".parquet"
ENDINGS = (*LINES, PARQUET)
"""Of files that hold a document a row."""
