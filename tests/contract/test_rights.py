"""Nobody reads what they may not, in any call, whatever they filter by; and everybody finds what they may."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import BadInput
from retrieval.filters import Compare, Condition, In, Not, Or, openai_filter, parse_where, readable
from retrieval.store import ALIVE, Row, Store
from retrieval.types import Principal
from tests.contract.conftest import MakeCollection
from tests.rows import ALL, ids, row, vector

TENANTS = ["acme", "blue", "acm"]
GROUPS = ["everyone", "crew", "desk", "crew_a", "crewxa", "cre"]
"""Two of them are one to ``like``, and one is the beginning of another."""
LIVES = [(1, ALIVE), (1, 3), (3, ALIVE), (2, 4)]
SUBSETS = st.lists(st.sampled_from(GROUPS), unique=True, max_size=3)
READERS = st.builds(
    Principal,
    st.sampled_from([*TENANTS, "nobody", "acme\\", "%"]),
    st.lists(st.sampled_from([*GROUPS, "x", "%", "crew%", "_______"]), unique=True, max_size=3).map(tuple),
)
TYPED = st.text("\"'\\ ()[]or=!%", max_size=12) | st.text(st.characters(exclude_categories=("Cc", "Cs")), max_size=20)


@dataclass(frozen=True)
class Case:
    rows: list[Row]
    reader: Principal
    version: int
    flushed: bool
    """milvus-lite filters what is flushed by other code."""


@st.composite
def cases(draw: st.DrawFn) -> Case:
    rows = []
    for number in range(draw(st.integers(1, 25))):
        born, died = draw(st.sampled_from(LIVES))
        rows.append(
            row(
                number, text=f"refund rule {number}", tenant=draw(st.sampled_from(TENANTS)), groups=draw(SUBSETS),
                born=born, died=died, metadata={"product": draw(st.sampled_from(["ferry", "bus"])), "n": number},
            )
        )  # fmt: skip
    return Case(rows, draw(READERS), draw(st.integers(0, 5)), draw(st.booleans()))


def allowed(case: Case) -> dict[str, Row]:
    return {
        found["chunk_id"]: found
        for found in case.rows
        if found["tenant"] == case.reader.tenant
        and set(found["groups"]) & set(case.reader.groups)
        and found["born"] <= case.version < found["died"]
    }


def everything(store: Store, name: str, condition: Condition) -> list[set[str]]:
    """Chunks that each kind of read gives under `condition`; all of them read everything that is there."""
    columns = ["chunk_id", "dense", "doc_id", "text"]
    return [
        ids(store, name, condition),
        {found["chunk_id"] for found in store.some(name, condition, columns, 100)},
        {found.chunk_id for found in store.search_dense(name, vector("refund rule"), condition, 100)},
        {found.chunk_id for found in store.search_bm25(name, "refund rule", condition, 100)},
    ]


@pytest.fixture(scope="module")
def name(make_collection: MakeCollection) -> str:
    """A collection that each case fills anew."""
    return make_collection()


def fill(store: Store, name: str, case: Case) -> None:
    store.delete(name, ALL)
    store.upsert(name, case.rows)
    if case.flushed:
        store.flush(name)


@settings(max_examples=25, deadline=None)
@given(case=cases())
def test_each_read_gives_exactly_what_may_be_read(store: Store, name: str, case: Case) -> None:
    fill(store, name, case)
    expected = set(allowed(case))
    condition = readable(case.reader, case.version)
    assert everything(store, name, condition) == [expected] * 4
    assert store.count(name, condition) == len(expected)
    for found in case.rows:  # by its id, its key, and as the neighbour of another
        for one in (
            In("chunk_id", [found["chunk_id"]]),
            Compare("row_id", "==", found["row_id"]),
            Compare("position", "==", found["position"]),
        ):
            got = {r["chunk_id"] for r in store.some(name, readable(case.reader, case.version, one), ["chunk_id"], 9)}
            assert got == {found["chunk_id"]} & expected


WIDENING: list[Condition] = [
    ALL,
    Not(Compare("tenant", "==", "acme")),
    Or((Compare("tenant", "!=", ""), ALL)),
    Compare("died", ">", 0),
]


@settings(max_examples=25, deadline=None)
@given(case=cases(), key=TYPED, value=TYPED | st.integers() | st.floats() | st.booleans(), text=TYPED, data=st.data())
def test_no_filter_widens_what_may_be_read(
    store: Store,
    name: str,
    case: Case,
    key: str,
    value: Any,
    text: str,
    data: st.DataObject,
) -> None:
    fill(store, name, case)
    may = set(allowed(case))
    typed: list[Condition] = [data.draw(st.sampled_from(WIDENING))]
    with suppress(BadInput):
        typed.append(openai_filter({"type": data.draw(st.sampled_from(["eq", "ne"])), "key": key, "value": value}))
    with suppress(BadInput):
        typed.append(parse_where(text))
    with suppress(BadInput):
        typed.append(parse_where(f"product = ferry or not {key} = '{value}'"))
    for where in typed:
        with suppress(BadInput):
            for found in everything(store, name, readable(case.reader, case.version, where)):
                assert found <= may
    ferries = {chunk for chunk, found in allowed(case).items() if found["metadata"]["product"] == "ferry"}
    assert everything(store, name, readable(case.reader, case.version, parse_where("product=ferry"))) == [ferries] * 4
