"""Text as it is indexed: Unicode NFC, ``\\n`` line ends, and nothing in it that cannot be seen.

Soft hyphens, zero-width spaces and control characters go; spaces that do not break become spaces. The joiners of
Indic scripts and of emoji stay, they are spelling. Not covered: full-width forms and ligatures (NFKC), which are the
analyzer's and the embedder's affair.
"""

from __future__ import annotations

import re
import unicodedata

LONGEST_TITLE = 300
LINE_ENDS = re.compile("\r\n?|[\x0b\x0c\x85\u2028]")
SURROGATES = re.compile("[\ud800-\udfff]")
TABLE: dict[int, str | None] = {
    **dict.fromkeys((code for code in range(32) if code not in (9, 10)), None),
    **dict.fromkeys(range(0x7F, 0xA0), None),
    **dict.fromkeys((0xAD, 0x180E, 0x200B, 0x2060, 0xFEFF), None),
    **dict.fromkeys((0xA0, 0x2007, 0x202F), " "),
    0x2029: "\n\n",
}
STRUCTURAL = re.compile(r"^( {0,3})(?=#{1,6}(?:\s|$)|`{3}|~{3}|(?:={2,}|-{2,})\s*$)", re.MULTILINE)
"""A line that Markdown would take for a heading, a fence or an underline."""


def clean(text: str) -> str:
    """`text` as it is indexed."""
    if "\r" in text or "\x0b" in text or "\x0c" in text or not text.isascii():
        text = LINE_ENDS.sub("\n", text)
    if not text.isascii():
        text = SURROGATES.sub("\ufffd", text)
    elif text.isprintable():
        return text
    return unicodedata.normalize("NFC", text.translate(TABLE))


def one_line(text: str) -> str:
    """`text` as a title: cleaned, on one line, not longer than :data:`LONGEST_TITLE`."""
    words = " ".join(clean(text).split())
    return words if len(words) <= LONGEST_TITLE else words[: LONGEST_TITLE - 1].rstrip() + "…"


def literal(text: str) -> str:
    """Text that is no Markdown, so that chunking sees no structure in it that its format did not have."""
    return STRUCTURAL.sub(r"\1\\", text)


def cell(text: str) -> str:
    """Text as a cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")


def table(rows: list[list[str]]) -> str:
    """Rows of cells, the first naming the columns, as a Markdown table; empty without a cell that says something."""
    said = [cells for row in rows if any(cells := [cell(text) for text in row])]
    if not said:
        return ""
    first, *others = (f"| {' | '.join(row)} |" for row in said)
    return "\n".join([first, "|" + "---|" * len(said[0]), *others])
