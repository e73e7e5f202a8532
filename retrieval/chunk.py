"""Document -> :class:`Chunk`, along the document's own structure.

Headings (``retrieval.structure``) open a section and become the heading path; a chunk never crosses one. Inside a
section, paragraphs, list items, table rows and fenced code are packed up to the token budget; only what is longer than
the budget alone is cut: code at lines, text at sentences, then words, then characters. Nothing is lost or rewritten:
without overlap, the chunks of a section are its text, cut at white space wherever there is any.

A chunk that begins inside a table starts with the names of its columns once more, because a row is hardly found, and
not understood, without them. Like an overlap they are no part of ``text[start:end]``.

Token counts are asked of pieces that are not longer than a chunk, a few times for each chunk, so time grows with the
length of a document and not with its square, even where it is one endless line.
"""

from __future__ import annotations

import hashlib
import re
from array import array
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

from retrieval.structure import Outline, Table, outline
from retrieval.types import Chunk, Document

CountTokens = Callable[[str], int]

BLOCK = re.compile(r"(?<!\n)(?=\n[ \t]*(?:\n|(?:[-*+]|\d+[.)])[ \t]|\|))")
"""The line break before a blank line, a list item or a table row; what lies between two is kept whole if it fits."""
LINE = re.compile(r"(?<=\n)")
SENTENCE = re.compile(r"(?<=[.!?…]\s)|(?<=[。！？])")
WORD = re.compile(r"(?<=\s)(?=\S)")
VISIBLE = re.compile(r"\S")
TOKENS_A_CHARACTER = 4
"""At most: the bytes of one in UTF-8. What is so short that it fits in any case is not counted."""
CHARACTERS_A_TOKEN = 64
GUESSES = 4
"""How often the end of a chunk is guessed from its length before the interval is halved."""
LONGEST = 12_000
"""Characters of a chunk at most; with title and headings it then fits the 65,535 bytes of a Milvus text column."""


def chunk(document: Document, *, chunk_tokens: int, overlap_tokens: int = 0, count_tokens: CountTokens) -> list[Chunk]:
    """Cut `document` into chunks of at most `chunk_tokens`, in reading order.

    With `overlap_tokens`, a chunk starts with the last words of the one before it in the same section, so many
    tokens at most; they count towards `chunk_tokens`, as do repeated names of columns.
    """
    text, found = document.text, outline(document.text)
    cutter = _Cutter(text, found, chunk_tokens, overlap_tokens, count_tokens)
    chunks: list[Chunk] = []
    seen: Counter[tuple[str, str]] = Counter()
    for heading, first, last in _sections(document, found):
        for before, start, end in cutter.pack(first, last):
            words = before + text[start:end]
            chunks.append(
                Chunk(
                    chunk_id=_chunk_id(document.doc_id, heading, words, seen[heading, words]),
                    doc_id=document.doc_id,
                    title=document.title,
                    heading=heading,
                    text=words,
                    position=len(chunks),
                    source=document.source,
                    metadata=document.metadata,
                    page=bisect_right(document.pages, start),
                    start=start,
                    end=end,
                )
            )
            seen[heading, words] += 1
    return chunks


def _chunk_id(doc_id: str, heading: str, text: str, repeat: int) -> str:
    """128 bits over what the chunk says and where; `repeat` tells identical texts of one section apart."""
    parts = [doc_id, heading, text, *([str(repeat)] if repeat else [])]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _sections(document: Document, found: Outline) -> Iterator[tuple[str, int, int]]:
    """(heading path, start, end) in order. A first-level heading that repeats the title is left out of the path."""
    path: dict[int, str] = {}
    start = 0
    for heading in found.headings:
        yield " > ".join(path.values()), start, heading.start
        path = {above: name for above, name in path.items() if above < heading.level}
        if heading.name and not (heading.level == 1 and heading.name == document.title):
            path[heading.level] = heading.name
        start = heading.end
    yield " > ".join(path.values()), start, len(document.text)


@dataclass(frozen=True, slots=True)
class _Block:
    """What is kept whole if it fits."""

    start: int
    end: int
    cuts: tuple[re.Pattern[str], ...] = (SENTENCE, WORD)
    """Where it is cut if it does not fit, coarse before fine; after the last at any character."""
    names: str = ""
    """The names of columns that a chunk beginning here repeats."""


