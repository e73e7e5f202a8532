"""Text of a chunk -> its sentences, each a piece of it word for word (white space aside), and what words they hold.

English and Vietnamese. Tables, code and headings yield no sentence; neither does a line without an end, unless it is
a list item or a ``key: value``. Not covered: other languages (:func:`language` says ``None``), quoted speech.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import pairwise

from retrieval.query import FUNCTION_WORDS, WORD

FENCED = re.compile(r"^ {0,3}(```|~~~).*?(?:^ {0,3}\1[^\n]*$|\Z)", re.MULTILINE | re.DOTALL)
BLOCK = re.compile(r"\n[ \t]*(?=\n)|\n(?=[ \t]*(?:[-*+•]|\d+[.)])[ \t]|[ \t]*\|)")
MARKER = re.compile(r"^\s*(?:[-*+•]|\d+[.)])\s+")
END = re.compile(r"[.!?…][\"”’)]*\s+(?=[\"“(]?[^\W_a-zà-ỹ])")
ABBREVIATION = re.compile(
    r"(?:\b(?:no|nr|st|mr|mrs|ms|dr|prof|approx|vs|fig|e\.g|i\.e|etc|tp|q|p)|[a-z]\.[a-z])\.$", re.IGNORECASE
)
KEY_VALUE = re.compile(r"[^\W_][^:.!?]{0,40}: \S")
VIETNAMESE = re.compile(r"[ăâđêôơưạảấầẩẫậắằẳẵặẹẻẽếềểễệỉịọỏốồổỗộớờởỡợụủứừửữựỳỵỷỹ]")
ENGLISH = frozenset(
    WORD.findall("a an and are at be by for from has in is it may must not of on one or the to which with")
)
ENDINGS = ("'s", "ies", "ied", "ing", "ed", "es", "s", "e", "y")


def sentences(text: str) -> list[str]:
    """The sentences of `text` in order, white space made single, list markers taken off."""
    found: list[str] = []
    for block in BLOCK.split(FENCED.sub("\n\n", text)):
        if not block.strip() or block.lstrip().startswith(("|", "#", ">")):
            continue
        item = MARKER.match(block) is not None
        flat = " ".join(MARKER.sub("", block).split())
        found += [piece for piece in _cut(flat) if item or piece[-1] in ".!?…" or KEY_VALUE.match(piece)]
    return found


def _cut(flat: str) -> Iterator[str]:
    start = 0
    for end in END.finditer(flat):
        piece = flat[start : end.end()].strip()
        if not ABBREVIATION.search(piece):
            yield piece
            start = end.end()
    if flat[start:]:
        yield flat[start:]


def language(text: str) -> str | None:
    """``vi``, ``en``, or None where it is neither as far as its letters and smallest words tell."""
    words = text.lower().split()
    if sum(VIETNAMESE.search(word) is not None for word in words) > len(words) / 6:
        return "vi"
    return "en" if sum(word.strip(".,;:") in ENGLISH for word in words) > len(words) / 12 else None


def content(text: str) -> set[str]:
    """The words of `text` that carry meaning, as stems by rule: ``closes``, ``closed`` and ``closing`` are one."""
    words = (word.strip(".:'’-") for word in WORD.findall(text.lower()))
    return {_stem(word) for word in words if word and word not in FUNCTION_WORDS}


def _stem(word: str) -> str:
    if VIETNAMESE.search(word) or any(char.isdigit() for char in word):
        return word
    for ending in ENDINGS:
        if word.endswith(ending) and len(word) - len(ending) >= 3 and not word.endswith("ss"):
            return word.removesuffix(ending)
    return word


def names(texts: Iterable[str]) -> set[str]:
    """Words that are written with a capital inside a sentence somewhere in `texts`: names, for the most part."""
    found: set[str] = set()
    for text in texts:
        for sentence in sentences(text):
            words = sentence.split()
            inner = (word.strip(".,;:()\"“”'’") for before, word in pairwise(words) if before[-1] not in ":.")
            found.update(word.removesuffix("'s") for word in inner if word[:1].isupper() and len(word) > 1)
    return found


def lower_first(text: str, named: set[str]) -> str:
    """`text` as it reads inside a sentence: its first letter small, unless the word is a name or a code."""
    first = text.split(" ", 1)[0].strip(",.;:").removesuffix("'s")
    if first in named or any(char.isdigit() for char in first) or (len(first) > 1 and first[:2].isupper()):
        return text
    return text[:1].lower() + text[1:]
