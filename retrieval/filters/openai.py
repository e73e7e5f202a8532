"""Filters as OpenAI's ``/v1/vector_stores/{id}/search`` takes them -> a condition.

``{"type": "eq", "key": "product", "value": "ferry"}`` with ``eq``, ``ne``, ``gt``, ``gte``, ``lt``, ``lte``, ``in``,
``nin``, and ``{"type": "and" | "or", "filters": [...]}``, nested. Keys are attributes of the documents. What OpenAI
leaves open is decided so: a document without the key matches no comparison, also not ``ne`` and ``nin``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from cluster.errors import BadInput
from retrieval.filters.conditions import (
    And,
    Attribute,
    AttributeIn,
    Condition,
    Operator,
    Or,
    Value,
    check_key,
    check_value,
)

OPERATORS: dict[str, Operator] = {"eq": "==", "ne": "!=", "gt": ">", "gte": ">=", "lt": "<", "lte": "<="}
MEMBERSHIP = ("in", "nin")
COMPOUND = ("and", "or")
TYPES = (*OPERATORS, *MEMBERSHIP, *COMPOUND)
MAX_DEPTH = 8
MAX_COMPARISONS = 256
"""Values of ``in`` and ``nin`` count one each."""


def openai_filter(data: Any, path: str = "filters") -> Condition:
    """The condition that `data`, parsed JSON, stands for. `path` is what it is called in errors.

    Raises:
        BadInput: `data` is no such filter, nested deeper than :data:`MAX_DEPTH` or with more than
            :data:`MAX_COMPARISONS`; the sentence and ``param`` name the place, as ``filters.filters[1].value``.
    """
    return _condition(data, path, MAX_DEPTH, [MAX_COMPARISONS])


def _condition(data: Any, path: str, depth: int, left: list[int]) -> Condition:
    if not isinstance(data, Mapping):
        raise _bad(path, f"expected an object with type, key and value, not {_shown(data)}")
    kind = data.get("type")
    if kind not in TYPES:
        raise _bad(f"{path}.type", f"expected one of {', '.join(TYPES)}, not {_shown(kind)}")
    _only(data, ("type", "filters") if kind in COMPOUND else ("type", "key", "value"), path)
    if kind in COMPOUND:
        parts = data.get("filters")
        if not isinstance(parts, list) or not parts:
            raise _bad(f"{path}.filters", f"expected a list of filters, not {_shown(parts)}")
        if not depth:
            raise _bad(f"{path}.filters", f"filters are nested deeper than {MAX_DEPTH}")
        conditions = [_condition(part, f"{path}.filters[{n}]", depth - 1, left) for n, part in enumerate(parts)]
        return And(conditions) if kind == "and" else Or(conditions)
    key, value = data.get("key"), data.get("value")
    if not isinstance(key, str):
        raise _bad(f"{path}.key", f"expected the name of an attribute, not {_shown(key)}")
    _named(f"{path}.key", check_key, key)
    if kind in MEMBERSHIP:
        if not isinstance(value, list) or not value:
            raise _bad(f"{path}.value", f"expected a list of values for {kind}, not {_shown(value)}")
        values = [_value(item, f"{path}.value[{n}]", left) for n, item in enumerate(value)]
        return AttributeIn(key, values, negate=kind == "nin")
    scalar = _value(value, f"{path}.value", left)
    if isinstance(scalar, bool) and kind not in ("eq", "ne"):
        raise _bad(f"{path}.value", f"true and false have no order; use eq or ne instead of {kind}")
    return Attribute(key, OPERATORS[kind], scalar)


def _value(value: Any, path: str, left: list[int]) -> Value:
    if not isinstance(value, get_args(Value)):
        raise _bad(path, f"expected a string, a number, true or false, not {_shown(value)}")
    left[0] -= 1
    if left[0] < 0:
        raise _bad(path, f"more than {MAX_COMPARISONS} comparisons")
    scalar: Value = value
    _named(path, check_value, scalar)
    return scalar


def _only(data: Mapping[str, Any], known: tuple[str, ...], path: str) -> None:
    for name in data:
        if name not in known:
            raise _bad(f"{path}.{name}", f"is not known here; known: {', '.join(known)}")


def _named(path: str, check: Any, value: Any) -> None:
    try:
        check(value)
    except BadInput as error:
        raise _bad(path, error.message) from None


def _bad(path: str, problem: str) -> BadInput:
    return BadInput(f"{path}: {problem}", param=path)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