class _Cutter:
    """Cuts the sections of one text."""

    def __init__(self, text: str, found: Outline, chunk_tokens: int, overlap_tokens: int, count: CountTokens) -> None:
        self.text = text
        self.count = count
        self.overlap = overlap_tokens
        self.budget = chunk_tokens - overlap_tokens
        self.longest = min(CHARACTERS_A_TOKEN * chunk_tokens, LONGEST)
        self.rate = 0.25
        """Tokens a character, as last seen; where a chunk may end is guessed by it, then counted."""
        spans = [*((start, end, None) for start, end in found.fences), *((t.start, t.end, t) for t in found.tables)]
        self.spans = sorted(spans, key=lambda span: span[0])
        self.bodies = [table.body for table in found.tables]
        self.tables = [(table, self._names(table)) for table in found.tables]

    def pack(self, first: int, last: int) -> Iterator[tuple[str, int, int]]:
        """(what is repeated before it, start, end) of each chunk of ``text[first:last]``."""
        ends = self._pieces(first, last)
        piece, overlap = 0, ""
        while piece < len(ends):
            visible = VISIBLE.search(self.text, ends[piece - 1] if piece else first, last)
            if visible is None:
                return
            start = visible.start()
            names = self._repeated(start)
            words = partial(self._words, names, start)
            piece = self._furthest(ends, bisect_right(ends, start), start - len(names), self.budget, words)
            end = start + len(self.text[start : ends[piece]].rstrip())
            yield names or overlap, start, end
            overlap = self._tail(start, end) if self.overlap else ""
            piece += 1

    def _pieces(self, first: int, last: int) -> Sequence[int]:
        """Where the pieces of ``text[first:last]`` end; each fits a chunk."""
        ends = array("q")
        for block in self._blocks(first, last):
            room = self.budget - self.count(block.names) if block.names else self.budget
            self._cut(ends, block.start, block.end, room, block.cuts)
        return ends

    def _cut(self, ends: array[int], start: int, end: int, room: int, cuts: tuple[re.Pattern[str], ...]) -> None:
        if self._fits(self.text[start:end].strip(), room):
            ends.append(end)
        elif cuts:
            for a, b in _between(start, (match.start() for match in cuts[0].finditer(self.text, start, end)), end):
                self._cut(ends, a, b, room, cuts[1:])
        else:
            ends.extend(range(start + 1, end + 1))

    def _blocks(self, first: int, last: int) -> Iterator[_Block]:
        place = first
        for start, end, table in self.spans[bisect_left(self.spans, first, key=_start) :]:
            if start >= last:
                break
            yield from self._paragraphs(place, start - 1)
            place = max(place, start - 1)  # the line break before it goes with it
            closed = end - 1 if self.text[end - 1] == "\n" else end
            if table is None:
                yield _Block(place, closed, (LINE, WORD))
            else:
                yield from self._rows(table, place, closed)
            place = closed
        yield from self._paragraphs(place, last)

    def _paragraphs(self, first: int, last: int) -> Iterator[_Block]:
        for start, end in _between(first, (match.start() for match in BLOCK.finditer(self.text, first, last)), last):
            yield _Block(start, end)

    def _rows(self, table: Table, first: int, last: int) -> Iterator[_Block]:
        """The names of the columns with the first row, if that fits, then one row each."""
        rows = [row - 1 for row in table.rows]
        if rows and self._fits(self.text[first : [*rows[1:], last][0]].strip(), self.budget):
            del rows[0]
        names = self._repeated(table.body)
        for start, end in _between(first, rows, last):
            yield _Block(start, end, names="" if start == first else names)

    def _names(self, table: Table) -> str:
        """The rows that name the columns of `table`; empty if they would leave the others less than half of a chunk."""
        names = self.text[table.start : table.body]
        return names if len(names) <= self.longest // 4 and 2 * self.count(names) <= self.budget else ""

    def _repeated(self, start: int) -> str:
        """The names of columns that a chunk beginning at `start` repeats."""
        at = bisect_right(self.bodies, start) - 1
        return self.tables[at][1] if at >= 0 and start < self.tables[at][0].end else ""

    def _words(self, names: str, start: int, end: int) -> str:
        return names + self.text[start:end].rstrip()

    def _tail(self, start: int, end: int) -> str:
        """The last words of ``text[start:end]`` that fit the overlap, with a space after them; empty if not one does."""
        words = self.text[start:end].split()
        joined = " ".join(words)
        lengths = [
            length for length in accumulate(len(word) + 1 for word in reversed(words)) if length <= self.longest // 4
        ]
        at = self._furthest(lengths, -1, 0, self.overlap, lambda length: joined[len(joined) + 1 - length :])
        return joined[len(joined) + 1 - lengths[at] :] + " " if at >= 0 else ""

    def _furthest(self, ends: Sequence[int], least: int, origin: int, room: int, words: Callable[[int], str]) -> int:
        """The last index of `ends` up to which ``words(ends[index])`` fits `room` tokens, or `least`.

        Guesses by the length of what is counted; where guesses fail, the interval is doubled and halved.
        """
        reach, beyond = least, len(ends)
        tries = 0
        while reach + 1 < beyond:
            if tries < GUESSES:
                guess = bisect_right(ends, origin + min(room / self.rate, self.longest)) - 1
            elif beyond < len(ends):
                guess = (reach + beyond) // 2
            else:
                guess = 2 * reach - least + 1
            guess = min(max(guess, reach + 1), beyond - 1)
            text = words(ends[guess])
            tokens = self.count(text) if len(text) <= self.longest else room + 1
            if tokens <= room and len(text) <= self.longest:
                reach = guess
            else:
                beyond = guess
            if tokens and text:
                self.rate = tokens / len(text)
            tries += 1
        return reach

    def _fits(self, text: str, room: int) -> bool:
        if len(text) > self.longest:
            return False
        return len(text) * TOKENS_A_CHARACTER <= room or self.count(text) <= room


def _start(span: tuple[int, int, Table | None]) -> int:
    return span[0]


def _between(first: int, places: Iterable[int], last: int) -> Iterator[tuple[int, int]]:
    """``first``, ``last`` and the `places` between them, in pairs of neighbours."""
    for place in places:
        if first < place < last:
            yield first, place
            first = place
    if first < last:
        yield first, last
