"""Which calls are made again, for how long, and with which sentence they end; on a clock that the test moves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from pymilvus import MilvusException

from cluster.errors import NotFound, ResourcesShort, Unavailable
from retrieval import calls
from retrieval.calls import patiently


class Lost(grpc.RpcError):  # type: ignore[misc]
    def __init__(self, code: grpc.StatusCode, details: str = "Connection reset by peer") -> None:
        self._code, self._details = code, details

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._details

    def __str__(self) -> str:
        return self._details


GONE = Lost(grpc.StatusCode.UNAVAILABLE)
NOT_LOADED = MilvusException(101, "collection not loaded")


class Clock:
    def __init__(self) -> None:
        self.now, self.pauses = 0.0, list[float]()

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    clock = Clock()
    monkeypatch.setattr(calls.time, "monotonic", lambda: clock.now)
    monkeypatch.setattr(calls.time, "sleep", clock.sleep)
    return clock  # type: ignore[return-value]


class Milvus:
    """Answers with what it is given, one after the other; errors are raised, and the last is said for ever."""

    def __init__(self, *answers: Any) -> None:
        self.answers, self.asked, self.loads = list(answers), 0, 0

    def call(self) -> Any:
        self.asked += 1
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    def load(self) -> None:
        self.loads += 1


def ask(milvus: Milvus, patience_s: float = 20) -> Any:
    return patiently(milvus.call, uri="http://milvus", name="shelf", patience_s=patience_s, load=milvus.load)


@pytest.mark.parametrize(
    "error",
    [
        *map(Lost, (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.INTERNAL)),
        Lost(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many requests"),
        MilvusException(2, "Fail connecting to server"),
        MilvusException(8, "rate limit exceeded"),
        MilvusException(grpc.StatusCode.UNAVAILABLE, "Retry timeout"),
        MilvusException(1, "service not ready", retriable=True),
    ],
)
def test_what_passes_is_waited_for(clock: Clock, error: Exception) -> None:
    milvus = Milvus(error, error, error, "answer")
    assert ask(milvus) == "answer"
    assert milvus.asked == 4 and milvus.loads == 0
    assert sorted(clock.pauses) == clock.pauses and len(clock.pauses) == 3


def test_pauses_grow_to_two_seconds_and_end_with_patience(clock: Clock) -> None:
    milvus = Milvus(GONE)
    with pytest.raises(Unavailable) as caught:
        ask(milvus, patience_s=20)
    assert clock.now == pytest.approx(20)
    assert max(clock.pauses) <= 2 and clock.pauses[0] <= 0.05 and milvus.asked < 40
    assert caught.value.message == (
        f"Milvus at http://milvus does not answer (Connection reset by peer; tried {milvus.asked} times in 20.0 s); "
        "check that it runs and is reachable, and store.uri, store.timeout_s and store.retry_s"
    )


def test_without_patience_it_is_asked_once(clock: Clock) -> None:
    milvus = Milvus(GONE)
    with pytest.raises(Unavailable, match=r"peer; after 0\.0 s"):
        ask(milvus, patience_s=0)
    assert milvus.asked == 1 and not clock.pauses


@pytest.mark.parametrize(
    ("error", "kind", "sentence"),
    [
        (MilvusException(100, "collection not found"), NotFound, "no collection shelf in Milvus at http://milvus"),
        (Lost(grpc.StatusCode.UNAUTHENTICATED), Unavailable, "METIER_MILVUS_TOKEN"),
        (MilvusException(9, "disk quota exhausted"), ResourcesShort, r"refuses to write \(disk quota exhausted\)"),
        (MilvusException(1100, "a defect"), MilvusException, "a defect"),
        (Lost(grpc.StatusCode.RESOURCE_EXHAUSTED, "message larger than max (9 vs. 4)"), grpc.RpcError, "larger"),
    ],
)
def test_what_stays_is_said_at_once(clock: Clock, error: Exception, kind: type[Exception], sentence: str) -> None:
    milvus = Milvus(error)
    with pytest.raises(kind, match=sentence):
        ask(milvus)
    assert milvus.asked == 1 and not clock.pauses


def test_a_collection_that_is_not_loaded_is_loaded_without_a_pause(clock: Clock) -> None:
    milvus = Milvus(NOT_LOADED, "answer")
    assert ask(milvus, patience_s=0) == "answer"
    assert (milvus.asked, milvus.loads) == (2, 1) and not clock.pauses


def test_a_restart_in_between_is_survived(clock: Clock) -> None:
    milvus = Milvus(GONE, GONE, NOT_LOADED, GONE, NOT_LOADED, "answer")
    assert ask(milvus) == "answer"
    assert milvus.loads == 2


def test_a_collection_that_does_not_come_is_given_up(clock: Clock) -> None:
    milvus = Milvus(NOT_LOADED)
    with pytest.raises(Unavailable, match="collection not loaded; tried"):
        ask(milvus, patience_s=2)
    assert clock.now == pytest.approx(2)
