"""Conditions, and the two forms in which users write them, without a server."""

from __future__ import annotations

import json
import string
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import BadInput
from retrieval.filters import (
    EVERY_ROW,
    NO_ROW,
    And,
    Attribute,
    AttributeIn,
    Compare,
    ContainsAny,
    In,
    Not,
    Or,
    expression,
    live,
    openai_filter,
    parse_where,
    readable,
    readers,
    rights,
)
from retrieval.types import Principal

PLAIN = st.text(st.characters(exclude_categories=("Cc", "Cs")))


def test_rights_and_version_are_always_there() -> None:
    principal = Principal("acme", ("a", "b"))
    text = expression(readable(principal, 7, Attribute("x", "==", 1)))
    assert text.startswith(f"({expression(And((rights(principal), live(7))))}) and (")
    assert 'tenant == "acme"' in text and "(born <= 7) and (died > 7)" in text
    assert text.count(" or ") == 1  # the two groups


def test_a_reader_is_found_by_each_of_its_groups_and_by_no_other() -> None:
    marks = readers(["a", "b_c", "%"])
    for group, there in (("a", True), ("b_c", True), ("%", True), ("bxc", False), ("", False), ("b", False)):
        [mark] = [part for part in expression(ContainsAny("groups", [group])).split('"') if part.startswith("%")]
        assert (mark.strip("%") in marks) == there
        assert not set(mark[1:-1]) - set("|" + string.hexdigits)


def test_every_node() -> None:
    assert expression(Or((Compare("position", ">=", -1), Not(In("doc_id", ("a", "b")))))) == (
        '(position >= -1) or (not (doc_id in ["a", "b"]))'
    )
    assert expression(Attribute("größe", "<", 1.5)) == 'exists metadata["größe"] and metadata["größe"] < 1.5'
    assert expression(AttributeIn("k", ("a", True), negate=True)) == (
        'exists metadata["k"] and (metadata["k"] != "a" and metadata["k"] != true)'
    )


def test_nothing_to_choose_from_matches_no_row_and_no_condition_matches_every_row() -> None:
    nothing = (In("doc_id", ()), ContainsAny("groups", ()), Or(()), AttributeIn("k", ()))
    assert {expression(condition) for condition in nothing} == {NO_ROW}
    assert expression(And(())) == EVERY_ROW
    assert expression(AttributeIn("k", (), negate=True)) == 'exists metadata["k"]'


@pytest.mark.parametrize("value", ["a\nb", "\0", "\x1b[0m", "\x7f", "\x85", "\ud800"])
def test_control_characters_are_refused(value: str) -> None:
    for condition in (Compare("doc_id", "==", value), Attribute("k", "==", value), AttributeIn("k", [value])):
        with pytest.raises(BadInput, match="control character"):
            expression(condition)
    with pytest.raises(BadInput, match="control character"):
        expression(Attribute(value, "==", 1))


@pytest.mark.parametrize("key", ["", '"', "a\\", "a]", "a[0", 'x"] != 1 or metadata["y'])
def test_keys_that_milvus_would_take_apart_are_refused(key: str) -> None:
    with pytest.raises(BadInput, match="cannot be filtered by"):
        expression(Attribute(key, "==", 1))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 2**63, -(2**63)])
def test_numbers_beyond_what_milvus_reads_are_refused(value: float) -> None:
    with pytest.raises(BadInput, match=r"beyond 64 bits|not a number"):
        expression(Attribute("k", "==", value))


@given(PLAIN)
def test_a_literal_ends_where_its_value_ends(value: str) -> None:
    text = expression(Compare("tenant", "==", value))
    literal, end = json.JSONDecoder().raw_decode(text, len("tenant == "))
    assert literal == value and end == len(text)


# -- as OpenAI writes them ---------------------------------------------------------------------------------------


def test_openai_filters_are_read() -> None:
    data = {
        "type": "and",
        "filters": [
            {"type": "eq", "key": "product", "value": "ferry"},
            {"type": "or", "filters": [
                {"type": "gte", "key": "year", "value": 2024},
                {"type": "nin", "key": "lang", "value": ["en", "vi"]},
            ]},
        ],
    }  # fmt: skip
    assert openai_filter(data) == And(
        [
            Attribute("product", "==", "ferry"),
            Or([Attribute("year", ">=", 2024), AttributeIn("lang", ["en", "vi"], negate=True)]),
        ]
    )


def nested(depth: int) -> dict[str, Any]:
    made: dict[str, Any] = {"type": "eq", "key": "k", "value": 1}
    for _ in range(depth):
        made = {"type": "and", "filters": [made]}
    return made


