"""A cleaned copy of checked rows: text repaired, copies and rows with errors left out, sensitive parts replaced.

:func:`mend` cleans one row; :func:`write` writes every source as JSONL in the one row form, and ``changes.diff``, a
unified diff without context of what was read and what was written, one row a line. Sources are never touched, and
the directory appears by rename when it is whole.

Cleaning what is clean changes nothing. A quote of `evidence` is only brought to NFC, as the index does with
documents: whatever else is wrong with it must stay as the document has it.
"""

from __future__ import annotations

import shutil
import unicodedata
from collections import Counter
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import NamedTuple

from cluster.config import HUB
from cluster.errors import BadInput
from retrieval.duplicates import normal
from training.data import sensitive
from training.data.check import Checked, Placed, is_of, said
from training.data.rows import AnyRow, Row, Text
from training.data.text_quality import REPAIRED, contents, flaws, repair

CHANGES = "changes.diff"


@dataclass
class Fixed:
    """What was written."""

    files: dict[str, str] = field(default_factory=dict)
    """Source -> its cleaned copy."""
    diff: str = ""
    read: int = 0
    """Rows that were readable."""
    written: int = 0
    changes: dict[str, int] = field(default_factory=dict)
    """Kind of change -> rows (of repairs and replacements: texts) it happened to."""


def clean(text: str, language: str, *, scrub: bool) -> str:
    """`text` repaired, and with `scrub` without secrets and personal data."""
    while True:
        before = text
        text = repair(text)
        if scrub:
            text = sensitive.scrub(text, language)
        if text == before:
            return text


def mend(row: AnyRow, *, scrub: bool = False) -> AnyRow | None:
    """`row` with :func:`clean` texts; None if a text has nothing left."""
    texts = [(text, clean(text, row.language, scrub=scrub)) for _, text in contents(row)]
    if any(before.strip() and not after.strip() for before, after in texts):
        return None
    return _with_texts(row, [after for _, after in texts])


def write(checked: Checked, directory: Path, *, scrub: bool = False, force: bool = False) -> Fixed:
    """Write the cleaned copy of what was `checked` into `directory`.

    Args:
        force: replace a directory that is not empty.

    Raises:
        BadInput: `directory` is not empty, is a file, or holds a source or lies in one.
    """
    sources = list(dict.fromkeys(about.source for about in checked.report.sources))
    _check_directory(directory, sources, force=force)
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # what a killed call left
    fixed = Fixed(read=len(checked.rows), diff=str(directory / CHANGES))
    changes: Counter[str] = Counter()
    refused = {finding.place: finding for finding in checked.report.errors}
    places = {item.place for item in checked.rows}
    seen: dict[str, str] = {}
    try:
        partial.mkdir(parents=True)
        with (partial / CHANGES).open("w", encoding="utf-8", newline="\n") as diff:
            for source, name in zip(sources, _names(sources), strict=True):
                fixed.files[source] = str(directory / name)
                unread = [at for at in refused if at not in places and is_of(at, source)]
                changes["dropped: error"] += len(unread)
                diff.writelines(f"# dropped: {refused[at]}\n" for at in unread)
                diff.write(f"--- {source} (as read)\n+++ {directory / name}\n")
                rows = [item for item in checked.rows if item.source == source]
                with (partial / name).open("w", encoding="utf-8", newline="\n") as out:
                    for change in _changes(rows, refused, seen, changes, scrub=scrub):
                        diff.write(change.hunk)
                        out.write(change.line)
                        fixed.written += bool(change.line)
        _replace(partial, directory)
    except OSError as error:
        raise BadInput(f"--fix {directory}: cannot be written ({error.strerror}); name another directory") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    fixed.changes = dict(sorted((+changes).items()))
    return fixed


class _Change(NamedTuple):
    line: str
    """The row as it is written, with its line end; empty if it is dropped."""
    hunk: str
    """What the diff says of it; empty if it is written as it was read."""


