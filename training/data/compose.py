"""Pairs -> rows of the four kinds: one document, two documents, a follow-up, and no answer.

A two-document row asks two questions of related documents at once; a follow-up leans on the question before it, as
``retrieval.query`` expects of one. Both are made of pairs that are questions; gaps to fill only make single rows.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Literal

from retrieval.query import is_follow_up
from retrieval.types import Chunk
from training.data.pairs import Pair, asked
from training.data.rows import Evidence, Message, Row
from training.data.sentences import content, lower_first
from training.data.unanswerable import unanswerable

Kind = Literal["single", "two", "none", "multi"]
RELATED = 12
"""Pairs that are looked at for a partner; the one that shares most words is taken."""
LONGEST_TWO = 45
"""Words of a question over two documents."""


def candidates(
    kind: Kind, pairs: Sequence[Pair], *, chunks: Sequence[Chunk], live: Sequence[Chunk], named: set[str], seed: int
) -> Iterator[Row]:
    """Rows of `kind` from `pairs`, in an order that `seed` decides: full questions first, then gaps to fill.

    Args:
        chunks: the chunks that `pairs` may be from; `live` those of the whole knowledge.
        named: words that keep their capital inside a sentence.
    """
    chance = random.Random(f"{seed} {kind}")
    order = list(pairs)
    chance.shuffle(order)
    order.sort(key=lambda pair: pair.cloze)
    if kind == "single":
        return (
            _row("single", pair.id, pair.language, [asked(pair, named)], [pair.answer], [pair.evidence])
            for pair in order
        )
    questions = [pair for pair in order if not pair.cloze]
    if kind == "two":
        return _two(questions, named, chance)
    if kind == "multi":
        return _multi(questions, named)
    return (
        _row("none", made.pair.id, made.pair.language, [made.question], [""], [])
        for made in unanswerable(questions, chunks, live, named, chance)
    )


def _two(questions: Sequence[Pair], named: set[str], chance: random.Random) -> Iterator[Row]:
    left = list(questions)
    while left:
        first = left.pop(0)
        words = content(f"{first.question} {first.chunk.title}")
        others = [pair for pair in left if pair.chunk.doc_id != first.chunk.doc_id and pair.language == first.language]
        if not others:
            continue
        near = chance.sample(others, min(RELATED, len(others)))
        second = max(near, key=lambda pair: len(words & content(f"{pair.question} {pair.chunk.title}")))
        left.remove(second)
        joint = ", và " if first.language == "vi" else ", and "
        question = asked(first, named).rstrip("?") + joint + lower_first(asked(second, named), named)
        if len(question.split()) <= LONGEST_TWO:
            answer = f"{first.answer}; {second.answer}"
            yield _row("two", first.id, first.language, [question], [answer], [first.evidence, second.evidence])


def _multi(questions: Sequence[Pair], named: set[str]) -> Iterator[Row]:
    by_document: dict[str, list[Pair]] = defaultdict(list)
    for pair in questions:
        by_document[pair.chunk.doc_id].append(pair)
    for pairs in by_document.values():
        pairs = sorted(pairs, key=lambda pair: (pair.frame, pair.chunk.position))
        for first, second in zip(pairs[::2], pairs[1::2], strict=False):
            follow_up = _follow_up(first, second, named)
            if is_follow_up(follow_up):
                turns = [asked(first, named), follow_up]
                yield _row("multi", second.id, second.language, turns, [first.answer, second.answer], [second.evidence])


def _follow_up(first: Pair, second: Pair, named: set[str]) -> str:
    """``And a caravan?`` where only the subject changes, else the second question as something asked further."""
    same = bool(first.frame) and first.frame == second.frame
    if first.language == "vi":
        return f"Còn {second.subject}?" if same else f"Vậy {lower_first(second.question, named)}"
    return f"And {second.subject}?" if same else f"And {lower_first(second.question, named)}"


def _row(
    kind: Kind, name: str, language: str, asks: Sequence[str], answers: Sequence[str], evidence: Sequence[Evidence]
) -> Row:
    turns = zip(asks, answers, strict=True)
    messages = [
        Message(role=role, content=text)
        for ask, answer in turns
        for role, text in (("user", ask), ("assistant", answer))
    ]
    return Row(id=f"{kind}-{name}", kind=kind, language=language, messages=tuple(messages), evidence=tuple(evidence))