@pytest.mark.parametrize(
    ("data", "path", "problem"),
    [
        (None, "filters", "expected an object"),
        ([], "filters", "expected an object"),
        ({}, "filters.type", "expected one of eq"),
        ({"type": "like", "key": "k", "value": 1}, "filters.type", "not 'like'"),
        ({"type": "eq", "value": 1}, "filters.key", "the name of an attribute"),
        ({"type": "eq", "key": 'a"b', "value": 1}, "filters.key", "cannot be filtered by"),
        ({"type": "eq", "key": "k"}, "filters.value", "expected a string"),
        ({"type": "eq", "key": "k", "value": None}, "filters.value", "expected a string"),
        ({"type": "eq", "key": "k", "value": [1]}, "filters.value", "expected a string"),
        ({"type": "gt", "key": "k", "value": True}, "filters.value", "have no order"),
        ({"type": "in", "key": "k", "value": "x"}, "filters.value", "a list of values for in"),
        ({"type": "in", "key": "k", "value": []}, "filters.value", "a list of values"),
        ({"type": "in", "key": "k", "value": [1, {}]}, "filters.value[1]", "expected a string"),
        ({"type": "in", "key": "k", "value": [1] * 300}, "filters.value[256]", "more than 256"),
        ({"type": "eq", "key": "k", "value": 1, "x": 1}, "filters.x", "known: type, key, value"),
        ({"type": "and", "filters": []}, "filters.filters", "a list of filters"),
        (
            {
                "type": "or",
                "filters": [{"type": "eq", "key": "k", "value": 1}, {"type": "lt", "key": "k", "value": {}}],
            },
            "filters.filters[1].value",
            "expected a string",
        ),
        (nested(9), "filters" + ".filters[0]" * 8 + ".filters", "deeper than 8"),
    ],
)
def test_bad_openai_filters_name_the_place(data: Any, path: str, problem: str) -> None:
    with pytest.raises(BadInput) as caught:
        openai_filter(data)
    assert caught.value.param == path
    assert caught.value.message.startswith(f"{path}: ") and problem in caught.value.message


def test_as_deep_as_is_allowed() -> None:
    assert expression(openai_filter(nested(8))).count("(") == 8


# -- as people write them ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "condition"),
    [
        (
            'product = "ferry" and (year >= 2024 or not draft = true)',
            And([Attribute("product", "==", "ferry"), Or([Attribute("year", ">=", 2024), Not(Attribute("draft", "==", True))])]),
        ),
        ("product=ferry and year>=2024", And([Attribute("product", "==", "ferry"), Attribute("year", ">=", 2024)])),
        ("a=1 or b=2 and c=3", Or([Attribute("a", "==", 1), And([Attribute("b", "==", 2), Attribute("c", "==", 3)])])),
        ("page in (1, 2)", In("page", [1, 2])),
        ("doc_id NOT IN (a, '12')", Not(In("doc_id", ["a", "12"]))),
        ("doc_id = 12", Compare("doc_id", "==", "12")),
        ("source != docs/a.md", Compare("source", "!=", "docs/a.md")),
        ("k not in (1, 'b\\'c')", AttributeIn("k", [1, "b'c"], negate=True)),
        ('"my key" <> -1.5e3', Attribute("my key", "!=", -1500.0)),
        ("ngày == 2024-05-01", Attribute("ngày", "==", "2024-05-01")),
        ("k = 'and'", Attribute("k", "==", "and")),
        ("k = 'true'", Attribute("k", "==", "true")),
        ("not not k = FALSE", Not(Not(Attribute("k", "==", False)))),
    ],
)  # fmt: skip
def test_where_is_read(text: str, condition: Any) -> None:
    assert parse_where(text) == condition


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "column 1: expected the name of an attribute, it ends here"),
        ("a =", "column 4: expected a value"),
        ('a = "x', "column 4: a quote without its end"),
        ("a ! b", "column 2: a stray !"),
        ("(a = 1", "column 7: expected ), it ends here"),
        ("a = 1 b = 2", "column 7: expected and, or, or the end, found b"),
        ("a = 1)", "column 6: expected and, or, or the end, found )"),
        ("page = x", "page is compared with a whole number"),
        ("page = true", "page is compared with a whole number"),
        ("a in 1", "expected (, found 1"),
        ("a not = 1", "expected in, found ="),
        ("a[0] = 1", "cannot be filtered by"),
        ("a = 99999999999999999999", "beyond 64 bits"),
        ("(" * 40 + "a = 1" + ")" * 40, "nested deeper than 32"),
        ("not " * 40 + "a = 1", "nested deeper than 32"),
        ("a = 1 and " * 1000 + "a = 1", "longer than 8000"),
    ],
)
def test_what_is_no_filter_is_refused_at_its_column(text: str, problem: str) -> None:
    with pytest.raises(BadInput) as caught:
        parse_where(text)
    assert problem in caught.value.message and caught.value.param == "where"


@given(st.text(st.sampled_from("abk \"'\\()=!<>,.1-[]") | st.characters(), max_size=40))
def test_any_text_is_read_or_refused(text: str) -> None:
    with suppress(BadInput):
        expression(parse_where(text))


@given(PLAIN.filter(lambda key: key and not set(key) & set('"\\[]')), PLAIN)
def test_whatever_is_quoted_comes_back(key: str, value: str) -> None:
    if key in ("doc_id", "source", "title", "page"):
        return
    quoted = json.dumps(value, ensure_ascii=False)
    assert parse_where(f'"{key}" = {quoted}') == Attribute(key, "==", value)
