"""Texts that say the same: equal after :func:`normal`, or nearly so by the Jaccard similarity of their shingles.

Near copies are found as in Broder (1997): character shingles, MinHash signatures (datasketch), bands of the signature
as hash keys (locality-sensitive hashing), and then the exact similarity of every pair that shares a band and whose
signatures agree. The shingles of a text are made again when they are needed, so memory is one signature a text
(512 bytes), the bands of one pass and the pairs found. The result does not depend on chance: the permutations are
seeded.

Training looks at rows with it, ingestion at documents (:func:`drop_duplicates`).

Not covered: copies in other words or in another language. In a band that more than :data:`CROWD` different texts
share, each is compared with the first so many only, so that templated rows do not cost the square of their number.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from datasketch import MinHash

from retrieval.read.base import Problem
from retrieval.types import Document

SHINGLE = 5
"""Characters of a shingle."""
PERMUTATIONS = 128
BAND = 7
"""Values of a signature that must agree: at similarity 0.8 a pair is seen in one of 18 bands with probability 0.985."""
SLACK = 0.15
"""How far an estimate from signatures may be under the threshold; four standard deviations at 0.8."""
CROWD = 500
"""Texts of one band that the others of it are compared with."""
SEED = 17
LONG = 1_000
"""Characters from which shingles are compared by 64-bit hashes, which take a tenth of the memory."""
CODE = re.compile(r"\S*\d\S*")
Update = Callable[[int, int | None, str], None]
"""``update(done, total, note)`` of a progress bar."""


class _Letters(dict[int, str | None]):
    """Character -> what is left of it in :func:`normal`; filled as characters are met."""

    def __missing__(self, code: int) -> str | None:
        category = unicodedata.category(chr(code))
        kept: str | None = chr(code)
        if category[0] in "PZ" or chr(code).isspace():
            kept = " "
        elif category[0] == "C":
            kept = None
        self[code] = kept
        return kept


_LETTERS = _Letters()


def normal(text: str) -> str:
    """`text` as it is compared: NFKC, case folded, without punctuation and control characters, single spaces."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().translate(_LETTERS).split())


def drop_duplicates(documents: Sequence[Document], similarity: float) -> tuple[list[Document], list[Problem]]:
    """`documents` without those that repeat one before them, and these as problems.

    A copy equals the other after :func:`normal`; a near copy has that `similarity` and names the same numbers, since
    two tariffs of one form are two documents. Only documents that the same groups may read are compared: of two with
    other rights, whoever may read one would lose the other.

    Args:
        similarity: Jaccard similarity of shingles from which two documents count as the same; 1 is copies only.
    """
    alike: dict[tuple[str, ...] | None, list[int]] = defaultdict(list)
    for place, document in enumerate(documents):
        alike[document.groups].append(place)
    repeats: dict[int, tuple[int, float]] = {}
    for places in alike.values():
        for first, later, value in _repeats([documents[place].text for place in places], similarity):
            repeats[places[later]] = (places[first], value)
    problems = [
        _repetition(documents[later], documents[repeats[later][0]], repeats[later][1]) for later in sorted(repeats)
    ]
    return [document for place, document in enumerate(documents) if place not in repeats], problems


def _repeats(texts: Sequence[str], threshold: float) -> Iterator[tuple[int, int, float]]:
    """(kept text, later text that repeats it, similarity), each later one once."""
    if threshold == 1:
        yield from ((first, later, 1.0) for first, later in copies(texts))
        return
    standing: dict[int, int] = {}  # text that repeats another -> the one that is kept
    equal = {later for _, later in copies(texts)}
    for first, later, value in sorted(near(texts, threshold), key=lambda pair: (pair[1], pair[0])):
        if later in standing or (first in standing and later not in equal):
            continue  # what a copy that is left out resembles may be unlike the one that stays
        if later not in equal and CODE.findall(normal(texts[first])) != CODE.findall(normal(texts[later])):
            continue
        standing[later] = standing.get(first, first)
        yield standing[later], later, value


def _repetition(document: Document, kept: Document, value: float) -> Problem:
    how = "says the same as" if value == 1 else f"says nearly the same ({value:.0%}) as"
    return Problem(document.source, f"'{document.doc_id}' {how} '{kept.doc_id}' ({kept.source}), which is kept")


def copies(texts: Sequence[str]) -> list[tuple[int, int]]:
    """Pairs (first, later) of texts that are equal after :func:`normal`; texts of which nothing is left have none."""
    first: dict[str, int] = {}
    return [(first[form], i) for i, form in enumerate(map(normal, texts)) if form and first.setdefault(form, i) != i]


def near(texts: Sequence[str], threshold: float = 0.8, update: Update | None = None) -> list[tuple[int, int, float]]:
    """Pairs ``(i, j, similarity)`` with ``i < j`` of texts that are equal or nearly so, in order.

    The similarity is the exact Jaccard similarity of the shingles of both. Of texts that are equal after
    :func:`normal`, each later one is paired with the first, and only the first with near copies. To compare with
    other texts, such as held-out questions, take :func:`near_to`, which pairs every text.
    """
    forms = [normal(text) for text in texts]
    first: dict[str, int] = {}
    pairs = [(first[form], i, 1.0) for i, form in enumerate(forms) if form and first.setdefault(form, i) != i]
    distinct = list(first)
    places = list(first.values())
    found = _near(distinct, np.zeros(len(distinct), dtype=bool), threshold, update)
    pairs += [(places[i], places[j], similarity) for i, j, similarity in found]
    return sorted(pairs)


