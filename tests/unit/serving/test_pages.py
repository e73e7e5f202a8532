"""Pages are never lost, never lent twice, and found only by who would have computed the same."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from serving.engine.native.pages import Pages

SIZE = 4


def chain(pages: Pages, tokens: list[int], adapter: str | None = None) -> list[bytes]:
    made: list[bytes] = []
    pages.extend(made, tokens, adapter)
    return made


def fill(pages: Pages, tokens: list[int], adapter: str | None = None) -> list[int]:
    """Allocate, compute and publish the full pages of `tokens`."""
    table = []
    for digest in chain(pages, tokens, adapter):
        table.append(pages.allocate())
        pages.publish(table[-1], digest)
    return table


def test_what_was_released_is_found_again_by_its_beginning() -> None:
    pages = Pages(8, SIZE)
    table = fill(pages, list(range(12)))
    pages.release(table)
    assert pages.free == 8
    assert pages.match(chain(pages, [*range(8), 99, 98, 97, 96])) == table[:2]
    assert pages.match(chain(pages, [99, *range(1, 12)])) == []


def test_an_equal_page_after_another_beginning_is_another_page() -> None:
    pages = Pages(8, SIZE)
    table = fill(pages, [1, 2, 3, 4, 5, 6, 7, 8])
    assert pages.match(chain(pages, [5, 6, 7, 8])) == []
    assert pages.match(chain(pages, [1, 2, 3, 4])) == table[:1]


@given(st.lists(st.integers(0, 2), min_size=SIZE, max_size=20), st.permutations([None, "a" * 64, "b" * 64]))
def test_no_adapter_finds_what_another_computed(tokens: list[int], adapters: list[str | None]) -> None:
    pages = Pages(32, SIZE)
    for place, adapter in enumerate(adapters):
        for other in adapters[place:]:
            assert pages.match(chain(pages, tokens, other)) == []
        table = fill(pages, tokens, adapter)
        assert pages.match(chain(pages, tokens, adapter)) == table
        pages.release(table)


def test_the_least_recently_released_goes_first_and_its_end_before_its_beginning() -> None:
    pages = Pages(6, SIZE)
    old, new = fill(pages, list(range(12))), fill(pages, list(range(100, 112)))
    pages.release(old)
    pages.release(new)
    assert [pages.allocate() for _ in range(4)] == [*old[::-1], new[-1]]
    assert pages.match(chain(pages, list(range(12)))) == []
    assert pages.match(chain(pages, list(range(100, 112)))) == new[:2]


def test_what_is_used_again_is_young_again() -> None:
    pages = Pages(4, SIZE)
    old, new = fill(pages, list(range(8))), fill(pages, list(range(100, 108)))
    for table in (old, new):
        pages.release(table)
    pages.hold(old)
    pages.release(old)
    assert [pages.allocate(), pages.allocate()] == new[::-1]


def test_of_two_equal_pages_the_first_is_the_known_one() -> None:
    pages = Pages(4, SIZE)
    first, second = fill(pages, [1, 2, 3, 4]), fill(pages, [1, 2, 3, 4])
    assert pages.match(chain(pages, [1, 2, 3, 4])) == first
    pages.release(second)
    pages.release(first)
    assert (len(pages.blank), len(pages.reusable)) == (3, 1)


def test_a_forgotten_page_is_found_by_nobody() -> None:
    pages = Pages(4, SIZE)
    table = fill(pages, list(range(8)))
    pages.forget(table[:1])
    assert pages.match(chain(pages, list(range(8)))) == []
    pages.release(table)
    assert pages.free == 4


def test_without_prefixes_nothing_is_found() -> None:
    pages = Pages(4, SIZE, prefixes=False)
    pages.release(fill(pages, list(range(8))))
    assert pages.match(chain(pages, list(range(8)))) == []
    assert len(pages.blank) == 4


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2)])
def test_positions_are_rounded_up_to_pages(tokens: int, pages: int) -> None:
    assert Pages(4, SIZE).needed(tokens) == pages


class PagesMachine(RuleBasedStateMachine):
    """Sequences that begin, grow, share and end in any order, against what a plain dictionary says pages hold."""

    def __init__(self) -> None:
        super().__init__()
        self.pages = Pages(12, 2)
        self.tables: list[tuple[str | None, list[int], list[int]]] = []
        """(adapter, tokens, pages) of each sequence."""
        self.content: dict[int, tuple[str | None, tuple[int, ...]]] = {}
        """Page -> the adapter and all tokens up to its end."""

    @rule(adapter=st.sampled_from([None, "a", "b"]), tokens=st.lists(st.integers(0, 1), max_size=8))
    def begin(self, adapter: str | None, tokens: list[int]) -> None:
        full = len(tokens) // 2
        hashes = chain(self.pages, tokens, adapter)
        table = self.pages.match(hashes)
        for place, page in enumerate(table):
            assert self.content[page] == (adapter, tuple(tokens[: 2 * place + 2]))
        taken = full - len(table) + sum(page in self.pages.reusable for page in table)
        if taken > self.pages.free:
            return
        self.pages.hold(table)
        for place in range(len(table), full):
            page = self.pages.allocate()
            assert all(page not in other for _, _, other in self.tables), "the page is somebody's"
            self.content[page] = (adapter, tuple(tokens[: 2 * place + 2]))
            self.pages.publish(page, hashes[place])
            table.append(page)
        self.tables.append((adapter, tokens, table))

    @precondition(lambda self: self.tables)
    @rule(chance=st.randoms(use_true_random=False))
    def end(self, chance: random.Random) -> None:
        _, _, table = self.tables.pop(chance.randrange(len(self.tables)))
        self.pages.release(table)

    @precondition(lambda self: self.tables)
    @rule(chance=st.randoms(use_true_random=False))
    def spoil(self, chance: random.Random) -> None:
        self.pages.forget(chance.choice(self.tables)[2])

    @invariant()
    def held_and_free_are_all(self) -> None:
        pages = self.pages
        held = [page for page in range(pages.count) if pages.holders[page]]
        assert sorted([*held, *pages.blank, *pages.reusable]) == list(range(pages.count))
        assert pages.free == pages.count - len(held)

    @invariant()
    def each_page_has_as_many_holders_as_tables(self) -> None:
        for page in range(self.pages.count):
            assert self.pages.holders[page] == sum(page in table for _, _, table in self.tables)

    @invariant()
    def names_are_one_to_one(self) -> None:
        assert {digest: page for page, digest in self.pages.hashes.items()} == self.pages.found
        assert set(self.pages.reusable) <= set(self.pages.hashes)
        assert not set(self.pages.blank) & set(self.pages.hashes)


TestPagesMachine = PagesMachine.TestCase
TestPagesMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
