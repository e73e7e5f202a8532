"""The error family of metier: a sentence that names what is wrong and what to do, an exit code, an HTTP status.

Every error here is picklable, so that it crosses a Ray worker boundary unchanged. The two tables at the end of
a failure are decided here and nowhere else: :attr:`MetierError.exit_code` for the command line and
:attr:`MetierError.http_status` / :attr:`MetierError.code` for the HTTP API.
"""

from __future__ import annotations

from typing import Any, ClassVar


class MetierError(Exception):
    """Something the caller can act on; ``str(error)`` is one sentence (or one a line) that names the fix."""

    exit_code: ClassVar[int] = 1
    http_status: ClassVar[int] = 500
    error_type: ClassVar[str] = "server_error"
    code: ClassVar[str | None] = None

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        """The field, row or option at fault, where there is one."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.message, self.param)


def _rebuild(kind: type[MetierError], message: str, param: str | None) -> MetierError:
    return kind(message, param=param)


class BadInput(MetierError):
    """A value, row or request that cannot be used as it is."""

    exit_code = 2
    http_status = 400
    error_type = "invalid_request_error"


class ConfigError(BadInput):
    """The configuration is wrong: an unknown key, a wrong type, settings that contradict each other."""

    code = "invalid_config"


class ContextTooLong(BadInput):
    """The prompt does not fit the model's context."""

    code = "context_length_exceeded"


class TooLarge(BadInput):
    """A file is larger than the configuration allows."""

    http_status = 413
    code = "file_too_large"


class NotFound(MetierError):
    """A model, adapter, release, collection or file that is not there."""

    exit_code = 3
    http_status = 404
    error_type = "invalid_request_error"
    code = "not_found"


class ModelNotFound(NotFound):
    """The name in ``model`` resolves to nothing."""

    code = "model_not_found"


class Mismatch(MetierError):
    """Two things that must agree do not: an adapter and its base, a digest and its bytes."""

    exit_code = 4
    http_status = 409
    error_type = "invalid_request_error"
    code = "mismatch"


class Unavailable(MetierError):
    """Something metier needs does not answer: Milvus, a model source, the object store, Ray."""

    exit_code = 5
    http_status = 503
    error_type = "server_error"
    code = "unavailable"


class ResourcesShort(MetierError):
    """The machine or cluster has not enough of something: CPUs, GPUs, disk, a free port."""

    exit_code = 6
    http_status = 503
    error_type = "server_error"
    code = "resources_short"


class Diverged(MetierError):
    """A training run whose loss is not a number any more."""

    exit_code = 8
    http_status = 500
    error_type = "server_error"
    code = "diverged"


class Overloaded(MetierError):
    """The queue is full; the same request may work a moment later."""

    exit_code = 7
    http_status = 429
    error_type = "rate_limit_error"
    code = "overloaded"


class DeadlineExceeded(MetierError):
    """The answer was not complete in the time it was given."""

    exit_code = 7
    http_status = 504
    error_type = "server_error"
    code = "deadline_exceeded"


def exit_codes() -> dict[int, str]:
    """Exit codes of the command line and what they mean, for ``docs`` and ``--help``."""
    return {
        0: "done",
        1: "failed for a reason metier does not know; the traceback is printed",
        2: "bad input: a setting, option, row or file",
        3: "not found: a model, adapter, release, collection or file",
        4: "mismatch or conflict: an adapter and its base, a digest, a lock held by another process",
        5: "unreachable: Milvus, Ray, the object store, a model source",
        6: "not enough: CPUs, GPUs, disk, a free port",
        7: "overloaded, or not done in time: try again",
        8: "diverged: the loss of a training run is not a number any more",
        129: "the terminal was closed",
        130: "interrupted",
        143: "terminated",
    }
