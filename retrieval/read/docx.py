"""DOCX -> text with Markdown structure: headings by style or outline level, list items, tables.

python-docx opens the package and knows the styles; the text is taken from the XML itself, so that insertions, links,
content controls and text boxes are in it and deletions are not. Page headers and footers are parts of their own, and
not read. Not covered: numbers of lists and headings, foot- and endnotes, comments, pictures, pages (Word computes them).
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any, cast
from zipfile import BadZipFile

import docx
from docx.document import Document
from docx.opc.exceptions import PackageNotFoundError
from docx.oxml.ns import qn

from retrieval.read import archive
from retrieval.read.base import Extract, Unreadable
from retrieval.read.clean import clean, literal, one_line, table

OLE = bytes.fromhex("d0cf11e0a1b11ae1")
"""How Word files before 2007 begin, and encrypted ones."""
P, TBL, TR, TC, T = qn("w:p"), qn("w:tbl"), qn("w:tr"), qn("w:tc"), qn("w:t")
WRAPPERS = {qn("w:sdt"), qn("w:sdtContent"), qn("w:ins"), qn("w:moveTo"), qn("w:customXml"), qn("w:smartTag")}
GONE = {qn("w:del"), qn("w:moveFrom"), "{http://schemas.openxmlformats.org/markup-compatibility/2006}Fallback"}
BREAKS = {qn("w:br"): "\n", qn("w:cr"): "\n", qn("w:tab"): " ", qn("w:noBreakHyphen"): "-", P: "\n"}
VALUE = qn("w:val")
Element = Any
"""An element of lxml, which has no types."""


def read_docx(data: bytes, longest: int) -> Extract:
    """Text and title of a Word document.

    Args:
        longest: bytes that its parts may unpack to.

    Raises:
        Unreadable: broken, encrypted, of another format, or a bomb.
    """
    if data.startswith(OLE):
        raise Unreadable("an encrypted or old Word file; save it as DOCX without a password")
    archive.check(data, longest)
    try:
        document = docx.Document(io.BytesIO(data))
    except (KeyError, ValueError, PackageNotFoundError, BadZipFile, SyntaxError) as error:
        raise Unreadable(f"not a Word document that can be read ({error}); save it again") from None
    levels = _levels(document)
    items = _item_styles(document)
    blocks: list[tuple[bool, str]] = []  # (whether it is an item of a list, text)
    titles: dict[int, str] = {}
    for element in _body(document.element.body):
        if element.tag == TBL:
            blocks += [(False, text) for text in _table(element)]
            continue
        text = clean(_text(element)).strip()
        level = _level(element, levels)
        if text and level is not None:
            text = one_line(text)
            titles.setdefault(level, text)
            blocks.append((False, "#" * max(level, 1) + " " + text))
        elif text and (depth := _depth(element, items)) is not None:
            blocks.append((True, "  " * depth + "- " + text))
        elif text:
            blocks.append((False, literal(text)))
    title = one_line(document.core_properties.title or "") or titles.get(0) or titles.get(1) or ""
    return Extract(_joined(blocks), title)


def _body(parent: Element) -> Iterator[Element]:
    """Paragraphs and tables in order, also those inside content controls and insertions."""
    for element in parent.iterchildren():
        if element.tag in (P, TBL):
            yield element
        elif element.tag in WRAPPERS:
            yield from _body(element)


def _text(parent: Element) -> str:
    parts: list[str] = []
    waiting = list(reversed(parent))
    while waiting:
        element = waiting.pop()
        if element.tag == T:
            parts.append(element.text or "")
        elif element.tag in BREAKS:
            parts.append(BREAKS[element.tag])
        if element.tag not in GONE:
            waiting.extend(reversed(element))
    return "".join(parts)


def _table(element: Element) -> list[str]:
    """A table of several columns as one, any other as the paragraphs in it. A merged cell says the same in each row."""
    rows: list[list[str]] = []
    for row in element.iter(TR):
        if next(row.iterancestors(TBL)) is not element:
            continue  # a row of a table inside a cell, which is part of the text of that cell
        cells: list[str] = []
        for each in (cell for cell in row.iter(TC) if next(cell.iterancestors(TR)) is row):
            merged = each.find(f"{qn('w:tcPr')}/{qn('w:vMerge')}")
            if merged is not None and merged.get(VALUE) != "restart" and rows and len(cells) < len(rows[-1]):
                cells.append(rows[-1][len(cells)])
            else:
                cells.append(clean(_text(each)).strip())
            span = each.find(f"{qn('w:tcPr')}/{qn('w:gridSpan')}")
            cells += [""] * (_number(span, 1) - 1)
        rows.append(cells)
    if sum(len(row) > 1 for row in rows) > 1:
        return [text] if (text := table(rows)) else []
    return [literal(text) for row in rows for text in row if text]


def _levels(document: Document) -> dict[str, int]:
    """Style id -> level of heading, 0 for the title of the document; as the style says, or the one it is based on."""
    levels: dict[str, int] = {}
    bases: dict[str, str] = {}
    for style in document.styles.element.iterchildren(qn("w:style")):
        own, name = str(style.get(qn("w:styleId"))), _value(style, "w:name").lower()
        level = _outline(style)
        if name == "title":
            levels[own] = 0
        elif name.startswith("heading ") and name[8:].isdigit():
            levels[own] = min(int(name[8:]), 6)
        elif level is not None:
            levels[own] = level
        elif base := _value(style, "w:basedOn"):
            bases[own] = base
    for style, base in bases.items():
        seen = {style}
        while base in bases and base not in seen:
            seen.add(base)
            base = bases[base]
        if base in levels:
            levels[style] = levels[base]
    return levels


def _item_styles(document: Document) -> set[str]:
    """Ids of the styles of list items."""
    return {
        str(style.get(qn("w:styleId")))
        for style in document.styles.element.iterchildren(qn("w:style"))
        if _value(style, "w:name").lower().startswith(("list bullet", "list number")) or _numbered(style) is not None
    }


def _value(element: Element, name: str) -> str:
    child = element.find(qn(name))
    return "" if child is None else str(child.get(VALUE, ""))


def _level(element: Element, levels: dict[str, int]) -> int | None:
    own = _outline(element)
    return own if own is not None else levels.get(_style(element))


def _depth(element: Element, items: set[str]) -> int | None:
    """How deep in lists a paragraph is an item; None if it is none."""
    numbered = _numbered(element)
    if numbered is not None:
        if _number(numbered.find(qn("w:numId")), 0) == 0:
            return None
        return min(_number(numbered.find(qn("w:ilvl")), 0), 8)
    return 0 if _style(element) in items else None


def _style(element: Element) -> str:
    style = element.find(f"{qn('w:pPr')}/{qn('w:pStyle')}")
    return "" if style is None else str(style.get(VALUE))


def _numbered(element: Element) -> Element | None:
    return element.find(f"{qn('w:pPr')}/{qn('w:numPr')}")


def _outline(element: Element) -> int | None:
    """Level of heading that a paragraph or style names itself; body text is level 9 there."""
    level = element.find(f"{qn('w:pPr')}/{qn('w:outlineLvl')}")
    number = 9 if level is None else _number(level, 9)
    return min(number + 1, 6) if number < 9 else None


def _number(element: Element | None, default: int) -> int:
    value = "" if element is None else cast(str, element.get(VALUE, ""))
    return min(int(value[:4]), 100) if value.isdigit() else default


def _joined(blocks: list[tuple[bool, str]]) -> str:
    parts: list[str] = []
    before = False
    for item, text in blocks:
        parts += ["\n" if item and before else "\n\n" if parts else "", text]
        before = item
    return "".join(parts) + ("\n" if parts else "")
