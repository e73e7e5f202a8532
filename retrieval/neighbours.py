"""Passages -> passages with the chunks around them, joined into one text.

A chunk is cut for finding; an answer often stands half a chunk further. What an overlap repeats is joined once, and
passages of one document whose chunks touch become one, at the better one's place: there may be fewer than were found.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from retrieval.filters import And, Compare, Condition, Or
from retrieval.types import Passage

COLUMNS = ("doc_id", "position", "text", "heading", "page", "start", "end")
"""What :func:`widen` needs of a chunk."""
Row = Mapping[str, Any]


def around(passages: Iterable[Passage], reach: int) -> Condition:
    """The chunks up to `reach` before and after each of `passages`, themselves included."""
    return Or(
        [
            And(
                [
                    Compare("doc_id", "==", passage.doc_id),
                    Compare("position", ">=", passage.position - reach),
                    Compare("position", "<=", passage.position + reach),
                ]
            )
            for passage in passages
        ]
    )


def widen(passages: Sequence[Passage], rows: Iterable[Row], reach: int) -> list[Passage]:
    """`passages` (best first), each with the text of its neighbours in `rows`; those that touch are merged.

    A passage keeps what it was found by: chunk id, position, scores. Its page is that of its first chunk.

    Args:
        rows: :data:`COLUMNS` of the chunks :func:`around` asks for, as far as the asker may read them.
    """
    chunks = {(row["doc_id"], row["position"]): row for row in rows}
    windows = {passage.chunk_id: _window(passage, chunks, reach) for passage in passages}
    covered = {(passage.doc_id, place) for passage in passages for place in windows[passage.chunk_id]}
    taken: set[tuple[str, int]] = set()
    wide = []
    for passage in passages:
        document, window = passage.doc_id, windows[passage.chunk_id]
        if not window:  # the chunk was removed since it was found
            wide.append(passage)
        elif (document, passage.position) not in taken:
            first, last = window[0], window[-1]
            while (document, first - 1) in covered:
                first -= 1
            while (document, last + 1) in covered:
                last += 1
            run = [chunks[document, place] for place in range(first, last + 1)]
            taken |= {(document, place) for place in range(first, last + 1)}
            wide.append(replace(passage, text=join(run), page=run[0]["page"]))
    return wide


def _window(passage: Passage, chunks: Collection[tuple[str, int]], reach: int) -> range:
    """Places of the chunks around `passage` that are there without a gap."""
    first = last = passage.position
    if (passage.doc_id, first) not in chunks:
        return range(0)
    while first > passage.position - reach and (passage.doc_id, first - 1) in chunks:
        first -= 1
    while last < passage.position + reach and (passage.doc_id, last + 1) in chunks:
        last += 1
    return range(first, last + 1)


def join(run: Sequence[Row]) -> str:
    """The text of consecutive chunks of one document, without what overlaps repeat; a heading between is written out."""
    text = str(run[0]["text"])
    for before, chunk in pairwise(run):
        gap = chunk["start"] - before["end"]
        own = chunk["text"][len(chunk["text"]) - (chunk["end"] - chunk["start"]) :]
        if chunk["heading"] != before["heading"]:
            text += f"\n\n{chunk['heading'].rpartition(' > ')[2]}\n\n{own}" if chunk["heading"] else f"\n\n{own}"
        else:
            text += ("" if gap <= 0 else "\n" if gap == 1 else "\n\n") + own
    return text
