"""The work behind a vector store, in the background and in order: index what is wanted, remove what is not.

One worker per store at a time, whichever process it is in: it holds a claim (:mod:`cluster.claim`). What is to be done
follows from the state of the store alone, so who takes over a store, after a restart or a kill, goes on where it was;
doing a thing twice changes nothing. Not covered: the indexing itself (:mod:`serving.knowledge.library`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import ExitStack, asynccontextmanager
from dataclasses import replace
from typing import Any

from cluster.claim import claim
from cluster.errors import MetierError, Mismatch, Overloaded, ResourcesShort, Unavailable
from cluster.storage import Storage
from serving.knowledge.backend import Index
from serving.knowledge.library import Indexed, IndexFile, IndexJob
from serving.knowledge.state import State, StoreFile
from serving.knowledge.stores import ROOT, Stores

log = logging.getLogger(__name__)
WAITS_S = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0)
"""Pauses before a change that failed for a reason that may pass is tried again."""
LOOK_S = 1.0
"""Between looks at a store that another process works on."""
AT_ONCE = 2
"""Stores that this process works on at once."""
GROUP_FILES = 64
GROUP_BYTES = 16 * 2**20
"""Files that are indexed together, as one version."""
PASSING = (Unavailable, Overloaded, ResourcesShort, Mismatch)


class Worker:
    """Works on the stores that it is told of, in the running event loop."""

    def __init__(self, stores: Stores, storage: Storage, index: Index) -> None:
        self._stores, self._storage, self._index = stores, storage, index
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._again: set[str] = set()
        self._free = asyncio.Semaphore(AT_ONCE)

    async def resume(self) -> None:
        """Take up what was left."""
        states = await asyncio.to_thread(lambda: list(self._stores.all()))
        for state in states:
            if state.is_unfinished:
                self.wake(state.name)

    def wake(self, name: str) -> None:
        """There may be work on the store `name`."""
        self._again.add(name)
        if name not in self._tasks:
            self._tasks[name] = asyncio.create_task(self._run(name), name=f"metier-store-{name}")

    async def close(self) -> None:
        """Stop; what is not done stays to be done."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, name: str) -> None:
        failures = 0
        while name in self._again or failures:
            self._again.discard(name)
            try:
                async with self._free:
                    if (await asyncio.to_thread(self._stores.state, name)).is_unfinished:
                        async with self._claimed(name):
                            await self._work(name)
                failures = 0
            except _Elsewhere:
                self._again.add(name)
                await asyncio.sleep(LOOK_S)
            except Exception as error:
                # Nobody waits for this task: whatever it is, it is said in the log, and tried again.
                log.error("vector store %s: %s", name, error, exc_info=not isinstance(error, MetierError))
                await asyncio.sleep(WAITS_S[min(failures, len(WAITS_S) - 1)])
                failures += 1
        del self._tasks[name]

    @asynccontextmanager
    async def _claimed(self, name: str) -> AsyncIterator[None]:
        with ExitStack() as stack:
            held = claim(self._storage, f"{ROOT}/{name}/worker", f"vector store {name}", "indexing its files")
            try:
                await asyncio.to_thread(stack.enter_context, held)
            except Mismatch:
                raise _Elsewhere from None
            try:
                yield
            finally:
                await asyncio.to_thread(stack.close)

    async def _work(self, name: str) -> None:
        alone = False
        while (job := next_job(state := await asyncio.to_thread(self._stores.state, name), alone)) is not None:
            if job.files:
                await self._note(name, op="begin", files=[file.id for file in job.files])
            try:
                outcomes = await self._patiently(job)
            except Exception as error:
                if not job.files:
                    raise
                if len(job.files) > 1 and not isinstance(error, PASSING):
                    alone = True
                    continue
                outcomes = {file.id: _failed(error) for file in job.files}
            if job.drop:
                await self._note(name, op="dropped")
            elif job.files:
                applied = {key: _event(state.files[key], outcome) for key, outcome in outcomes.items()}
                await self._note(name, op="applied", files=applied)
            else:
                await self._note(name, op="removed", files=list(job.remove), forgotten=list(job.forget))

    async def _patiently(self, job: IndexJob) -> Mapping[str, Indexed]:
        for wait in WAITS_S:
            try:
                return await self._index(job)
            except PASSING as error:
                if error.param == "embedder":  # That will not pass.
                    raise
                log.warning("knowledge %s: %s; trying again", job.knowledge, error)
            await asyncio.sleep(wait)
        return await self._index(job)

    async def _note(self, name: str, **event: Any) -> None:
        await asyncio.to_thread(lambda: self._stores.add(name, **event))


class _Elsewhere(Exception):
    """Another process works on the store."""


def next_job(state: State, alone: bool = False) -> IndexJob | None:
    """What is to be done next: end it, remove what is not wanted, index files of one chunking (with `alone`, one)."""
    base = IndexJob(knowledge=state.name, tenant=state.tenant, groups=state.groups)
    if state.deleted:
        return None if state.dropped else replace(base, drop=True)
    if gone := [file for file in state.files.values() if file.to_remove]:
        forget = tuple(file.id for file in gone if file.forget)
        return replace(base, remove=tuple(file.id for file in gone), forget=forget)
    pending = [file for file in state.files.values() if file.to_index]
    if not pending:
        return None
    group: list[StoreFile] = []
    size = 0
    for file in pending:
        size += file.bytes
        if group and (alone or len(group) == GROUP_FILES or size > GROUP_BYTES or file.chunking != group[0].chunking):
            break
        group.append(file)
    files = tuple(IndexFile(file.id, file.filename, file.path, file.bytes, file.attributes) for file in group)
    return replace(base, files=files, chunking=group[0].chunking)


def _failed(error: Exception) -> Indexed:
    if isinstance(error, MetierError):
        return Indexed(code="server_error", message=error.message)
    log.error("indexing failed", exc_info=error)
    return Indexed(code="server_error", message="something went wrong on the server; its log has the details")


def _event(file: StoreFile, outcome: Indexed) -> dict[str, Any]:
    return {
        "revision": file.revision,
        "error": {"code": outcome.code, "message": outcome.message} if outcome.code else None,
        "usage_bytes": outcome.usage_bytes,
        "groups": outcome.groups,
    }
