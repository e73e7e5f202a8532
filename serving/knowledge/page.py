"""One page of a list, as OpenAI cuts it: ``after`` and ``before`` are ids, ``limit`` and ``order`` as they say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

from cluster.errors import BadInput

T = TypeVar("T")
Order = Literal["asc", "desc"]


def page(
    items: Sequence[T],
    id_of: Callable[[T], str],
    *,
    limit: int,
    order: Order = "desc",
    after: str | None = None,
    before: str | None = None,
) -> tuple[list[T], bool]:
    """At most `limit` of `items` (given oldest first) after one id or right before another, and whether more follow.

    Raises:
        BadInput: `after` or `before` is not in the list.
    """
    ordered = list(items if order == "asc" else reversed(items))
    ids = [id_of(item) for item in ordered]
    start, end = 0, len(ordered)
    if after is not None:
        start = _index(ids, after, "after") + 1
    if before is not None:
        end = _index(ids, before, "before")
        start = max(start, end - limit)
    cut = ordered[start:end]
    return cut[:limit], len(cut) > limit or (before is not None and after is None and start > 0)


def listing(data: Sequence[dict[str, Any]], has_more: bool) -> dict[str, Any]:
    """OpenAI's list object."""
    first, last = (data[0]["id"], data[-1]["id"]) if data else (None, None)
    return {"object": "list", "data": list(data), "first_id": first, "last_id": last, "has_more": has_more}


def _index(ids: list[str], wanted: str, param: str) -> int:
    try:
        return ids.index(wanted)
    except ValueError:
        raise BadInput(f"'{wanted}' is not in this list; give an id of the page before", param=param) from None
