"""What an adapter may be used for: the groups that may read all it learned from."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import BadInput
from training.data.rights import shared_groups

GROUPS = st.lists(st.sampled_from(["clerks", "crew", "everyone"]))


def test_only_groups_of_every_document_are_shared() -> None:
    assert shared_groups([("crew", "clerks", "guests"), ["clerks", "crew"], ("crew", "clerks")]) == ("clerks", "crew")
    assert shared_groups([]) == ()


def test_two_documents_without_a_common_group_are_named() -> None:
    with pytest.raises(
        BadInput, match="one is for 'clerks' and 'crew' and another for 'guests', and they share no"
    ) as caught:
        shared_groups([("crew", "clerks"), ("clerks", "guests"), ("guests",)])
    assert caught.value.param == "groups"


def test_documents_that_only_together_leave_nobody_are_told_apart() -> None:
    with pytest.raises(BadInput, match=r"no single group may read all documents; their groups are 'a' and 'b', "):
        shared_groups([("a", "b"), ("b", "c"), ("a", "c")])


@given(st.lists(GROUPS, min_size=1))
def test_nobody_gains_a_right(documents: list[list[str]]) -> None:
    try:
        shared = shared_groups(documents)
    except BadInput:
        assert not set.intersection(*map(set, documents))
    else:
        assert shared and all(set(shared) <= set(groups) for groups in documents)
