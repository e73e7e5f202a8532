"""Whether training rows give held-out questions away: by asking them, by nearly asking them, by their gold document.

A held-out question without earlier turns stands by itself and is looked for in every user turn of a row, and in raw
text. One that follows earlier turns ("And for a trailer?") says little by itself: it is compared together with them,
against the beginning of every conversation. Questions are near copies when their shingles have a Jaccard similarity
of :data:`NEAR` (``retrieval.duplicates``) and they name the same numbers: "on R1" and "on R4" are two questions.

Not covered: the same question in other words or another language, and answers that stand in another document.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from cluster.errors import BadInput
from retrieval.duplicates import near_to, normal, similarity
from training.data.problems import SHOWN
from training.data.rows import AnyRow, Row, Text

Reason = Literal["same question", "near copy", "gold document"]
NEAR = 0.8
"""Jaccard similarity of shingles from which two questions are near copies."""
CONTAINED = 16
"""Characters a question must have to be looked for inside raw text; a shorter one stands there by chance."""
CODES = re.compile(r"\S*\d\S*")


@dataclass(frozen=True)
class Leak:
    """A training row, the held-out row it gives away, and how."""

    row_id: str
    heldout_id: str
    reason: Reason


def leaks(train: Sequence[AnyRow], heldout: Sequence[Row]) -> list[Leak]:
    """Every pair of a training row and a held-out row that it gives away, for the first reason that applies.

    A document is gold where a held-out row is answerable from it; rows that are not answerable count for copies only.
    In the order of `train`, then of `heldout`.
    """
    found: dict[tuple[int, int], Reason] = {}
    for reasons in (_same(train, heldout), _near(train, heldout), _gold(train, heldout)):
        for row, question, reason in reasons:
            found.setdefault((row, question), reason)
    return [Leak(train[row].id, heldout[question].id, reason) for (row, question), reason in sorted(found.items())]


def guard(train: Sequence[AnyRow], heldout: Sequence[Row], policy: Literal["refuse", "drop"]) -> list[AnyRow]:
    """`train` without the rows that leak, or all of it if none does.

    Raises:
        BadInput: `policy` is ``refuse`` and a row leaks; the message names the first ten and counts the rest.
    """
    found = leaks(train, heldout)
    if found and policy == "refuse":
        raise BadInput("\n".join(_lines(found)), param=found[0].row_id)
    offending = {leak.row_id for leak in found}
    return [row for row in train if row.id not in offending]


SAID: dict[Reason, str] = {
    "same question": "asks the held-out question {}",
    "near copy": "nearly asks the held-out question {}",
    "gold document": "uses a document that answers the held-out question {}",
}
RANK = tuple(SAID)
"""Reasons, the plainest first."""


def _lines(found: Sequence[Leak]) -> Iterator[str]:
    """One line for each row, about the plainest of its leaks."""
    plainest: dict[str, Leak] = {}
    for leak in found:
        known = plainest.setdefault(leak.row_id, leak)
        if RANK.index(leak.reason) < RANK.index(known.reason):
            plainest[leak.row_id] = leak
    for leak in list(plainest.values())[:SHOWN]:
        said = SAID[leak.reason].format(leak.heldout_id)
        yield f"row {leak.row_id}: {said}; take it out of data.train, or set data.leakage=drop"
    if len(plainest) > SHOWN:
        yield f"… and {len(plainest) - SHOWN} more rows; `metier data check --all` lists all of them"


# -- what is compared --------------------------------------------------------------------------------------------

Hit = tuple[int, int, Reason]
"""(index in train, index in heldout, reason)."""
Question = tuple[str, ...]
"""User turns, the one that is to be answered last."""


def _same(train: Sequence[AnyRow], heldout: Sequence[Row]) -> Iterator[Hit]:
    asked: dict[Question, list[int]] = defaultdict(list)
    for index, row in enumerate(heldout):
        asked[_normal(_turns(row))].append(index)
    inside = [(f" {form[0]} ", hits) for form, hits in asked.items() if len(form) == 1 and len(form[0]) >= CONTAINED]
    for number, trained in enumerate(train):
        if isinstance(trained, Text):
            text = f" {normal(trained.text)} "
            found = [index for form, hits in inside if form in text for index in hits]
        else:
            found = [index for turns in _questions(trained) for index in asked.get(_normal(turns), ())]
        yield from ((number, index, "same question") for index in found)


def _near(train: Sequence[AnyRow], heldout: Sequence[Row]) -> Iterator[Hit]:
    asked = [_turns(row) for row in heldout]
    longest = 2 * max((_length(turns) for turns in asked), default=0)
    said: dict[Question, list[int]] = defaultdict(list)
    for number, trained in enumerate(train):
        for turns in [(trained.text,)] if isinstance(trained, Text) else _questions(trained):
            if _length(turns) <= longest:
                said[turns].append(number)
    questions = list(said)
    pairs = near_to(["\n".join(turns) for turns in questions], ["\n".join(turns) for turns in asked], NEAR)
    for at, index, _ in pairs:
        if _is_near(questions[at], asked[index]):
            yield from ((number, index, "near copy") for number in said[questions[at]])


def _is_near(left: Question, right: Question) -> bool:
    """Whether two questions that are alike as a whole name the same numbers and end alike."""
    codes = [set(CODES.findall(normal(" ".join(turns)))) for turns in (left, right)]
    return codes[0] == codes[1] and similarity(normal(left[-1]), normal(right[-1])) >= NEAR


def _gold(train: Sequence[AnyRow], heldout: Sequence[Row]) -> Iterator[Hit]:
    gold: dict[str, list[int]] = defaultdict(list)
    for index, row in enumerate(heldout):
        if row.answerable:
            for document in row.documents:
                gold[document].append(index)
    for number, trained in enumerate(train):
        for document in trained.documents:
            yield from ((number, index, "gold document") for index in gold.get(document, ()))


def _questions(row: Row) -> list[Question]:
    """What a held-out question is compared with: each user turn by itself, and together with all that were before."""
    turns = _turns(row)
    return [*((turn,) for turn in turns), *(turns[:end] for end in range(2, len(turns) + 1))]


def _turns(row: Row) -> Question:
    return tuple(message.content for message in row.messages if message.role == "user")


def _normal(turns: Question) -> Question:
    return tuple(normal(turn) or turn.strip() for turn in turns)


def _length(turns: Question) -> int:
    return sum(map(len, turns))
