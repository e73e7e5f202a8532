"""PDF -> text page by page: paragraphs, headings by the size of their letters, running headers and footers left out.

pypdf decodes the pages; it limits what a stream may unpack to and what a page may compute. What is larger than most of
the text is a heading, the larger the higher; a wider gap between lines is a paragraph; a word cut at the end of a line
is whole again. Lines near the edge that stand at the same height on most pages, alike up to numbers, are left out.

Not covered: pictures of text (OCR), several columns beyond the order the file draws them in, tables as tables, headings
that are only bold, bookmarks, forms and annotations.
"""

from __future__ import annotations

import io
import logging
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

from pypdf import PageObject, PdfReader
from pypdf.errors import DependencyError, PdfReadError
from pypdf.generic import ArrayObject, StreamObject

from retrieval.read.base import Extract, Unreadable
from retrieval.read.clean import clean, literal, one_line
from retrieval.structure import title_of

logging.getLogger("pypdf").setLevel(
    logging.CRITICAL
)  # it logs what it repairs or guesses; what it cannot read it raises

MARGIN = 0.12
"""Share of a page at the top and at the bottom in which running lines stand."""
REPEATED = 0.4
"""Share of the pages that a running line stands on; headers of left and right pages may differ."""
FEWEST = 3
"""Pages that a line must stand on to be a running one."""
LARGER = 1.15
"""How much larger than the text a heading is."""
LONGEST_HEADING = 200
GAP = 1.4
"""How much wider than most the gap is that ends a paragraph."""
BROKEN_PAGES = 10
"""So many pages that cannot be read, and the file is given up."""
NUMBER = re.compile(r"\d+")
HYPHEN = re.compile(r"(\w+)[-\u2010\u00ad]$")
FIRST = re.compile(r"\w+")
BULLET = re.compile(r"^\s*[•▪●◦‣∙]\s*")
MADE_UP = re.compile(
    r"^(?:untitled|microsoft word.*|.*\.(?:docx?|pdf|odt|rtf|indd|tex|pptx?|xlsx?)|\W*)$", re.IGNORECASE
)
"""Titles that a program gave."""


@dataclass(frozen=True, slots=True)
class _Line:
    text: str
    size: float
    """Height of its letters in points."""
    y: float
    """Height on the page, in points from its lower edge."""


@dataclass(frozen=True, slots=True)
class _Page:
    lines: list[_Line]
    height: float


def read_pdf(data: bytes, boilerplate: bool, longest: int) -> Extract:
    """Text with the offsets of its pages.

    Args:
        boilerplate: leave out running headers and footers.
        longest: bytes of page content after which a file is given up.

    Raises:
        Unreadable: broken, encrypted, without text, or longer than `longest`.
    """
    try:
        reader = PdfReader(io.BytesIO(data))
        if reader.is_encrypted and not reader.decrypt(""):
            raise Unreadable("encrypted; save it without a password")
        count = len(reader.pages)
    except DependencyError as error:
        raise Unreadable(f"encrypted ({error}); save it without a password") from None
    except PdfReadError as error:
        raise Unreadable(f"not a PDF that can be read ({error}); save it again") from None
    pages, notes = _pages(reader, count, longest)
    silent = [number for number, page in enumerate(pages, 1) if not page.lines]
    if len(silent) == count:
        raise Unreadable("holds no text, only pictures; run OCR on it" if count else "holds no page")
    if silent:
        notes.append(f"pages without text: {_listed(silent)}; run OCR on it if they are scans")
    if boilerplate and (running := _running(pages)):
        left = sum(len(each) for each in running.values())
        sample = next(iter(sorted(line.text for each in running.values() for line in each)))
        notes.append(f"left out {left} lines that repeat on most pages (such as {sample[:60]!r})")
        pages = [
            _Page([line for line in page.lines if line not in running[number]], page.height)
            for number, page in enumerate(pages)
        ]
    return _joined(pages, reader, notes)


def _pages(reader: PdfReader, count: int, longest: int) -> tuple[list[_Page], list[str]]:
    pages: list[_Page] = []
    broken: list[int] = []
    unpacked = 0
    for number in range(count):
        try:
            page = reader.pages[number]
            unpacked += _size(page)
            lines = list(_lines(page)) if unpacked <= longest else []
            height = float(page.mediabox.height)
        except Exception as error:  # a page that pypdf fails on costs that page; it raises whatever comes
            broken.append(number + 1)
            lines, height = [], 0.0
            if len(broken) == min(count, BROKEN_PAGES):
                raise Unreadable(f"pages {_listed(broken)} cannot be read ({error}); save it again") from None
        if unpacked > longest:
            raise Unreadable(
                f"its pages unpack to more than {longest / 1e6:.0f} MB; split it or raise knowledge.max_file_mb"
            )
        pages.append(_Page(lines, height))
    return pages, [f"pages that cannot be read: {_listed(broken)}"] if broken else []


def _size(page: PageObject) -> int:
    """Bytes of what a page draws, unpacked."""
    contents = page.get("/Contents", ArrayObject()).get_object()
    streams = [each.get_object() for each in contents] if isinstance(contents, ArrayObject) else [contents]
    return sum(len(stream.get_data()) for stream in streams if isinstance(stream, StreamObject))


