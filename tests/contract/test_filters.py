"""What users filter by, against a real Milvus: the same rows as a plain reading in Python finds, whatever is typed."""

from __future__ import annotations

import operator
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import BadInput
from retrieval.filters import And, Attribute, Compare, Condition, ContainsAny, In, Not, Or, openai_filter, parse_where
from retrieval.store import Store
from tests.contract.conftest import MakeCollection
from tests.rows import ids, row

ATTRIBUTES: list[dict[str, Any]] = [
    {},
    {"product": "ferry", "year": 2023, "draft": True},
    {"product": "ferry", "year": 2024, "draft": False, "weight": 1.5},
    {"product": "bus", "year": 2024.0, "weight": 2},
    {"product": "phà", "year": 2025, "größe": 'a "quoted" \\ value'},
    {"product": "", "draft": False, "nested": {"year": 2024}, "it's": "it's"},
    {"product": None, "year": -3, "a b": 7, "true": "x"},
]


@pytest.fixture(scope="module")
def shelf(make_collection: MakeCollection) -> str:
    return make_collection(
        [
            row(n, metadata=metadata, page=n, title=f"title {n}", doc_id=f"doc{n}", source=f"a/{n}.md")
            for n, metadata in enumerate(ATTRIBUTES)
        ]
    )


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("product = ferry", {1, 2}),
        ("product != ferry", {3, 4, 5}),
        ("not product = ferry", {0, 3, 4, 5, 6}),
        ("product in (ferry, phà)", {1, 2, 4}),
        ("product not in (ferry, phà)", {3, 5}),
        ("product = ''", {5}),
        ("year = 2024", {2, 3}),
        ("year >= 2024", {2, 3, 4}),
        ("year < 0", {6}),
        ("weight > 1.2 and weight <= 2.0", {2, 3}),
        ("draft = true", {1}),
        ("draft != true", {2, 5}),
        ("größe = 'a \"quoted\" \\\\ value'", {4}),
        ('"it\'s" = "it\'s"', {5}),
        ("'a b' = 7", {6}),
        ("'true' = x", {6}),
        ("product = ferry and (year >= 2024 or not draft = true)", {2}),
        ("page in (1, 2) or title = 'title 5'", {1, 2, 5}),
        ("doc_id > doc4", {5, 6}),
        ("source = a/3.md", {3}),
        ("unheard = 1 or unheard != 1", set()),
    ],
)
def test_where_finds_what_it_says(store: Store, shelf: str, text: str, found: set[int]) -> None:
    assert ids(store, shelf, parse_where(text)) == {f"c{n}" for n in found}


OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "eq": operator.eq, "ne": operator.ne, "gt": operator.gt, "gte": operator.ge, "lt": operator.lt, "lte": operator.le
}  # fmt: skip
VALUES = st.sampled_from(["ferry", "bus", "phà", "", "x"]) | st.sampled_from([2023, 2024, 2024.5, -3])
COMPARISONS = st.builds(
    lambda kind, key, value: {"type": kind, "key": key, "value": value},
    st.sampled_from(sorted(OPERATORS)), st.sampled_from(["product", "year", "weight", "unheard"]), VALUES,
) | st.builds(
    lambda kind, key, values: {"type": kind, "key": key, "value": values},
    st.sampled_from(["in", "nin"]), st.sampled_from(["product", "year"]), st.lists(VALUES, min_size=1, max_size=3),
)  # fmt: skip
FILTERS = st.recursive(
    COMPARISONS,
    lambda inner: st.builds(
        lambda kind, parts: {"type": kind, "filters": parts},
        st.sampled_from(["and", "or"]),
        st.lists(inner, min_size=1, max_size=3),
    ),
    max_leaves=5,
)


def says(data: dict[str, Any], metadata: dict[str, Any]) -> bool:
    """What an OpenAI filter means, in Python."""
    if data["type"] in ("and", "or"):
        return (all if data["type"] == "and" else any)(says(part, metadata) for part in data["filters"])
    there, value = metadata.get(data["key"]), data["value"]
    if there is None:
        return False
    if data["type"] in ("in", "nin"):
        return (there in value) == (data["type"] == "in")
    if isinstance(there, str) != isinstance(value, str):
        return bool(data["type"] == "ne")
    return OPERATORS[data["type"]](there, value)


@settings(max_examples=60, deadline=None)
@given(data=FILTERS)
def test_openai_filters_find_what_they_say(store: Store, shelf: str, data: dict[str, Any]) -> None:
    expected = {f"c{n}" for n, metadata in enumerate(ATTRIBUTES) if says(data, metadata)}
    assert ids(store, shelf, openai_filter(data)) == expected


# -- nothing typed breaks out ------------------------------------------------------------------------------------

TYPED = st.text(st.characters(exclude_categories=("Cc", "Cs")), max_size=30) | st.text("\"'\\ ()[]or=!|%", max_size=12)


@pytest.fixture(scope="module")
def literals(make_collection: MakeCollection) -> str:
    return make_collection([row(1, doc_id="another\tdocument", metadata={"other": 1})])


@settings(max_examples=40, deadline=None)
@given(value=TYPED)
def test_the_server_reads_every_literal_as_it_was_meant(store: Store, literals: str, value: str) -> None:
    store.upsert(literals, [row(2, doc_id=value, metadata={"k": value})])
    for condition in (
        Compare("doc_id", "==", value),
        Or((In("doc_id", [value, "x"]), Compare("position", "<", 0))),
        Attribute("k", "==", value),
    ):
        assert ids(store, literals, condition) == {"c2"}
    assert ids(store, literals, Compare("doc_id", "!=", value)) == {"c1"}
    assert ids(store, literals, Attribute("k", "!=", value)) == set()


@settings(max_examples=40, deadline=None)
@given(key=TYPED, value=TYPED)
def test_the_server_reads_every_key_as_it_was_meant_or_we_refuse_it(
    store: Store, literals: str, key: str, value: str
) -> None:
    condition = Attribute(key, "==", value)
    with suppress(BadInput):
        store.upsert(literals, [row(2, metadata={key: value})])
        assert ids(store, literals, condition) == {"c2"}
        assert ids(store, literals, Not(condition)) == {"c1"}


ATTACKS = [
    'acme" or tenant != "',
    'acme" || "1" == "1',
    '" or true or tenant == "',
    "acme' or 'a' == 'a",
    'acme\\" or tenant != \\"',
    'x\\\\" or row_id != "',
    'acme") or (tenant != "',
    'everyone"]) or array_contains_any(groups, ["crew',
    '%" or readers like "%',
    "acme\\",
    "\\u0022 or tenant != \\u0022",
    "%",
    "_",
    "|",
    "acme; drop",
    "{tenant}",
    '"""',
    "ａｃｍｅ",
]


@pytest.mark.parametrize("attack", ATTACKS)
def test_injected_text_stays_a_value(store: Store, shelf: str, attack: str) -> None:
    conditions: list[Condition] = [
        Compare("tenant", "==", attack),
        In("doc_id", [attack]),
        ContainsAny("groups", [attack]),
        Attribute("product", "==", attack),
        And([Compare("tenant", "==", attack), Attribute("product", "==", "ferry")]),
    ]
    for condition in conditions:
        assert ids(store, shelf, condition) == set()
    assert len(ids(store, shelf, Not(Compare("doc_id", "==", attack)))) == len(ATTRIBUTES)
