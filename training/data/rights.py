"""Who may use what was learned from documents: those who may read all of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from cluster.errors import BadInput


def shared_groups(groups_of_documents: Iterable[Sequence[str]]) -> tuple[str, ...]:
    """The groups that may read every one of the documents, sorted; ``()`` where there are no documents.

    An adapter knows something of each document it was trained on, so its card carries the intersection of their
    groups, never the union. One item is the groups of one document (or of one chunk of it).

    Raises:
        BadInput: nobody may read all of them; the message names, by the groups they have, two documents that share
            none, or else says that only all of them together leave no group.
    """
    distinct = {tuple(sorted(set(groups))) for groups in groups_of_documents}
    shared = set.intersection(*map(set, distinct)) if distinct else set()
    if distinct and not shared:
        raise BadInput(f"{_why(sorted(distinct))}; train on documents that one group may read", param="groups")
    return tuple(sorted(shared))


def _why(distinct: Sequence[tuple[str, ...]]) -> str:
    for number, first in enumerate(distinct):
        for second in distinct[number:]:
            if set(first).isdisjoint(second):
                return (
                    f"nobody may read all documents: one is for {_named(first)} and another for {_named(second)}, "
                    "and they share no group"
                )
    return f"no single group may read all documents; their groups are {', '.join(map(_named, distinct))}"


def _named(groups: Sequence[str]) -> str:
    return " and ".join(f"'{group}'" for group in groups) or "nobody"
