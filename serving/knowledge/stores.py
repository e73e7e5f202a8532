"""The vector stores that were made over the API: their logs in the storage, and who may see which.

Under ``vector-stores/<knowledge>/`` stand the events of a store (:mod:`serving.knowledge.state`). What was read is
kept, so looking at a store again costs one question for a next event. Not covered: knowledge that ``metier index``
made (:mod:`serving.knowledge.api` shows it), and the work itself (:mod:`serving.knowledge.worker`).
"""

from __future__ import annotations

import re
import threading
import unicodedata
import uuid
from collections.abc import Iterator
from typing import Any

from cluster.config import SLUG
from cluster.errors import NotFound
from cluster.registry import Registry
from retrieval.types import Principal
from serving.knowledge.files import File
from serving.knowledge.state import State, StoreFile, fold

ROOT = "vector-stores"
PREFIX = "vs_"
READABLE = 40
"""Characters of a store's name that its id keeps."""


class Stores:
    """Vector stores of all tenants; safe to use from several threads and processes."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._states: dict[str, State] = {}
        self._lock = threading.Lock()

    def create(self, title: str, metadata: dict[str, str], description: str | None, principal: Principal) -> State:
        """A new, empty store that the groups of `principal` may read."""
        name = f"{_slug(title) or 'store'}-{uuid.uuid4().hex[:12]}"
        self.add(
            name,
            op="create",
            title=title,
            metadata=metadata,
            description=description,
            tenant=principal.tenant,
            groups=list(principal.groups),
        )
        return self.state(name)

    def add(self, name: str, **event: Any) -> int:
        """Append one event to the log of `name`; its number."""
        return self._registry.log(f"{ROOT}/{name}").append(event)

    def attach(
        self, name: str, files: list[tuple[File, dict[str, Any], tuple[int, int] | None]], batch: str | None
    ) -> int:
        """Want `files`, each with its attributes and chunking, in the store."""
        items = [
            {
                "id": file.id,
                "filename": file.filename,
                "path": file.path,
                "bytes": file.bytes,
                "attributes": attributes,
                "chunking": chunking,
            }
            for file, attributes, chunking in files
        ]
        return self.add(name, op="attach", files=items, batch=batch)

    def state(self, name: str) -> State:
        """The store as its events so far make it; ``number`` is 0 if there is none of that name."""
        log = self._registry.log(f"{ROOT}/{name}")
        state = self._states.get(name, State(name))
        while True:
            try:
                entry = log.entry(state.number + 1)
            except NotFound:
                break
            state = fold(state, entry)
        with self._lock:
            known = self._states.get(name)
            if state.number and (known is None or known.number < state.number):
                self._states[name] = state
        return state

    def get(self, store_id: str, principal: Principal) -> State | None:
        """The store of that id, if it is there and `principal` may read it."""
        name = knowledge_name(store_id)
        if name is None:
            return None
        state = self.state(name)
        return state if state.number and not state.deleted and may_read(state, principal) else None

    def list(self, principal: Principal) -> list[State]:
        """The stores that `principal` may read, in no promised order."""
        return [state for state in self.all() if not state.deleted and may_read(state, principal)]

    def all(self) -> Iterator[State]:
        """Every store, also those that were deleted."""
        return filter(lambda state: state.number > 0, map(self.state, self._registry.storage.list(ROOT)))

    def made(self, name: str) -> bool:
        """Whether the knowledge `name` was made here."""
        return self.state(name).number > 0


def store_id(name: str) -> str:
    """The id of the vector store that the knowledge `name` is."""
    return PREFIX + name


def knowledge_name(store: str) -> str | None:
    """The knowledge that the vector store of that id is; None if no knowledge can be called so."""
    name = store.removeprefix(PREFIX)
    return name if store.startswith(PREFIX) and re.fullmatch(SLUG, name) else None


def may_read(state: State, principal: Principal) -> bool:
    """Whether `principal` may know of the store."""
    return state.tenant == principal.tenant and not set(state.groups).isdisjoint(principal.groups)


def may_read_file(file: StoreFile, principal: Principal) -> bool:
    """Whether `principal`, who may know of the store, may know of a file in it."""
    return file.groups is None or not set(file.groups).isdisjoint(principal.groups)


def _slug(title: str) -> str:
    plain = unicodedata.normalize("NFKD", title.replace("đ", "d").replace("Đ", "D")).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", plain.lower()).strip("-")[:READABLE].strip("-")
