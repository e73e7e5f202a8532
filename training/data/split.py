"""Rows -> rows to train on and rows to validate on, so that nothing validated was nearly trained.

Whole groups change sides, never single rows. A group is everything that hangs together over shared documents: a row
about two documents ties both, and all rows about either. A row without documents goes with those whose conversation
begins with the same user message, a raw text without a document with its equals. Not covered: balancing kinds or
languages between the two sides.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.config import SplitConfig
from cluster.errors import BadInput
from retrieval.duplicates import normal
from training.data.rows import AnyRow, Text

NAMED = 3
"""Documents of a large group that an error names."""


@dataclass(frozen=True)
class Split:
    """The two sides, each in the order of the rows."""

    train: list[AnyRow]
    validation: list[AnyRow]


def split(rows: Sequence[AnyRow], config: SplitConfig) -> Split:
    """Put about ``validation_share`` of `rows` aside; with a share of 0 all of them are for training.

    The share is taken of the rows with documents and of those without, so that both are judged. Which groups are put
    aside depends on the seed and on what is in the groups, not on the order of the rows: they are taken in the order
    of their hashes as long as they fit, and then one more if that comes nearer to the share.

    Raises:
        BadInput: fewer than ``minimum_train`` or ``minimum_validation`` rows would be on a side.
    """
    if config.validation_share == 0:
        return Split(list(rows), [])
    keys = group_keys(rows)
    aside: set[str] = set()
    for with_documents in (True, False):
        sizes = Counter(key for row, key in zip(rows, keys, strict=True) if bool(row.documents) == with_documents)
        aside |= _taken(sizes, config)
    count = sum(key in aside for key in keys)
    _check_floors(rows, keys, config, count)
    return Split(
        [row for row, key in zip(rows, keys, strict=True) if key not in aside],
        [row for row, key in zip(rows, keys, strict=True) if key in aside],
    )


def _taken(sizes: Counter[str], config: SplitConfig) -> set[str]:
    """Names of the groups that are put aside, of those with `sizes` (rows)."""
    wanted = round(config.validation_share * sizes.total())
    taken: set[str] = set()
    count = 0
    for key in sorted(sizes, key=lambda key: hashlib.sha256(f"{config.seed} {key}".encode()).digest()):
        if count + sizes[key] <= wanted:
            taken.add(key)
            count += sizes[key]
    smallest = min((key for key in sizes if key not in taken), key=lambda key: (sizes[key], key), default=None)
    if smallest and count + sizes[smallest] - wanted < wanted - count:
        taken.add(smallest)
    return taken


def group_keys(rows: Sequence[AnyRow]) -> list[str]:
    """For every row the name of its group: the first, in the alphabet, of the documents or conversations in it."""
    parent: dict[str, str] = {}

    def root(key: str) -> str:
        while (above := parent.setdefault(key, key)) != key:
            parent[key] = key = parent[above]
        return key

    own = [_keys(row) for row in rows]
    for first, *others in own:
        for other in others:
            low, high = sorted((root(first), root(other)))
            parent[high] = low
    return [root(first) for first, *_ in own]


def _keys(row: AnyRow) -> list[str]:
    if row.documents:
        return [f"document {document}" for document in row.documents]
    if isinstance(row, Text):
        said = row.text
    else:
        said = next(message.content for message in row.messages if message.role == "user")
    return [f"text {hashlib.sha256((normal(said) or said).encode()).hexdigest()}"]


def _check_floors(rows: Sequence[AnyRow], keys: Sequence[str], config: SplitConfig, count: int) -> None:
    if count < config.minimum_validation:
        reason = f"{count} rows would be put aside, fewer than minimum_validation ({config.minimum_validation})"
        fix = "raise validation_share or lower minimum_validation"
    elif len(rows) - count < config.minimum_train:
        reason = f"{len(rows) - count} rows would be left, fewer than minimum_train ({config.minimum_train})"
        fix = "lower validation_share or minimum_train"
    else:
        return
    share = f"validation_share {config.validation_share:g} of {len(rows)} rows"
    raise BadInput(f"data.split: with {share}, {reason}; {_ties(rows, keys) or fix}", param="data.split")


def _ties(rows: Sequence[AnyRow], keys: Sequence[str]) -> str | None:
    """What to do about one group that holds most of `rows`, if one does."""
    largest, size = Counter(keys).most_common(1)[0] if keys else ("", 0)
    if size * 2 <= len(rows):
        return None
    inside = (document for row, key in zip(rows, keys, strict=True) if key == largest for document in row.documents)
    documents = list(dict.fromkeys(inside))
    if not documents:
        return f"{size} of them begin with the same user message and stay together, so name files in data.validation"
    names = ", ".join(documents[:NAMED]) + (", …" if len(documents) > NAMED else "")
    return (
        f"{size} of them hang together over {len(documents)} documents ({names}) and stay together, so take out rows "
        "that name two documents, or name files in data.validation"
    )
