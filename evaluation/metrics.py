"""How one answer is scored against its reference. Pure.

Exact match and token F1 follow SQuAD (Rajpurkar et al., 2016): case, punctuation, articles and white space do not
count; citation marks are taken off first.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Collection

from retrieval.prompt import without_marks

ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalize(text: str) -> str:
    """Lower case, no marks, no punctuation but the point inside a number, no articles, single spaces, NFC."""
    text = unicodedata.normalize("NFC", without_marks(text)).casefold()
    text = re.sub(r"(?<=\d)[.,](?=\d)", "\0", text)
    text = "".join(" " if unicodedata.category(char)[0] in "PS" else char for char in text)
    return " ".join(ARTICLES.sub(" ", text.replace("\0", ".")).split())


def exact_match(answer: str, reference: str) -> float:
    """1 if both are the same after :func:`normalize`, else 0."""
    return float(normalize(answer) == normalize(reference))


def token_f1(answer: str, reference: str) -> float:
    """Harmonic mean of precision and recall over tokens, as multisets."""
    said, wanted = normalize(answer).split(), normalize(reference).split()
    common = sum((Counter(said) & Counter(wanted)).values())
    if not common:
        return float(said == wanted)
    precision, recall = common / len(said), common / len(wanted)
    return 2 * precision * recall / (precision + recall)


def citation_hit(cited: Collection[str], gold: Collection[str]) -> float:
    """Share of the gold documents that the answer cites; 0 as soon as it cites one that is not gold."""
    if not cited or set(cited) - set(gold):
        return 0.0
    return len(set(cited) & set(gold)) / len(set(gold))