def near_to(
    texts: Sequence[str], references: Sequence[str], threshold: float = 0.8, update: Update | None = None
) -> list[tuple[int, int, float]]:
    """Pairs ``(text, reference, similarity)`` of every text with every reference that it equals or nearly does."""
    asked, known = _places(references), _places(texts)
    pairs = [(i, j, 1.0) for form in known if form in asked for i in known[form] for j in asked[form]]
    distinct = [*asked, *known]
    is_text = np.arange(len(distinct)) >= len(asked)
    for j, i, similarity in _near(distinct, is_text, threshold, update, between=True):
        if distinct[i] != distinct[j]:
            pairs += [(text, reference, similarity) for text in known[distinct[i]] for reference in asked[distinct[j]]]
    return sorted(pairs)


def similarity(left: str, right: str) -> float:
    """Jaccard similarity of the shingles of two texts in the form of :func:`normal`; 0.0 if one has none."""
    if max(len(left), len(right)) < LONG:
        a, b = _shingles(left), _shingles(right)
        both = len(a & b)
        return both / (len(a) + len(b) - both) if both else 0.0
    if not left or not right:
        return 0.0
    x, y = np.unique(_hashes(left)), np.unique(_hashes(right))
    shared = len(np.intersect1d(x, y, assume_unique=True))
    return shared / (len(x) + len(y) - shared)


def _places(texts: Sequence[str]) -> dict[str, list[int]]:
    places: dict[str, list[int]] = {}
    for i, text in enumerate(texts):
        if form := normal(text):
            places.setdefault(form, []).append(i)
    return places


def _near(
    forms: Sequence[str],
    side: np.ndarray[Any, np.dtype[np.bool_]],
    threshold: float,
    update: Update | None,
    *,
    between: bool = False,
) -> list[tuple[int, int, float]]:
    """Near pairs of distinct `forms`, or only those with one on each `side`."""
    if len(forms) < 2:
        return []
    signatures = np.empty((len(forms), PERMUTATIONS), dtype=np.uint32)
    empty = MinHash(PERMUTATIONS, seed=SEED, hashfunc=int)
    for i, form in enumerate(forms):
        signatures[i] = _signature(form, empty)
        if update and i % 100 == 0:
            update(i, len(forms), "")
    seen = np.empty(0, dtype=np.int64)
    for start in range(0, PERMUTATIONS - BAND + 1, BAND):
        keep = [seen]
        for left, right in _candidates(signatures[:, start : start + BAND]):
            if between:
                apart = side[left] != side[right]
                left, right = left[apart], right[apart]
            alike = (signatures[left] == signatures[right]).mean(axis=1) >= threshold - SLACK
            keep.append(left[alike] * len(forms) + right[alike])
        seen = np.unique(np.concatenate(keep))
    if update:
        update(len(forms), len(forms), "")
    pairs = ((int(code) // len(forms), int(code) % len(forms)) for code in seen)
    measured = ((i, j, similarity(forms[i], forms[j])) for i, j in pairs)
    return [(i, j, value) for i, j, value in measured if value >= threshold]


def _candidates(band: Any) -> Iterator[tuple[Any, Any]]:
    """Index arrays (earlier, later) of rows that agree in the whole `band`, some thousands of pairs at a time."""
    keys = np.ascontiguousarray(band).view(np.dtype((np.void, band.shape[1] * band.itemsize))).ravel()
    _, group, sizes = np.unique(keys, return_inverse=True, return_counts=True)
    order = np.argsort(group, kind="stable")
    ends = np.cumsum(sizes)
    lefts: list[Any] = []
    rights: list[Any] = []
    waiting = 0
    for shared in np.flatnonzero(sizes > 1):
        members = order[ends[shared] - sizes[shared] : ends[shared]]
        for at in range(1, len(members)):
            lefts.append(members[: min(at, CROWD)])
            rights.append(np.full(len(lefts[-1]), members[at]))
            waiting += len(lefts[-1])
            if waiting > 10_000:
                yield np.concatenate(lefts), np.concatenate(rights)
                lefts, rights, waiting = [], [], 0
    if lefts:
        yield np.concatenate(lefts), np.concatenate(rights)


def _signature(form: str, empty: MinHash) -> Any:
    """MinHash values of the shingles of `form`; 64 thousand shingles at a time, so that a book fits too."""
    sketch = empty.copy()
    hashes = _hashes(form)
    for start in range(0, len(hashes), 1 << 16):
        sketch.update_batch((hashes[start : start + (1 << 16)] & np.uint64(0xFFFFFFFF)).tolist())
    return sketch.hashvalues


def _hashes(form: str) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """A 64-bit hash of each shingle of `form`, in order."""
    codes = np.frombuffer(form.encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(np.uint64)
    size = min(SHINGLE, len(codes))
    hashes = np.zeros(len(codes) - size + 1, dtype=np.uint64)
    for offset in range(size):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + codes[offset : offset + len(hashes)]
    hashes ^= hashes >> np.uint64(29)
    return hashes


@lru_cache(maxsize=4096)
def _shingles(form: str) -> frozenset[str]:
    size = min(SHINGLE, len(form))
    return frozenset(form[i : i + size] for i in range(len(form) - size + 1)) if form else frozenset()
