"""Document -> :class:`Chunk`, along the document's own structure.

Headings (``#`` to ``######``, outside code fences) open a section and become the heading path; a chunk never
crosses one. Inside a section, paragraphs, list items and table rows are packed up to the token budget; only what is
longer than the budget alone is cut, at sentences, then words, then characters. Nothing is lost or rewritten: without
overlap, the chunks of a section are its text, cut at white space wherever there is any. Underlined (setext)
headings are treated as text.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterator

from retrieval.types import Chunk, Document

CountTokens = Callable[[str], int]

HEADING = re.compile(r"^ {0,3}(#{1,6})(?:[ \t]+(.*?))?(?:[ \t]+#+)?[ \t]*$")
FENCE = re.compile(r"^ {0,3}(```|~~~)")
BLOCK = re.compile(r"(?=\n[ \t]*(?:\n|(?:[-*+]|\d+[.)])[ \t]|\|))")
"""The line break before a blank line, a list item or a table row; what lies between two is kept whole if it fits."""
FINER = (
    re.compile(r"(?<=[.!?…]\s)|(?<=[。！？])"),  # sentences
    re.compile(r"(?<=\s)(?=\S)"),  # words
    re.compile(r"(?<=.)(?=.)", re.DOTALL),  # characters
)


def chunk(document: Document, *, chunk_tokens: int, overlap_tokens: int = 0, count_tokens: CountTokens) -> list[Chunk]:
    """Cut `document` into chunks of at most `chunk_tokens`, in reading order.

    With `overlap_tokens`, a chunk starts with the last words of the one before it in the same section, so many
    tokens at most; they count towards `chunk_tokens`.
    """
    chunks: list[Chunk] = []
    seen: Counter[tuple[str, str]] = Counter()
    for heading, section in _sections(document):
        for text in _pack(section, chunk_tokens, overlap_tokens, count_tokens):
            chunks.append(
                Chunk(
                    chunk_id=_chunk_id(document.doc_id, heading, text, seen[heading, text]),
                    doc_id=document.doc_id,
                    title=document.title,
                    heading=heading,
                    text=text,
                    position=len(chunks),
                    source=document.source,
                    metadata=document.metadata,
                )
            )
            seen[heading, text] += 1
    return chunks


def _chunk_id(doc_id: str, heading: str, text: str, repeat: int) -> str:
    """128 bits over what the chunk says and where; `repeat` tells identical texts of one section apart."""
    parts = [doc_id, heading, text, *([str(repeat)] if repeat else [])]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _sections(document: Document) -> Iterator[tuple[str, str]]:
    """(heading path, text) in order. A first-level heading that repeats the title is left out of the path."""
    path: dict[int, str] = {}
    lines: list[str] = []
    fence = ""
    for line in document.text.split("\n"):
        marker = FENCE.match(line)
        if marker and fence in ("", marker.group(1)):
            fence = "" if fence else marker.group(1)
        heading = None if fence else HEADING.match(line)
        if heading is None:
            lines.append(line)
            continue
        yield " > ".join(path.values()), "\n".join(lines)
        lines = []
        level, name = len(heading.group(1)), heading.group(2)
        path = {above: text for above, text in path.items() if above < level}
        if name and not (level == 1 and name == document.title):
            path[level] = name
    yield " > ".join(path.values()), "\n".join(lines)


def _pack(section: str, chunk_tokens: int, overlap_tokens: int, count: CountTokens) -> Iterator[str]:
    budget = chunk_tokens - overlap_tokens
    packed = ""
    overlap = ""
    pieces = (piece for block in BLOCK.split(section) for piece in _cut(block, budget, count, FINER))
    for piece in pieces:
        if packed.strip() and count((packed + piece).strip()) > budget:
            yield overlap + packed.strip()
            overlap = _tail(packed, overlap_tokens, count)
            packed = ""
        packed += piece
    if packed.strip():
        yield overlap + packed.strip()


def _cut(text: str, limit: int, count: CountTokens, cuts: tuple[re.Pattern[str], ...]) -> Iterator[str]:
    """`text` in pieces of at most `limit` tokens, cut no finer than needed; joined they are `text` again."""
    if not cuts or count(text.strip()) <= limit:
        yield text
        return
    for part in cuts[0].split(text):
        yield from _cut(part, limit, count, cuts[1:])


def _tail(text: str, tokens: int, count: CountTokens) -> str:
    """The last words of `text` that fit `tokens`, with a space after them; empty if not even one does."""
    tail = ""
    for word in reversed(text.split()):
        longer = f"{word} {tail}"
        if count(longer.strip()) > tokens:
            break
        tail = longer
    return tail
