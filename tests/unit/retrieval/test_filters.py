import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import BadInput
from retrieval.filters import EVERY_ROW, NO_ROW, And, Compare, ContainsAny, In, Not, Or, expression, live, rights
from retrieval.types import Principal


def test_rights_and_version() -> None:
    assert expression(And((rights(Principal("acme", ("a", "b"))), live(7)))) == (
        '((tenant == "acme") and (array_contains_any(groups, ["a", "b"]))) and ((born <= 7) and (died > 7))'
    )


def test_every_node() -> None:
    assert expression(Or((Compare("position", ">=", -1), Not(In("doc_id", ("a", "b")))))) == (
        '(position >= -1) or (not (doc_id in ["a", "b"]))'
    )


def test_nothing_to_choose_from_matches_no_row_and_no_condition_matches_every_row() -> None:
    assert expression(In("doc_id", ())) == expression(ContainsAny("groups", ())) == expression(Or(())) == NO_ROW
    assert expression(And(())) == EVERY_ROW


@pytest.mark.parametrize("value", ["a\nb", "\0", "\x1b[0m", "\x7f", "\x85", "\ud800"])
def test_control_characters_are_refused(value: str) -> None:
    with pytest.raises(BadInput, match="control character"):
        expression(Compare("doc_id", "==", value))


@given(st.text(st.characters(exclude_categories=("Cc", "Cs"))))
def test_a_literal_ends_where_its_value_ends(value: str) -> None:
    text = expression(Compare("tenant", "==", value))
    literal, end = json.JSONDecoder().raw_decode(text, len("tenant == "))
    assert literal == value and end == len(text)