def _changes(
    rows: Sequence[Placed], refused: Container[str], seen: dict[str, str], changes: Counter[str], *, scrub: bool
) -> Iterator[_Change]:
    written = 0
    for number, item in enumerate(rows, 1):
        row, dropped = mend(item.row, scrub=scrub), ""
        if item.place in refused:
            dropped = "error"
        elif row is None:
            dropped = "nothing left"
        elif item.place != seen.setdefault(normal(said(row)) or said(row), item.place):
            dropped = "duplicate"
        if row is None or dropped:
            changes[f"dropped: {dropped}"] += 1
            yield _Change("", f"@@ -{number} +{written},0 @@\n-{_before(item.row, scrub=scrub)}\n")
            continue
        written += 1
        line = _line(row)
        if row == item.row:
            yield _Change(f"{line}\n", "")
            continue
        changes.update(_kinds(item.row, scrub=scrub))
        yield _Change(f"{line}\n", f"@@ -{number} +{written} @@\n-{_before(item.row, scrub=scrub)}\n+{line}\n")


def _kinds(row: AnyRow, *, scrub: bool) -> Iterator[str]:
    """What :func:`mend` does to the texts of `row`."""
    for _, text in contents(row):
        yield from (f"repaired: {flaw.kind}" for flaw in flaws(text) if flaw.kind in REPAIRED)
        if scrub:
            yield from (f"replaced: {found.kind}" for found in sensitive.find(repair(text), row.language))
    for item in (isinstance(row, Row) and row.evidence) or ():
        if item.quote != unicodedata.normalize("NFC", item.quote):
            yield "repaired: not NFC"


def _with_texts(row: AnyRow, texts: Sequence[str]) -> AnyRow:
    if isinstance(row, Text):
        return row.model_copy(update={"text": texts[0]})
    messages = tuple(
        message.model_copy(update={"content": text}) for message, text in zip(row.messages, texts, strict=True)
    )
    evidence = row.evidence and tuple(
        item.model_copy(update={"quote": unicodedata.normalize("NFC", item.quote)}) for item in row.evidence
    )
    return row.model_copy(update={"messages": messages, "evidence": evidence})


def _before(row: AnyRow, *, scrub: bool) -> str:
    """`row` as it was read; what is scrubbed is masked here too, or the diff would keep it."""
    if scrub:
        row = _with_texts(row, [sensitive.replace(text, row.language, masked=True) for _, text in contents(row)])
    return _line(row)


def _line(row: AnyRow) -> str:
    return row.model_dump_json(exclude_defaults=True)


# -- where it is written -----------------------------------------------------------------------------------------


def _check_directory(directory: Path, sources: Sequence[str], *, force: bool) -> None:
    there = directory.resolve()
    for source in sources:
        if source.startswith(HUB):
            continue
        path = Path(source).resolve()
        if path == there or there in path.parents or path in there.parents:
            raise BadInput(f"--fix {directory}: holds the source {source} or lies in it; name another directory")
    if directory.is_file():
        raise BadInput(f"--fix {directory}: is a file; name a directory")
    if not force and directory.is_dir() and any(directory.iterdir()):
        raise BadInput(f"--fix {directory}: is not empty; name another directory, or replace it with --force")


def _names(sources: Sequence[str]) -> list[str]:
    """A file name for the copy of each of `sources`, none twice."""
    names: list[str] = []
    for source in sources:
        path = source.removeprefix(HUB).partition("#")[0].partition("@")[0] if source.startswith(HUB) else source
        stem = Path(path).name if source.startswith(HUB) or Path(path).is_dir() else Path(path).stem
        tries = (f"{stem}{f'-{number}' if number > 1 else ''}.jsonl" for number in count(1))
        names.append(next(name for name in tries if name not in names))
    return names


def _replace(partial: Path, directory: Path) -> None:
    if directory.is_dir():
        old = directory.with_name(f".{directory.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        directory.rename(old)
        partial.rename(directory)
        shutil.rmtree(old)
    else:
        partial.rename(directory)
