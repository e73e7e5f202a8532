"""Conditions on rows -> a Milvus filter expression whose literals cannot be broken out of.

The store takes these conditions only, never a string: what a user typed can enter an expression nowhere but as an
escaped literal. Columns are a closed set; JSON metadata and ``LIKE`` are not covered yet.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from cluster.errors import BadInput
from retrieval.types import Principal

Column = Literal["row_id", "chunk_id", "doc_id", "title", "heading", "source", "position", "tenant", "born", "died"]
Scalar = str | int


@dataclass(frozen=True)
class Compare:
    column: Column
    operator: Literal["==", "!=", "<", "<=", ">", ">="]
    value: Scalar


@dataclass(frozen=True)
class In:
    column: Column
    values: Sequence[Scalar]


@dataclass(frozen=True)
class ContainsAny:
    """An array column shares an element with `values`."""

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


Condition = Compare | In | ContainsAny | And | Or | Not

EVERY_ROW = 'row_id != ""'
NO_ROW = 'row_id == ""'
"""Row ids are never empty. Servers differ in what they make of an empty list, so none is ever sent."""


def rights(principal: Principal) -> Condition:
    """Rows that `principal` may read: those of its tenant that share a group with it."""
    return And((Compare("tenant", "==", principal.tenant), ContainsAny("groups", principal.groups)))


def live(version: int) -> Condition:
    """Rows that belong to knowledge `version`: born in it or before, and not dead by then."""
    return And((Compare("born", "<=", version), Compare("died", ">", version)))


def expression(condition: Condition) -> str:
    """The Milvus expression of `condition`.

    Raises:
        BadInput: a literal holds a control character, which Milvus cannot read inside quotes.
    """
    match condition:
        case Compare(column, operator, value):
            return f"{column} {operator} {_literal(value)}"
        case In(column, values):
            return f"{column} in {_list(values)}" if values else NO_ROW
        case ContainsAny(column, values):
            return f"array_contains_any({column}, {_list(values)})" if values else NO_ROW
        case And(conditions):
            return " and ".join(f"({expression(part)})" for part in conditions) or EVERY_ROW
        case Or(conditions):
            return " or ".join(f"({expression(part)})" for part in conditions) or NO_ROW
        case Not(negated):
            return f"not ({expression(negated)})"


def _list(values: Sequence[Scalar]) -> str:
    return f"[{', '.join(map(_literal, values))}]"


def _literal(value: Scalar) -> str:
    if isinstance(value, str) and any(unicodedata.category(char) in ("Cc", "Cs") for char in value):
        raise BadInput(f"{value!r} holds a control character and cannot be used in a filter")
    return json.dumps(value, ensure_ascii=False)
