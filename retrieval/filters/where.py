"""Filters as people type them: ``product = "ferry" and (year >= 2024 or not draft = true)`` -> a condition.

::

    filter     = all { "or" all }
    all        = one { "and" one }
    one        = "not" one | "(" filter ")" | name ( "=" | "!=" | "<" | "<=" | ">" | ">=" ) value
               | name [ "not" ] "in" "(" value { "," value } ")"
    name       = word | quoted
    value      = word | quoted | number | "true" | "false"

``doc_id``, ``source``, ``title`` and ``page`` are the columns of these names, every other name is an attribute. A row
without the attribute matches no comparison, also not ``!=`` and ``not in``; ``not (...)`` is plain negation and matches
it. ``==`` and ``<>`` are read as ``=`` and ``!=``. Quotes are single or double; in them ``\\`` makes the next character
literal. A word holds no space, quote, bracket, comma or operator; ``2024-05-01`` is one, ``2024`` is a number.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from cluster.errors import BadInput
from retrieval.filters.conditions import (
    And,
    Attribute,
    AttributeIn,
    Column,
    Compare,
    Condition,
    In,
    Not,
    Operator,
    Or,
    Value,
    check_key,
    check_value,
)

COLUMNS: dict[str, type] = {"doc_id": str, "source": str, "title": str, "page": int}
OPERATORS = {"=": "==", "<>": "!="} | {operator: operator for operator in get_args(Operator)}
KEYWORDS = ("and", "or", "not", "in")
MAX_LENGTH = 8_000
MAX_DEPTH = 32
TOKEN = re.compile(
    r"""\s*(?:(?P<quoted>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')|(?P<operator><=|>=|<>|!=|==|=|<|>)"""
    r"""|(?P<mark>[(),])|(?P<word>[^\s"'<>=!(),]+))""",
    re.DOTALL,
)
INTEGER = re.compile(r"[+-]?[0-9]{1,20}")
NUMBER = re.compile(r"[+-]?[0-9]+\.[0-9]+(?:[eE][+-]?[0-9]{1,3})?")


def parse_where(text: str) -> Condition:
    """The condition that `text` stands for.

    Raises:
        BadInput: it is no such filter; the sentence names the column of the text, from 1.
    """
    if len(text) > MAX_LENGTH:
        raise BadInput(f"the filter is longer than {MAX_LENGTH} characters", param="where")
    parser = _Parser(_tokens(text), text)
    condition = parser.any(MAX_DEPTH)
    parser.expect("end")
    return condition


@dataclass(frozen=True)
class _Token:
    kind: Literal["quoted", "operator", "mark", "word", "keyword", "end"]
    text: str
    start: int


def _tokens(text: str) -> list[_Token]:
    tokens = []
    position, end = 0, len(text.rstrip())
    while position < end:
        found = TOKEN.match(text, position)
        if found is None:
            raise _bad(
                text, position, "a quote without its end" if text[position:].lstrip()[0] in "\"'" else "a stray !"
            )
        kind = cast(Any, found.lastgroup)
        value, start = found[kind], found.start(kind)
        if kind == "word" and value.lower() in KEYWORDS:
            kind, value = "keyword", value.lower()
        tokens.append(_Token(kind, value, start))
        position = found.end()
    return [*tokens, _Token("end", "", end)]


class _Parser:
    """Recursive descent; one method a rule."""

    def __init__(self, tokens: Sequence[_Token], text: str) -> None:
        self._tokens, self._text, self._next = tokens, text, 0

    def any(self, depth: int) -> Condition:
        parts = [self._all(depth)]
        while self._took("keyword", "or"):
            parts.append(self._all(depth))
        return parts[0] if len(parts) == 1 else Or(parts)

    def expect(self, kind: str, text: str = "") -> _Token:
        token = self._tokens[self._next]
        if token.kind != kind or (text and token.text != text):
            wanted = {"end": "and, or, or the end", "operator": "a comparison such as = or in"}.get(kind, text)
            raise self._unexpected(wanted)
        self._next += 1
        return token

    def _all(self, depth: int) -> Condition:
        parts = [self._one(depth)]
        while self._took("keyword", "and"):
            parts.append(self._one(depth))
        return parts[0] if len(parts) == 1 else And(parts)

    def _one(self, depth: int) -> Condition:
        if not depth:
            raise _bad(self._text, self._tokens[self._next].start, f"nested deeper than {MAX_DEPTH}")
        if self._took("keyword", "not"):
            return Not(self._one(depth - 1))
        if self._took("mark", "("):
            inner = self.any(depth - 1)
            self.expect("mark", ")")
            return inner
        token = self._tokens[self._next]
        if token.kind not in ("word", "quoted"):
            raise self._unexpected("the name of an attribute")
        self._next += 1
        name = _unquoted(token)
        self._checked(token, check_key, name)
        negate = self._took("keyword", "not")
        if self._took("keyword", "in"):
            self.expect("mark", "(")
            values = [self._value(name)]
            while self._took("mark", ","):
                values.append(self._value(name))
            self.expect("mark", ")")
            return _membership(name, values, negate)
        if negate:
            raise self._unexpected("in")
        operator = cast(Operator, OPERATORS[self.expect("operator").text])
        value = self._value(name)
        if name in COLUMNS:
            return Compare(cast(Column, name), operator, cast(str | int, value))
        return Attribute(name, operator, value)

    def _value(self, name: str) -> Value:
        token = self._tokens[self._next]
        if token.kind not in ("word", "quoted"):
            raise self._unexpected("a value")
        self._next += 1
        value: Value = _unquoted(token)
        if token.kind == "word" and COLUMNS.get(name) is not str:
            value = _scalar(token.text)
        if name in COLUMNS and type(value) is not COLUMNS[name]:
            raise _bad(self._text, token.start, f"{name} is compared with a whole number")
        self._checked(token, check_value, value)
        return value

    def _took(self, kind: str, text: str) -> bool:
        token = self._tokens[self._next]
        took = token.kind == kind and token.text == text
        self._next += took
        return took

    def _checked(self, token: _Token, check: Any, value: Any) -> None:
        try:
            check(value)
        except BadInput as error:
            raise _bad(self._text, token.start, error.message) from None

    def _unexpected(self, wanted: str) -> BadInput:
        token = self._tokens[self._next]
        found = f"found {token.text}" if token.text else "it ends here"
        return _bad(self._text, token.start, f"expected {wanted}, {found}")


def _membership(name: str, values: list[Value], negate: bool) -> Condition:
    if name in COLUMNS:
        among = In(cast(Column, name), cast(list[str | int], values))
        return Not(among) if negate else among
    return AttributeIn(name, values, negate)


def _unquoted(token: _Token) -> str:
    return re.sub(r"\\(.)", r"\1", token.text[1:-1], flags=re.DOTALL) if token.kind == "quoted" else token.text


def _scalar(word: str) -> Value:
    if word.lower() in ("true", "false"):
        return word.lower() == "true"
    if INTEGER.fullmatch(word):
        return int(word)
    return float(word) if NUMBER.fullmatch(word) else word


def _bad(text: str, position: int, problem: str) -> BadInput:
    return BadInput(f"the filter {text!r} at column {position + 1}: {problem}", param="where")
