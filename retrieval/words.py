"""Words as BM25 sees them: lower-case runs of letters and digits, with and without their diacritics.

Vietnamese is often typed without diacritics (``tram sac`` for ``trạm sạc``). The indexed text of a chunk therefore
holds the plain form of each such word once more (:func:`searchable`), while a query is searched as it was typed: who
writes the diacritics finds exactly those words, who leaves them out finds all. Covers Latin and Greek letters and the
Russian ``ё``. Not covered: spellings that replace a letter by two (``fuer`` for ``für``), stemming, and scripts
without spaces.
"""

from __future__ import annotations

import re
import unicodedata
from itertools import islice

WORD = re.compile(r"\w+")
"""The words of Milvus's ``standard`` analyzer."""
MARKED = re.compile("(?<=[A-Za-zΑ-Ωα-ωЕе])[\u0300-\u036f]+")
"""Combining marks on letters that are also typed without; elsewhere (``й``, Devanagari, kana) they make another letter."""
STROKES = str.maketrans("đĐøØłŁ", "dDoOlL")
"""Letters that Unicode does not take apart."""
QUERY_WORDS = 256
"""Words of a query that BM25 is asked for: each costs a posting list, and questions are far shorter."""


def fold(word: str) -> str:
    """`word` without diacritics: ``trạm -> tram``, ``Đường -> Duong``."""
    if word.isascii():
        return word
    plain = MARKED.sub("", unicodedata.normalize("NFD", word.translate(STROKES)))
    return unicodedata.normalize("NFC", plain)


def searchable(text: str, fold_diacritics: bool) -> str:
    """What BM25 indexes for `text`: itself, and if asked for, the plain form of each word that has diacritics.

    A word that stands there twice is added twice, so that it counts as often either way.
    """
    if not fold_diacritics or text.isascii():
        return text
    folded = [plain for word in WORD.findall(text) if (plain := fold(word)) != word]
    return "\n".join([text, " ".join(folded)]) if folded else text


def words(text: str) -> list[str]:
    """The words of `text` in order, lower-case."""
    return WORD.findall(text.lower())


def shorten(query: str, limit: int = QUERY_WORDS) -> str:
    """`query` up to the end of its word number `limit`."""
    past = next(islice(WORD.finditer(query), limit, None), None)
    return query if past is None else query[: past.start()].rstrip()


def matches(query: str, text: str) -> list[str]:
    """The words of `query`, each once, that `text` holds as they are or, where they were typed plain, with diacritics."""
    held = set(words(text))
    plain = {fold(word) for word in held}
    return [word for word in dict.fromkeys(words(query)) if word in held or (fold(word) == word and word in plain)]
