"""Conditions on rows -> a Milvus filter expression whose literals cannot be broken out of.

The store takes these conditions only, never a string: what a user typed can enter an expression nowhere but as an
escaped literal. Columns are a closed set; everything else a row says of itself is an attribute in its ``metadata``.
What is sent means the same to milvus-lite and to a Milvus server. Not covered: ``LIKE`` on what users type, attributes
that are lists or objects.
"""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Literal

from cluster.errors import BadInput
from retrieval.types import Principal

Column = Literal[
    "row_id",
    "chunk_id",
    "doc_id",
    "title",
    "heading",
    "source",
    "position",
    "page",
    "tenant",
    "vector_key",
    "born",
    "died",
]
Operator = Literal["==", "!=", "<", "<=", ">", ">="]
Scalar = str | int
Value = str | int | float | bool


@dataclass(frozen=True)
class Compare:
    column: Column
    operator: Operator
    value: Scalar


@dataclass(frozen=True)
class In:
    column: Column
    values: Sequence[Scalar]


@dataclass(frozen=True)
class Attribute:
    """The row has the attribute `key`, and it compares so with `value`.

    A row without the attribute is not among the found, whatever the operator; :class:`Not` of it is plain negation and
    finds that row. Numbers compare with numbers, whole or not; a value of another type is unequal, and has no order.
    """

    key: str
    operator: Operator
    value: Value


@dataclass(frozen=True)
class AttributeIn:
    """The row has the attribute `key`, and it is one of `values` (with `negate`: none of them)."""

    key: str
    values: Sequence[Value]
    negate: bool = False


@dataclass(frozen=True)
class ContainsAny:
    """The groups of the row share one with `values`."""

    column: Literal["groups"]
    values: Sequence[str]


@dataclass(frozen=True)
class And:
    conditions: Sequence[Condition]


@dataclass(frozen=True)
class Or:
    conditions: Sequence[Condition]


@dataclass(frozen=True)
class Not:
    condition: Condition


Condition = Compare | In | Attribute | AttributeIn | ContainsAny | And | Or | Not

EVERY_ROW = 'row_id != ""'
NO_ROW = 'row_id == ""'
"""Row ids are never empty. Servers differ in what they make of an empty list, so none is ever sent."""


def rights(principal: Principal) -> Condition:
    """Rows that `principal` may read: those of its tenant that share a group with it."""
    return And((Compare("tenant", "==", principal.tenant), ContainsAny("groups", principal.groups)))


def live(version: int) -> Condition:
    """Rows that belong to knowledge `version`: born in it or before, and not dead by then."""
    return And((Compare("born", "<=", version), Compare("died", ">", version)))


def readable(principal: Principal, reads: int, where: Condition | None = None) -> Condition:
    """What `principal` may read in a snapshot, and of that what `where` asks for: the condition of every answer.

    Args:
        reads: ``Snapshot.reads``.
        where: a filter of the user; it can narrow what is found, never widen it.
    """
    allowed = And((rights(principal), live(reads)))
    return allowed if where is None else And((allowed, where))


def readers(groups: Sequence[str]) -> str:
    """The column ``readers``: a mark for each of `groups`, which are found by ``like`` without any escaping.

    An array column says the same, but milvus-lite reads arrays row by row in Python: 20 times slower at 5,000 rows.
    """
    return "".join(map(_mark, groups))


def expression(condition: Condition) -> str:
    """The Milvus expression of `condition`.

    Raises:
        BadInput: a literal or a key that Milvus would not read as it is meant.
    """
    match condition:
        case Compare(column, operator, value):
            return f"{column} {operator} {_literal(value)}"
        case In(column, values):
            return f"{column} in [{', '.join(map(_literal, values))}]" if values else NO_ROW
        case Attribute(key, operator, value):
            # Servers differ in what a missing key is to `!=` and `not`; with `exists` there is nothing to differ in.
            return f"exists {_path(key)} and {_path(key)} {operator} {_literal(value)}"
        case AttributeIn(key, values, negate):
            # milvus-lite has no `in` for attributes.
            joint, operator = (" and ", "!=") if negate else (" or ", "==")
            each = joint.join(f"{_path(key)} {operator} {_literal(value)}" for value in values)
            return f"exists {_path(key)} and ({each})" if values else f"exists {_path(key)}" if negate else NO_ROW
        case ContainsAny(_, values):
            return " or ".join(f'readers like "%{_mark(value)}%"' for value in values) or NO_ROW
        case And(conditions):
            return " and ".join(f"({expression(part)})" for part in conditions) or EVERY_ROW
        case Or(conditions):
            return " or ".join(f"({expression(part)})" for part in conditions) or NO_ROW
        case Not(negated):
            return f"not ({expression(negated)})"


def check_key(key: str) -> None:
    """Refuse the name of an attribute that cannot be filtered by.

    Raises:
        BadInput: it is empty, or holds a character that Milvus does not read inside ``metadata["…"]`` as it stands:
            its parser of paths knows no escapes.
    """
    if not key or any(char in '"\\[]' or unicodedata.category(char) in ("Cc", "Cs") for char in key):
        raise BadInput(
            f'the attribute {key!r} cannot be filtered by; a name holds at least one character, and no ", \\, [, ], '
            "or control character"
        )


def check_value(value: Value) -> None:
    """Refuse a literal that Milvus cannot read.

    Raises:
        BadInput: text with a control character, a number that is not finite or beyond 64 bits.
    """
    if isinstance(value, str) and any(unicodedata.category(char) in ("Cc", "Cs") for char in value):
        raise BadInput(f"{value!r} holds a control character and cannot be used in a filter")
    if isinstance(value, float) and not math.isfinite(value):
        raise BadInput(f"{value} is not a number that can be compared with")
    if isinstance(value, int) and abs(value) >= 2**63:
        raise BadInput(f"{value} is beyond 64 bits and cannot be used in a filter")


def _path(key: str) -> str:
    check_key(key)
    return f'metadata["{key}"]'


def _literal(value: Value) -> str:
    check_value(value)
    return json.dumps(value, ensure_ascii=False)


def _mark(group: str) -> str:
    return f"|{sha256(group.encode('utf-8', 'surrogatepass')).hexdigest()[:32]}|"
