"""Which replica is chosen, in numbers: homes, costs, overflow of a hot adapter, what a router knows between reports."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from serving.routing import Book, Candidate, Report, homes, rank

REPLICAS = [f"replica-{number}" for number in range(5)]
ADAPTERS = [f"{number:064x}" for number in range(400)]
HOT = ADAPTERS[0]


def stats(number: int, **figures: Any) -> dict[str, Any]:
    """A report as it travels; `number` tells it from the one before."""
    empty = {"number": number, "requests": 0, "waiting_tokens": 0, "tokens_per_s": 100.0, "load_s": 1.0}
    return {**empty, "resident": [], "hosted": [], "demand": {}, "minimum": {}, **figures}


def test_homes_are_the_same_for_all_routers_whatever_the_order() -> None:
    for adapter in ADAPTERS[:20]:
        assert homes(adapter, REPLICAS) == homes(adapter, reversed(REPLICAS))
        assert sorted(homes(adapter, REPLICAS)) == REPLICAS


def test_homes_are_spread_evenly() -> None:
    first = Counter(homes(adapter, REPLICAS)[0] for adapter in ADAPTERS)
    assert set(first) == set(REPLICAS)
    assert max(first.values()) < 1.35 * len(ADAPTERS) / len(REPLICAS)


def test_a_replica_that_goes_moves_only_its_own_adapters() -> None:
    for adapter in ADAPTERS:
        before = homes(adapter, REPLICAS)
        after = homes(adapter, REPLICAS[1:])
        assert after == [replica for replica in before if replica != REPLICAS[0]]


def test_a_cold_adapter_goes_home_and_the_base_model_anywhere() -> None:
    idle = [Candidate(id) for id in REPLICAS]
    for adapter in ADAPTERS[:50]:
        assert rank(idle, adapter, tokens=100)[0] == homes(adapter, REPLICAS)[0]
    firsts = Counter(rank(idle, None, tokens=100, key=f"request {number}")[0] for number in range(400))
    assert min(firsts.values()) > 50


def test_a_queue_is_paid_until_it_costs_more_than_a_load() -> None:
    first, second, *_ = homes(HOT, REPLICAS)
    here = Candidate(first, resident=frozenset({HOT}), tokens_per_s=100, load_s=1.0)
    there = Candidate(second, tokens_per_s=100, load_s=1.0)
    for requests, stays in ((1, True), (29, True), (31, False)):  # a load and a margin of two loads are 3 s
        ranked = rank([replace(here, requests=requests, tokens=10 * requests), there], HOT, tokens=10, batch=8)
        assert (ranked[0] == first) is stays
    wanted_by_two = [replace(here, requests=11, tokens=110), there]
    assert rank(wanted_by_two, HOT, tokens=10, batch=8, wanted=1)[0] == first
    assert rank(wanted_by_two, HOT, tokens=10, batch=8, wanted=2)[0] == second, "a second home costs one load"


def test_a_long_answer_delays_a_short_one_by_no_more_than_its_own_tokens() -> None:
    busy = Candidate(REPLICAS[0], requests=1, tokens=100_000, resident=frozenset({HOT}), load_s=1.0)
    idle = Candidate(REPLICAS[1], load_s=1.0)
    assert rank([busy, idle], HOT, tokens=50)[0] == busy.id, "50 tokens at 100/s are less than a load"
    assert rank([busy, idle], HOT, tokens=5000)[0] == idle.id


def test_memory_of_the_host_is_nearer_than_the_disk() -> None:
    first, second, third, *_ = homes(HOT, REPLICAS)
    candidates = [Candidate(first), Candidate(second, hosted=frozenset({HOT})), Candidate(third)]
    assert rank(candidates, HOT, tokens=100) == [second, first, third]


def test_a_burst_for_one_adapter_spreads_before_any_report() -> None:
    book = Book()
    book.hear({id: stats(1) for id in REPLICAS[:3]}, now=0.0)
    got: Counter[str] = Counter()
    for number in range(60):
        chosen = book.rank(REPLICAS[:3], HOT, 100, f"request {number}")[0]
        book.sent(f"request {number}", chosen, HOT, 100, now=0.001 * number)
        got[chosen] += 1
    assert got.most_common(1)[0][0] == homes(HOT, REPLICAS[:3])[0]
    assert set(got) == set(REPLICAS[:3])
    assert max(got.values()) - min(got.values()) <= 2, "from then on it is resident everywhere and queues decide"


def test_two_routers_send_a_cold_adapter_to_the_same_replica() -> None:
    books = [Book(), Book()]
    for book in books:
        book.hear({id: stats(1) for id in REPLICAS}, now=0.0)
    for adapter in ADAPTERS[:50]:
        assert len({book.rank(REPLICAS, adapter, 10, "request")[0] for book in books}) == 1


def test_a_report_takes_the_place_of_what_was_sent_before_it() -> None:
    book = Book()
    book.hear({"one": stats(1)}, now=0.0)
    book.sent("early", "one", HOT, 100, now=0.0)
    book.sent("late", "one", HOT, 70, now=1.9)
    assert book.candidates(["one"])[0].tokens == 170
    book.hear({"one": stats(2, requests=1, waiting_tokens=40, resident=[HOT])}, now=2.0)
    found = book.candidates(["one"])[0]
    assert (found.tokens, found.requests) == (110, 2), "40 of the early one, and the late one is not in the report yet"
    book.hear({"one": stats(2, requests=1, waiting_tokens=40, resident=[HOT])}, now=9.0)
    assert book.candidates(["one"])[0].tokens == 110, "the same report again tells nothing new"
    book.ended("late", "one")
    assert book.candidates(["one"])[0].tokens == 40


def test_an_adapter_on_its_way_counts_until_a_report_tells() -> None:
    book = Book()
    book.hear({"one": stats(1)}, now=0.0)
    book.sent("request", "one", HOT, 10, now=0.0)
    book.ended("request", "one")
    assert HOT in book.candidates(["one"])[0].resident
    book.hear({"one": stats(2)}, now=2.0)
    assert HOT not in book.candidates(["one"])[0].resident, "it was evicted in between, or could not be loaded"


def test_nothing_is_left_of_requests_that_ended_and_replicas_that_went() -> None:
    book = Book()
    book.hear({id: stats(1) for id in REPLICAS}, now=0.0)
    for number in range(1000):
        book.sent(f"request {number}", REPLICAS[number % 5], ADAPTERS[number % 50], 10, now=0.0)
    for number in range(0, 1000, 2):
        book.accepted(f"request {number}")
    book.ended("request 1", REPLICAS[0])
    assert len(book._sent) == 1000, "refused by a replica that it was taken from again since"
    book.hear({REPLICAS[0]: stats(2)}, now=61.0)
    assert {sent.replica for sent in book._sent.values()} == {REPLICAS[0]}
    assert all(sent.confirmed for sent in book._sent.values())
    for number in range(1000):
        book.ended(f"request {number}", REPLICAS[number % 5])
    assert (len(book._sent), set(book._arriving), set(book.reports)) == (0, {REPLICAS[0]}, {REPLICAS[0]})


def test_replicas_that_have_not_measured_are_taken_for_like_the_others() -> None:
    book = Book()
    book.hear({"new": {}, "old": stats(4, tokens_per_s=700.0, load_s=0.2)}, now=0.0)
    new, old = book.candidates(["new", "old"])
    assert (new.tokens_per_s, new.load_s) == (old.tokens_per_s, old.load_s) == (700.0, 0.2)


def test_demand_of_all_replicas_gives_an_adapter_more_homes() -> None:
    book = Book()
    book.hear({id: stats(1, demand={HOT: 30.0, ADAPTERS[1]: 1.0}) for id in REPLICAS}, now=0.0)
    assert book.wanted == {HOT: 3}  # 150 tokens/s at 70 of each 100
    assert {replica for replica, adapters in book.to_keep(0.0).items() if adapters == [HOT]} == set(
        homes(HOT, REPLICAS)[:3]
    )


def test_homes_are_asked_to_keep_what_they_miss_and_not_every_second() -> None:
    minimum = {HOT: 2, ADAPTERS[1]: 1}
    book = Book()

    def hear(now: float, number: int, **figures: Any) -> None:
        book.hear({id: stats(number, minimum=minimum, **figures) for id in REPLICAS}, now)

    book.hear({id: {} for id in REPLICAS}, now=0.0)
    assert book.to_keep(0.0) == {}, "nobody has said anything"
    hear(1.0, 1)
    asked = book.to_keep(1.0)
    assert sorted(adapter for adapters in asked.values() for adapter in adapters) == sorted([HOT, HOT, ADAPTERS[1]])
    assert set(homes(HOT, REPLICAS)[:2]) <= set(asked)
    hear(2.0, 2)
    assert book.to_keep(2.0) == {}
    hear(12.0, 3)
    assert book.to_keep(12.0) == asked, "not there after ten seconds: once more"
    hear(24.0, 4, hosted=[HOT, ADAPTERS[1]])
    assert book.to_keep(24.0) == {}


def test_a_report_is_read_from_what_travels() -> None:
    report = Report.read(stats(3, resident=[HOT], demand={HOT: 1.5}))
    assert (report.number, report.resident, report.demand) == (3, frozenset({HOT}), {HOT: 1.5})
    with pytest.raises(TypeError):
        Report.read(stats(3, colour="blue"))
