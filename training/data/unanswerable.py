"""Questions that the documents do not answer, made from questions that they do: one name or code is exchanged.

``How much does a car on R4 cost?`` asked of ``R3`` sounds as real, and its retrieved passages look as near, but no
live chunk speaks of that. The new name is one that keeps the same company in the documents (the words beside it), and
the question is kept only if no chunk holds the new name together with most of the question's other words; the words
of :func:`training.data.sentences.content` decide. A name that chunks of another language speak of is not taken, as
their words cannot be compared. An answer in quite other words would not be noticed.
"""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from retrieval.types import Chunk
from training.data.extract import MONTHS
from training.data.pairs import ASKING, Pair, asked
from training.data.sentences import content, language, sentences

NAME = re.compile(r"(?<![\w-])(?:[A-Z]{1,4}-?\d[\w-]*|[A-ZĐ][a-zà-ỹ]{2,}(?:[ -][A-Z][a-z]+)*)(?![\w-]| \d)")
CODE = re.compile(r"[A-Z]{1,4}-?\d[\w-]*")
LEFT = ("to", "at", "in", "on", "from", "of", "mv", "tàu", "ở", "tại", "mã", "tuyến", "mẫu", "form", "alarm")
CALENDAR = frozenset(f"{MONTHS} Monday Tuesday Wednesday Thursday Friday Saturday Sunday".replace("|", " ").split())
MOST_SHARED = 0.5
"""Share of the question's other words that a chunk with the new name may hold."""
FEWEST_MENTIONS = 2
NEAREST = 4
"""Names that are tried for another."""
LEAST_ALIKE = 0.25
"""Overlap of the words that two names stand beside, from 0 to 1."""


@dataclass(frozen=True)
class Unanswerable:
    """A question without an answer, and the pair it was made from."""

    question: str
    pair: Pair


def unanswerable(
    pairs: Sequence[Pair], chunks: Sequence[Chunk], live: Sequence[Chunk], named: set[str], chance: random.Random
) -> Iterator[Unanswerable]:
    """At most one question for each of `pairs`, in their order.

    Args:
        chunks: where new names are taken from.
        live: every chunk of the knowledge, in which the answer must not stand.
    """
    company = _company(chunks)
    texts = [f"{chunk.title} {chunk.heading} {chunk.text}" for chunk in live]
    known = [(text, content(text), language(text)) for text in texts]
    asked_before: set[str] = set()
    for pair in pairs:
        if pair.cloze:
            continue
        spoken = {name for name in NAME.findall(pair.question) if name in company}
        for old in sorted(spoken):
            others = _alike(old, company)
            chance.shuffle(others)
            new = next((name for name in others if name not in spoken and _unknown(pair, old, name, known)), None)
            if new is None:
                continue
            question = pair.question[:1].upper() + pair.question[1:] if _titled(pair, old) else asked(pair, named)
            question = _exchange(question, old, new)
            if question not in asked_before:
                asked_before.add(question)
                yield Unanswerable(question, pair)
            break


def _company(chunks: Sequence[Chunk]) -> dict[str, Counter[str]]:
    """Name or code -> the words it stands beside inside sentences, with how often."""
    beside: dict[str, Counter[str]] = defaultdict(Counter)
    for chunk in chunks:
        for sentence in sentences(chunk.text):
            for found in NAME.finditer(sentence):
                before = sentence[: found.start()].split()
                code = CODE.fullmatch(found[0])
                if before and (code or (before[-1][-1] not in ".:" and before[-1].lower() in LEFT)):
                    beside[found[0]][_series(found[0]) if code else before[-1].lower()] += 1
    return {
        name: words
        for name, words in beside.items()
        if name not in CALENDAR and (words.total() >= FEWEST_MENTIONS or CODE.fullmatch(name))
    }


def _series(code: str) -> str:
    """``E-417`` and ``E-512`` are of one series, ``E-28`` and ``E-417A`` of others."""
    return re.sub(r"\d", "0", code)


def _alike(old: str, company: dict[str, Counter[str]]) -> list[str]:
    """Codes of one series, or names that stand after the same words, most alike first cut to the nearest few."""
    own = company[old]

    def likeness(name: str) -> float:
        shared = (own & company[name]).total()
        return shared / max(1, (own | company[name]).total())

    codes = CODE.fullmatch(old) is not None
    ranked = sorted(
        (name for name in company if name != old and (CODE.fullmatch(name) is not None) == codes),
        key=lambda name: (-likeness(name), name),
    )
    return [name for name in ranked[:NEAREST] if likeness(name) > (0 if codes else LEAST_ALIKE)]


def _unknown(pair: Pair, old: str, new: str, known: Sequence[tuple[str, set[str], str | None]]) -> bool:
    """Whether no chunk holds `new` with more than half of the question's other words, or in another language."""
    others = content(_exchange(pair.question, old, "")) - ASKING
    mention = re.compile(rf"(?<![\w-]){re.escape(new)}(?![\w-])")
    return len(others) >= 2 and not any(
        spoken != pair.language or len(others & words) > MOST_SHARED * len(others)
        for text, words, spoken in known
        if mention.search(text)
    )


def _titled(pair: Pair, old: str) -> bool:
    """Whether the title or heading that the question is asked with speaks of the old name as well."""
    return not pair.alone and old in f"{pair.chunk.title} {pair.chunk.heading}"


def _exchange(question: str, old: str, new: str) -> str:
    return re.sub(rf"(?<![\w-]){re.escape(old)}(?![\w-])", lambda _: new, question)