def _lines(page: PageObject) -> Iterator[_Line]:
    """The lines of a page in the order they are drawn in."""
    text: list[str] = []
    sizes: Counter[float] = Counter()
    y = 0.0
    lines: list[_Line] = []

    def end() -> None:
        nonlocal text
        line = " ".join("".join(text).split())
        if line:
            lines.append(_Line(line, sizes.most_common(1)[0][0], y))
        text = []
        sizes.clear()

    def take(piece: str, cm: list[float], tm: list[float], _font: Any, size: float) -> None:
        nonlocal y
        for number, part in enumerate(piece.split("\n")):
            if number:
                end()
            if part.strip():
                if not sizes:
                    y = tm[4] * cm[1] + tm[5] * cm[3] + cm[5]
                scale = math.hypot(tm[2], tm[3]) * math.hypot(cm[2], cm[3])
                sizes[round(abs(size) * scale * 2) / 2] += len(part.strip())
            text.append(part)

    page.extract_text(visitor_text=take)
    end()
    yield from lines


def _running(pages: list[_Page]) -> dict[int, set[_Line]]:
    """Page -> its running lines."""
    places: dict[tuple[str, int], dict[int, set[_Line]]] = defaultdict(lambda: defaultdict(set))
    for number, page in enumerate(pages):
        for line in page.lines:
            if not MARGIN * page.height < line.y < (1 - MARGIN) * page.height:
                form = NUMBER.sub("#", line.text) if len(NUMBER.findall(line.text)) <= 2 else line.text
                places[form, round(line.y / 2)][number].add(line)
    enough = max(FEWEST, REPEATED * sum(bool(page.lines) for page in pages))
    running: dict[int, set[_Line]] = defaultdict(set)
    for found in places.values():
        if len(found) >= enough:
            for number, lines in found.items():
                running[number] |= lines
    return running


def _joined(pages: list[_Page], reader: PdfReader, notes: list[str]) -> Extract:
    levels = _levels(pages)
    gap = _gap(pages)
    words = {word.strip(".,;:!?()") for page in pages for line in page.lines for word in line.text.split()}
    offsets: list[int] = []
    parts: list[str] = []
    length = 0
    for page in pages:
        text = clean(_page(page, levels, gap, words))
        if text and parts:
            last = parts[-1].rstrip()[-1:]
            parts.append("\n" if last.isalnum() and text[0].islower() else "\n\n")
            length += len(parts[-1])
        offsets.append(length)
        if text:
            parts.append(text)
            length += len(text)
    text = "".join(parts)
    return Extract(text, _title(reader, text), pages=tuple(offsets), notes=notes)


def _levels(pages: list[_Page]) -> dict[float, int]:
    """Size of letters -> level of the headings in it."""
    letters: Counter[float] = Counter()
    for page in pages:
        for line in page.lines:
            letters[line.size] += len(line.text)
    if not letters:
        return {}
    body = letters.most_common(1)[0][0]
    larger = sorted((size for size in letters if size >= LARGER * body), reverse=True)
    if sum(letters[size] for size in larger) > 0.3 * letters.total():
        return {}
    return {size: min(level, 6) for level, size in enumerate(larger, 1)}


def _gap(pages: list[_Page]) -> float:
    """Usual distance of two lines of a paragraph."""
    gaps = [above.y - below.y for page in pages for above, below in zip(page.lines, page.lines[1:], strict=False)]
    return median([gap for gap in gaps if gap > 0] or [math.inf])


def _page(page: _Page, levels: dict[float, int], gap: float, words: set[str]) -> str:
    """The text of a page."""
    blocks: list[tuple[int, str]] = []  # (level of a heading, 0 for text; text)
    above: _Line | None = None
    for line in page.lines:
        level, text = levels.get(line.size, 0), line.text
        if len(text) > LONGEST_HEADING or not re.search(r"[^\W\d_]{2}", text):
            level = 0
        near = above is not None and 0 < above.y - line.y <= GAP * max(gap, line.size * 1.2)
        if blocks and near and level == blocks[-1][0] and not (level and len(blocks[-1][1]) > LONGEST_HEADING):
            blocks[-1] = (level, f"{blocks[-1][1]} {text}" if level else _appended(blocks[-1][1], text, words))
        else:
            blocks.append((level, text if level else BULLET.sub("- ", text)))
        above = line
    return "\n\n".join("#" * level + " " + text if level else literal(text) for level, text in blocks)


def _appended(block: str, line: str, words: set[str]) -> str:
    """`block` with one more line, whole again where a word was cut: a hyphen stays if the text has such a word."""
    cut = HYPHEN.search(block[-80:])
    rest = FIRST.match(line)
    if cut and rest and rest.group().islower():
        begun, ended = cut.group(1), rest.group()
        kept = block[-1] == "-" and f"{begun}-{ended}" in words and begun + ended not in words
        return (block if kept else block[:-1]) + line
    return f"{block}\n{BULLET.sub('- ', line)}"


def _title(reader: PdfReader, text: str) -> str:
    """What the file says it is called, else its first heading of the first level."""
    try:
        named = one_line(str(reader.metadata.title or "")) if reader.metadata else ""
    except Exception:  # a broken entry costs the title only; pypdf raises whatever comes
        named = ""
    if named and not MADE_UP.match(named):
        return named
    return title_of(text)


def _listed(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:10]))
    return shown + (f" and {len(numbers) - 10} more" if len(numbers) > 10 else "")
