"""Values of a source -> plain JSON values, and groups -> names of groups.

Used for front matter and for the columns of rows. Values that JSON does not have become text (dates, decimals) or are
left out (bytes, what is no number). Not covered: types beyond those of YAML, JSON and Parquet.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any

from cluster.config import SLUG
from retrieval.read.base import Unreadable
from retrieval.read.clean import clean

LONGEST = 8_192
"""Bytes of one attribute as JSON, and of all attributes of a document four times that: a row holds 64 KB of them."""
LONGEST_LIST = 256
"""Items of a list; what is longer is a vector, no attribute."""
SEPARATORS = re.compile(r"[,;|\s]+")


def attributes(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Plain attributes without empty ones, and the names of those that are too large to be kept."""
    kept: dict[str, Any] = {}
    dropped: list[str] = []
    room = 4 * LONGEST
    for name, value in values.items():
        if isinstance(value, list) and len(value) > LONGEST_LIST:
            dropped.append(str(name))
            continue
        flat = plain(value)
        if flat is None or flat == "":
            continue
        size = len(json.dumps(flat, ensure_ascii=False).encode()) + len(str(name).encode())
        if size > min(LONGEST, room):
            dropped.append(str(name))
            continue
        room -= size
        kept[clean(str(name))] = flat
    return kept, dropped


def plain(value: Any) -> Any:
    """`value` as JSON has it; None for what JSON has no word for."""
    match value:
        case None | bool() | int():
            return value
        case float():
            return value if math.isfinite(value) else None
        case str():
            return clean(value)
        case Decimal() | timedelta():
            return str(value)
        case datetime() | date() | time():
            return value.isoformat()
        case Mapping():
            return {clean(str(key)): plain(each) for key, each in value.items()}
        case list() | tuple() | set():
            return [plain(each) for each in value]
    return None


def groups_of(value: Any) -> tuple[str, ...] | None:
    """Names of groups from a list, or from text that separates them by commas or spaces; None where nothing is said.

    Raises:
        Unreadable: it is something else, or names no group: a document must not become readable by a mistake.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    names = SEPARATORS.split(value.strip()) if isinstance(value, str) else value
    if not isinstance(names, list) or not names or not all(isinstance(each, str) for each in names):
        raise Unreadable("its groups are not a list of names; write for example [crew, office]")
    for name in names:
        if not re.fullmatch(SLUG, name):
            raise Unreadable(f"'{name}' is not the name of a group; use small letters, digits, '.', '_' and '-'")
    return tuple(sorted(set(names)))
