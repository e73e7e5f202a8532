"""A vector store as the sum of its events: what it should hold, and what has been done about it.

The events are entries of an append-only log (:class:`cluster.registry.Log`), so several processes may add to one
store, and a process that starts anew knows what is left to do. A file is wanted in a revision (the number of the event
that attached it or changed its attributes) and applied in one; where the two differ there is work. ``begin`` is
written before the work, so that a file that is no longer wanted is removed even if nobody lived to say it was there.

Pure functions. Not covered: reading and writing the log (:mod:`serving.knowledge.stores`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from cluster.registry import Entry

Status = Literal["in_progress", "completed", "failed", "cancelled"]
STATUSES: tuple[Status, ...] = ("in_progress", "completed", "cancelled", "failed")


@dataclass(frozen=True)
class StoreFile:
    """A file in a vector store."""

    id: str
    filename: str
    path: str
    """Of its bytes in the storage."""
    bytes: int
    created: str
    """ISO 8601 UTC, of the event that attached it."""
    revision: int
    """Number of the event that said last how it is wanted."""
    attributes: dict[str, Any] = field(default_factory=dict)
    chunking: tuple[int, int] | None = None
    """Tokens of a chunk and of its overlap; None: those of the configuration."""
    batch: str | None = None
    wanted: bool = True
    cancelled: bool = False
    begun: bool = False
    """Rows of it may be there."""
    ever: bool = False
    """Rows of it may be in some version, if only in an earlier one."""
    forget: bool = False
    """It is to be in no version any more."""
    applied: int = 0
    """The revision that was worked on last, successfully or not."""
    error: dict[str, str] | None = None
    usage_bytes: int = 0
    groups: tuple[str, ...] | None = None
    """Groups that may read it; None until that is known."""
    document: str | None = None
    """The document that it is, if ``metier index`` read it."""

    @property
    def status(self) -> Status:
        if self.cancelled:
            return "cancelled"
        if self.applied != self.revision:
            return "in_progress"
        return "failed" if self.error else "completed"

    @property
    def is_shown(self) -> bool:
        return self.wanted or self.cancelled

    @property
    def to_index(self) -> bool:
        return self.wanted and self.applied != self.revision

    @property
    def to_remove(self) -> bool:
        return not self.wanted and (self.begun or (self.forget and self.ever))


@dataclass(frozen=True)
class Batch:
    """Files that were attached together."""

    id: str
    created: str
    files: tuple[str, ...]
    cancelled: bool = False


@dataclass(frozen=True)
class State:
    """A vector store after `number` events."""

    name: str
    """Of the knowledge; the id is ``vs_<name>``."""
    number: int = 0
    title: str = ""
    description: str | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    tenant: str = ""
    groups: tuple[str, ...] = ()
    created: str = ""
    active: str = ""
    """When the last event was."""
    deleted: bool = False
    dropped: bool = False
    """It was deleted, and its rows are gone."""
    files: Mapping[str, StoreFile] = field(default_factory=dict)
    batches: Mapping[str, Batch] = field(default_factory=dict)
    read_only: bool = False
    """``metier index`` made it."""

    @property
    def is_unfinished(self) -> bool:
        """Whether there is work to do."""
        if self.deleted:
            return not self.dropped
        return any(file.to_index or file.to_remove for file in self.files.values())

    @property
    def shown(self) -> list[StoreFile]:
        """Its files, oldest first."""
        return [file for file in self.files.values() if file.is_shown]


def fold(state: State, entry: Entry) -> State:
    """`state` after one more event."""
    data = entry.data
    state = replace(state, number=entry.number, active=entry.created)
    match data["op"]:
        case "create":
            return replace(
                state,
                title=data["title"],
                description=data["description"],
                metadata=data["metadata"],
                tenant=data["tenant"],
                groups=tuple(data["groups"]),
                created=entry.created,
            )
        case "update":
            return replace(state, **{key: data[key] for key in ("title", "metadata") if key in data})
        case "attach":
            return _attach(state, entry)
        case "attributes":
            return _change(
                state, [data["file"]], lambda f: replace(f, attributes=data["attributes"], revision=entry.number)
            )
        case "detach":
            return _change(state, data["files"], lambda f: _detached(f, data["forget"]))
        case "cancel":
            return _cancel(state, data["batch"])
        case "begin":
            return _change(state, data["files"], lambda f: replace(f, begun=True, ever=True))
        case "applied":
            return _change(state, data["files"], lambda f: _applied(f, data["files"][f.id]))
        case "removed":
            return _change(state, data["files"], lambda f: _removed(f, f.id in data["forgotten"]))
        case "delete":
            return replace(state, deleted=True)
        case "dropped":
            return replace(state, dropped=True)
    return state  # An event of a later metier: what it means is not for us to act on.


def _change(state: State, ids: Iterable[str], change: Any) -> State:
    changed = {file_id: change(state.files[file_id]) for file_id in ids if file_id in state.files}
    return replace(state, files={**state.files, **changed})


def _attach(state: State, entry: Entry) -> State:
    files = dict(state.files)
    for item in entry.data["files"]:
        before = files.pop(item["id"], None)  # Attached again, it counts as new.
        chunking = tuple(item["chunking"]) if item["chunking"] else None
        files[item["id"]] = StoreFile(
            **item | {"chunking": chunking},
            created=entry.created,
            revision=entry.number,
            batch=entry.data["batch"],
            begun=bool(before and before.begun),
            ever=bool(before and before.ever),
        )
    state = replace(state, files=files)
    if batch := entry.data["batch"]:
        ids = tuple(item["id"] for item in entry.data["files"])
        state = replace(state, batches={**state.batches, batch: Batch(batch, entry.created, ids)})
    return state


def _cancel(state: State, batch_id: str) -> State:
    batch = state.batches[batch_id]
    pending = [key for key in batch.files if key in state.files and _is_pending_in(state.files[key], batch_id)]
    state = _change(state, pending, lambda f: replace(f, wanted=False, cancelled=True))
    return replace(state, batches={**state.batches, batch_id: replace(batch, cancelled=True)})


def _is_pending_in(file: StoreFile, batch_id: str) -> bool:
    return file.batch == batch_id and file.to_index


def _applied(file: StoreFile, outcome: Mapping[str, Any]) -> StoreFile:
    """The outcome counts for the revision that was worked on; meanwhile the file may be wanted otherwise."""
    groups = tuple(outcome["groups"]) if outcome["groups"] is not None else file.groups
    return replace(
        file,
        applied=outcome["revision"],
        error=outcome["error"],
        usage_bytes=outcome["usage_bytes"],
        groups=groups,
    )


def _detached(file: StoreFile, forget: bool) -> StoreFile:
    return replace(file, wanted=False, cancelled=False, forget=file.forget or forget)


def _removed(file: StoreFile, forgotten: bool) -> StoreFile:
    """If it was attached again meanwhile, the next round indexes it."""
    if file.wanted:
        return file
    return replace(file, begun=False, ever=file.ever and not forgotten)
