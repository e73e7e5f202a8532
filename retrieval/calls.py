"""One call to Milvus, tried again while it may help, and ended with one sentence when it does not.

Every call of ours may be done twice: reads change nothing, rows are written and deleted by their key. So whatever a
restart, a lost connection, a deadline or a full queue interrupts is tried again with growing pauses. pymilvus itself
connects anew once and gives up at once if that fails, so nothing is multiplied. A collection that is not loaded,
because the server was restarted, is loaded and the call made again.

Not covered: a circuit breaker; each call finds out for itself that Milvus is away.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TypeVar

import grpc
from pymilvus import MilvusException

from cluster.errors import MetierError, NotFound, ResourcesShort, Unavailable

T = TypeVar("T")
FIRST_PAUSE_S = 0.05
LONGEST_PAUSE_S = 2.0
CANNOT_CONNECT = 2
RATE_LIMIT = 8
COLLECTION_NOT_FOUND = 100
NOT_LOADED = (101, 103)
REFUSES_WRITES = (3, 7, 9)
"""Out of memory, out of disk, writing denied by quota."""
LOST = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
)
"""What gRPC says of a connection that was refused, reset or cut, and of an answer that did not come."""
REFUSES_US = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)


def patiently(
    function: Callable[[], T], *, uri: str, name: str, patience_s: float, load: Callable[[], None] | None = None
) -> T:
    """What `function`, a call to Milvus, returns.

    Args:
        name: the collection, for errors.
        patience_s: for how long a call that fails for want of an answer is made again; 0: never.
        load: loads the collection.

    Raises:
        NotFound: there is no such collection.
        ResourcesShort: Milvus has no memory or disk left to write to.
        Unavailable: Milvus did not answer for so long, or refuses our credentials.
    """
    started, pause, attempts, must_load, loaded = time.monotonic(), FIRST_PAUSE_S, 0, False, False
    while True:
        attempts += 1
        try:
            if must_load and load is not None:
                load()
                must_load = False
            return function()
        except (MilvusException, grpc.RpcError) as error:
            must_load = must_load or error_code(error) in NOT_LOADED
            if must_load and load is not None and not loaded:
                loaded = True
                continue
            if not must_load and not transient(error):
                final = _final(error, uri, name)
                if final is None:
                    raise
                raise final from None
            waited = time.monotonic() - started
            if waited >= patience_s:
                times = f"tried {attempts} times in {waited:.1f} s" if attempts > 1 else f"after {waited:.1f} s"
                raise Unavailable(
                    f"Milvus at {uri} does not answer ({_reason(error)}; {times}); check that it runs and is reachable, "
                    "and store.uri, store.timeout_s and store.retry_s"
                ) from None
        time.sleep(min(pause * random.uniform(0.5, 1), patience_s - waited))
        pause = min(2 * pause, LONGEST_PAUSE_S)


def error_code(error: BaseException) -> int | grpc.StatusCode | None:
    """The code of an error of pymilvus or gRPC: a number of Milvus's, or gRPC's own."""
    if isinstance(error, grpc.RpcError):
        return error.code()
    if not isinstance(error, MilvusException):
        return None
    # pymilvus calls every failure to connect the same, and hides why.
    behind = error.__context__ if error.code == CANNOT_CONNECT else None
    return behind.code() if isinstance(behind, grpc.RpcError) and behind.code() in REFUSES_US else error.code


def transient(error: MilvusException | grpc.RpcError) -> bool:
    """Whether the same call may succeed a moment later."""
    code = error_code(error)
    if code == grpc.StatusCode.RESOURCE_EXHAUSTED:
        return "larger than max" not in str(error)
    return code in LOST or code in (CANNOT_CONNECT, RATE_LIMIT) or getattr(error, "retriable", False)


def _final(error: MilvusException | grpc.RpcError, uri: str, name: str) -> MetierError | None:
    """Our sentence for an error that stays; None for what is a defect of ours or the server's."""
    code = error_code(error)
    if code == COLLECTION_NOT_FOUND:
        return NotFound(
            f"there is no collection {name} in Milvus at {uri}; run `metier index`, or check knowledge.name and store.uri"
        )
    if code in REFUSES_US:
        return Unavailable(
            f"Milvus at {uri} refuses our credentials; set METIER_MILVUS_TOKEN to user:password or an API key that may "
            "read and write its collections"
        )
    if code in REFUSES_WRITES:
        return ResourcesShort(f"Milvus at {uri} refuses to write ({_reason(error)}); give it memory or disk")
    return None


def _reason(error: MilvusException | grpc.RpcError) -> str:
    if error_code(error) == CANNOT_CONNECT:
        return "no connection"
    if isinstance(error, MilvusException):
        return str(error.message).splitlines()[0][:200] if error.message else f"code {error.code}"
    return "deadline exceeded" if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED else str(error.details())[:200]
