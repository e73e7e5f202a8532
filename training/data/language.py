"""The language of a text (py3langid, 139 languages, no network) and whether a row says so.

Not covered: languages mixed within one row, dialects, and texts with fewer than :data:`LETTERS` letters or that the
model is unsure of, which are not judged.
"""

from __future__ import annotations

from functools import cache
from typing import Any

LETTERS = 40
"""Fewer are too few to tell a language by."""
READ = 250
"""Characters that are read of a text."""
SURE = 0.9
"""Least probability of a language that counts."""
ALIKE = ({"no", "nb", "nn", "da"}, {"hr", "bs", "sr", "sh"}, {"id", "ms"}, {"zh", "yue"})
"""Languages that are written too much alike to hold one against the other."""


def identify(text: str) -> str | None:
    """ISO 639-1 code of the language of `text`; None where it is too short or not clear."""
    text = text[:READ]
    wanted = LETTERS if text.isascii() or not _dense(text) else LETTERS // 2
    if sum(map(str.isalpha, text)) < wanted:
        return None
    language, probability = _identifier().classify(text)
    return str(language) if probability >= SURE else None


def agree(found: str, said: str) -> bool:
    """Whether `found` is what a row calls `said` (``en``, ``en-GB``, ``pt_BR``)."""
    primary = said.replace("_", "-").partition("-")[0].lower()
    return found == primary or any({found, primary} <= family for family in ALIKE)


def _dense(text: str) -> bool:
    """Whether `text` is of a script whose letters are syllables or words (Chinese, Japanese, Korean)."""
    return sum("\u3040" <= letter <= "\u9fff" or "\uac00" <= letter <= "\ud7a3" for letter in text) * 2 > len(text)


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
