"""The skeleton of a Markdown text: where its headings, code fences and tables are, as offsets.

Headings are ``#`` to ``######`` and lines underlined with ``=`` or ``-`` (setext); a table is a row of names over a
row of dashes. Inside a fence nothing counts. Time is linear in the length of the text, whatever it holds.

Not covered: headings of several lines, HTML inside Markdown, tables without a row of dashes, fences inside lists
that are indented by four spaces or more.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

LONGEST_HEADING = 300
"""Characters; a longer line is text, whatever it begins with."""
MARKER = re.compile(r" {0,3}(#{1,6})(?=[ \t]|$)")
FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
UNDERLINE = re.compile(r" {0,3}(={2,}|-{2,})[ \t]*$")
NOT_UNDERLINED = re.compile(r" {4}|\t| {0,3}(?:[-*+>|]|\d+[.)])(?:\s|$)| {0,3}\|")
"""How a line begins that a line of dashes under it does not make a heading: code, an item, a quote, a table row."""
DELIMITER = frozenset("|:- \t")


@dataclass(frozen=True, slots=True)
class Heading:
    """One heading; its lines are ``text[start:end]``, the last line end included."""

    level: int
    """1 to 6."""
    name: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Table:
    """One table; ``text[start:body]`` are its names and the dashes, ``text[body:end]`` the rows."""

    start: int
    body: int
    end: int
    rows: tuple[int, ...]
    """Where each row of the body begins."""


@dataclass(frozen=True, slots=True)
class Outline:
    """What :func:`outline` found, each kind in order of place."""

    headings: tuple[Heading, ...]
    fences: tuple[tuple[int, int], ...]
    """(start, end) of each fenced block with its marks; one that is never closed goes on to the end."""
    tables: tuple[Table, ...]


def outline(text: str) -> Outline:
    """Headings, fences and tables of `text`."""
    lines = text.split("\n")
    headings: list[Heading] = []
    fences: list[tuple[int, int]] = []
    tables: list[Table] = []
    start = 0
    number = 0
    free = True  # whether the line before is blank or a heading, so that this one may be underlined
    while number < len(lines):
        line = lines[number]
        end = start + len(line) + 1
        if not line:
            number, start, free = number + 1, end, True
            continue
        if opening := FENCE.match(line):
            count = _fence_lines(lines, number, opening.group(1))
            end = start + sum(len(each) + 1 for each in lines[number : number + count])
            fences.append((start, min(end, len(text))))
            number, start, free = number + count, end, False
            continue
        following = lines[number + 1] if number + 1 < len(lines) else ""
        heading = _marked(line) or (_underlined(line, following) if free else None)
        if heading:
            level, name, count = heading
            if count == 2:
                end += len(following) + 1
            headings.append(Heading(level, name, start, min(end, len(text))))
            number, start, free = number + count, end, True
            continue
        if "|" in line and "|" in following and "-" in following and DELIMITER.issuperset(following):
            table, count = _table(lines, number, start, len(text))
            tables.append(table)
            number, start, free = number + count, table.end, False
            continue
        free = not line.strip()
        number, start = number + 1, end
    return Outline(tuple(headings), tuple(fences), tuple(tables))


def title_of(text: str) -> str:
    """The first heading of the first level that has a name; empty without one."""
    return next((heading.name for heading in outline(text).headings if heading.level == 1 and heading.name), "")


def _marked(line: str) -> tuple[int, str, int] | None:
    marker = MARKER.match(line) if len(line) <= LONGEST_HEADING else None
    if marker is None:
        return None
    name = line[marker.end() :].strip(" \t")
    shorter = name.rstrip("#")
    if shorter != name and (not shorter or shorter[-1] in " \t"):
        name = shorter.rstrip(" \t")
    return len(marker.group(1)), name, 1


def _underlined(line: str, following: str) -> tuple[int, str, int] | None:
    if not line.strip() or len(line) > LONGEST_HEADING or NOT_UNDERLINED.match(line) or UNDERLINE.match(line):
        return None
    underline = UNDERLINE.match(following)
    return (1 if underline.group(1)[0] == "=" else 2, line.strip(), 2) if underline else None


def _fence_lines(lines: list[str], first: int, mark: str) -> int:
    """Lines of the fenced block that begins at line `first`."""
    for number in range(first + 1, len(lines)):
        closing = FENCE.match(lines[number])
        if closing and closing.group(1).startswith(mark) and not lines[number][closing.end() :].strip():
            return number + 1 - first
    return len(lines) - first


def _table(lines: list[str], first: int, start: int, length: int) -> tuple[Table, int]:
    body = place = start + len(lines[first]) + len(lines[first + 1]) + 2
    rows: list[int] = []
    for line in lines[first + 2 :]:
        if "|" not in line or FENCE.match(line):
            break
        rows.append(place)
        place += len(line) + 1
    return Table(start, min(body, length), min(place, length), tuple(rows)), 2 + len(rows)
