"""Text as it is stored: mojibake, Unicode forms, characters that nobody sees; found by :func:`flaws`, mended by :func:`repair`.

Mojibake (UTF-8 once read as something else) is told and repaired by ftfy. Text is wanted in NFC, where a letter and
its marks are one character as far as Unicode has one: the same Vietnamese word in another form has other tokens.

Zero-width joiners and non-joiners and the two direction marks stay, since Persian, Hindi, Hebrew and emoji need
them. Not covered: spelling, HTML entities, curly quotes, full-width letters; those are somebody's style.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import ftfy
from ftfy.badness import is_bad

from training.data.rows import AnyRow, Text

Kind = Literal[
    "mojibake", "suspected mojibake", "not NFC", "control characters", "invisible characters", "lost characters"
]
Form = Literal["NFC", "NFD", "mixed", "either"]

REPAIRED: frozenset[Kind] = frozenset({"mojibake", "not NFC", "control characters", "invisible characters"})
"""What :func:`repair` leaves none of."""
SPACES = re.compile("[\x0b\x0c\x1c-\x1f\x85]")
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
INVISIBLE = re.compile(
    "[\u00ad\u180e\u200b\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufeff\ufff9-\ufffb]"
    # Tag letters, which can smuggle text; behind a black flag they are the flags of England, Scotland and Wales.
    "|(?<![\U0001f3f4\U000e0020-\U000e007e])[\U000e0000-\U000e007f]+"
)
LOST = "\ufffd"
SNIPPET = 24
"""Characters shown of a repair."""


@dataclass(frozen=True)
class Flaw:
    """One kind of damage to one text."""

    kind: Kind
    detail: str


def contents(row: AnyRow) -> Iterator[tuple[str, str]]:
    """The texts of a row that a model reads, with their field: ``("messages.0.content", "…")``."""
    if isinstance(row, Text):
        yield "text", row.text
    else:
        for position, message in enumerate(row.messages):
            yield f"messages.{position}.content", message.content


def form(text: str) -> Form:
    """The Unicode form of `text`; ``either`` has no character that the forms write differently."""
    nfc, nfd = (unicodedata.is_normalized(name, text) for name in ("NFC", "NFD"))
    return "either" if nfc and nfd else "NFC" if nfc else "NFD" if nfd else "mixed"


def flaws(text: str) -> list[Flaw]:
    """What is wrong with `text`, at most one flaw of a kind."""
    found: list[Flaw] = []
    if not text.isascii() and is_bad(text):
        mended = ftfy.fix_encoding(text)
        if mended != text:
            before, after = _difference(text, mended)
            found.append(Flaw("mojibake", f"'{before}' reads '{after}'"))
            text = mended  # what else is wrong is what is wrong with that: half of mojibake is control characters
        else:
            found.append(Flaw("suspected mojibake", "unlikely sequences of letters and signs"))
    if CONTROL.search(text):
        found.append(Flaw("control characters", _code_points("".join(CONTROL.findall(text)))))
    if text.isascii():
        return found
    if (now := form(text)) not in ("NFC", "either"):
        found.append(Flaw("not NFC", "decomposed (NFD)" if now == "NFD" else "composed and decomposed letters mixed"))
    if INVISIBLE.search(text):
        found.append(Flaw("invisible characters", _code_points("".join(INVISIBLE.findall(text)))))
    if LOST in text:
        found.append(Flaw("lost characters", _code_points(LOST * text.count(LOST))))
    return found


def repair(text: str) -> str:
    """`text` without the flaws of :data:`REPAIRED`; what is repaired already comes back as it is."""
    while True:
        before = text
        if not text.isascii():
            text = INVISIBLE.sub("", unicodedata.normalize("NFC", ftfy.fix_encoding(text)))
        text = CONTROL.sub("", SPACES.sub(" ", text.replace("\r\n", "\n").replace("\r", "\n")))
        if text == before:
            return text


def _code_points(characters: str) -> str:
    counts = sorted(Counter(characters).items())
    shown = ", ".join(f"U+{ord(character):04X} ×{count}" for character, count in counts[:4])
    return shown + (f" and {len(counts) - 4} others" if len(counts) > 4 else "")


def _difference(before: str, after: str) -> tuple[str, str]:
    """Where two texts begin to differ, a few characters of each."""
    start = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), 0)
    return tuple(_printable(text[start : start + SNIPPET]) for text in (before, after))  # type: ignore[return-value]


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else "·" for character in text)
