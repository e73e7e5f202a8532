"""Files and vector stores, as objects that OpenAI's clients know: what is asked, by whom -> plain data for JSON.

Stores made over the API and knowledge that ``metier index`` made are looked at alike; only the former can be changed.
Rights: a store or file of another tenant, or of groups that the principal is not in, is not found; what rows hold is
asked of Milvus under the principal's rights. Not covered: embeddings and reranking (:mod:`serving.knowledge.models`).
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster.config import Config, RetrievalConfig
from cluster.errors import BadInput, NotFound
from cluster.registry import Registry
from retrieval.filters import And, Compare, Condition, Not, openai_filter
from retrieval.types import Passage, Principal, Snapshot
from serving.knowledge.backend import Backend
from serving.knowledge.files import File, Files
from serving.knowledge.library import documents_of, file_of, read_only_id
from serving.knowledge.models import Models
from serving.knowledge.page import listing, page
from serving.knowledge.shapes import (
    AttachFile,
    CreateBatch,
    CreateStore,
    ListFiles,
    ListStoreFiles,
    ListStores,
    Search,
    UpdateFile,
    UpdateStore,
    attributes_of,
    file_batch,
    made_store,
    search_result,
    sizes,
    store_file,
)
from serving.knowledge.state import Batch, State, StoreFile
from serving.knowledge.stores import Stores, knowledge_name, may_read_file, store_id
from serving.knowledge.worker import Worker


class KnowledgeApi:
    """The API of one configuration. Its coroutines run in one event loop; they block nothing."""

    def __init__(self, config: Config, registry: Registry, backend: Backend) -> None:
        self._config, self._registry, self._backend = config, registry, backend
        self.models = Models(config, backend)
        self._files, self._stores = Files(registry.storage), Stores(registry)
        self._worker = Worker(self._stores, registry.storage, backend.index)

    async def start(self) -> None:
        """Take up the work that an earlier process left."""
        await self._worker.resume()

    async def close(self) -> None:
        """Stop working; :meth:`start` of a later process goes on."""
        await self._worker.close()

    # -- files ---------------------------------------------------------------------------------------------------

    @property
    def max_file_bytes(self) -> int:
        """Larger files are refused."""
        return int(self._config.knowledge.max_file_mb * 1e6)

    async def upload(self, local: Path, size: int, filename: str, purpose: str, principal: Principal) -> dict[str, Any]:
        """Keep a copy of the file `local`."""
        made = await asyncio.to_thread(self._files.add, local, size, filename, purpose, principal)
        return made.to_openai()

    async def list_files(self, query: ListFiles, principal: Principal) -> dict[str, Any]:
        files = await asyncio.to_thread(self._files.list, principal, query.purpose)
        cut, more = page(files, lambda file: file.id, limit=query.limit, order=query.order, after=query.after)
        return listing([file.to_openai() for file in cut], more)

    async def get_file(self, file_id: str, principal: Principal) -> dict[str, Any]:
        return (await self._file(file_id, principal)).to_openai()

    async def download(self, file_id: str, local: Path, principal: Principal) -> str:
        """Write the bytes of a file to `local`; its name."""
        file = await self._file(file_id, principal)
        await asyncio.to_thread(self._files.download, file, local)
        return file.filename

    async def delete_file(self, file_id: str, principal: Principal) -> dict[str, Any]:
        """Remove a file, and its rows from every version of every store it was in."""
        file = await self._file(file_id, principal)
        for name in await asyncio.to_thread(self._detach_everywhere, file):
            self._worker.wake(name)
        await asyncio.to_thread(self._files.remove, file)
        return {"id": file_id, "object": "file", "deleted": True}

    def _detach_everywhere(self, file: File) -> list[str]:
        holding = [state.name for state in self._stores.all() if not state.deleted and file.id in state.files]
        for name in holding:
            self._stores.add(name, op="detach", files=[file.id], forget=True)
        return holding

    async def _file(self, file_id: str, principal: Principal) -> File:
        return await asyncio.to_thread(self._files.get, file_id, principal)

    # -- stores --------------------------------------------------------------------------------------------------

    async def create_store(self, body: CreateStore, principal: Principal) -> dict[str, Any]:
        attached = [AttachFile(file_id=key, chunking_strategy=body.chunking_strategy) for key in body.file_ids]
        files = await self._wanted(attached, principal)
        made = await asyncio.to_thread(
            self._stores.create, body.name or "", body.metadata or {}, body.description, principal
        )
        if files:
            await self._attach(made.name, files, None)
        state = await asyncio.to_thread(self._stores.state, made.name)
        return made_store(state, state.shown)

    async def list_stores(self, query: ListStores, principal: Principal) -> dict[str, Any]:
        made = await asyncio.to_thread(self._stores.list, principal)
        names = await asyncio.to_thread(self._registry.knowledge_names)
        indexed = [await self._indexed(name, principal) for name in names]
        states = sorted([*made, *(state for state in indexed if state)], key=lambda state: (state.created, state.name))
        cut, more = page(states, lambda state: store_id(state.name), **query.model_dump())
        return listing([made_store(state, _readable(state, principal)) for state in cut], more)

    async def get_store(self, store: str, principal: Principal) -> dict[str, Any]:
        state = await self._store(store, principal)
        return made_store(state, _readable(state, principal))

    async def update_store(self, store: str, body: UpdateStore, principal: Principal) -> dict[str, Any]:
        state = await self._changeable(store, principal)
        changes: dict[str, Any] = {}
        if body.name is not None:
            changes["title"] = body.name
        if "metadata" in body.model_fields_set:
            changes["metadata"] = body.metadata or {}
        if changes:
            await asyncio.to_thread(lambda: self._stores.add(state.name, op="update", **changes))
        return await self.get_store(store, principal)

    async def delete_store(self, store: str, principal: Principal) -> dict[str, Any]:
        """Remove a store with all its versions; its files stay.

        Raises:
            BadInput: a release or a pin names a version of it.
        """
        state = await self._changeable(store, principal)
        if named := await asyncio.to_thread(self._named_by, state.name):
            raise BadInput(
                f"'{store}' is named by {', '.join(named)}, which would answer without passages; remove that first",
                param="vector_store_id",
            )
        await asyncio.to_thread(lambda: self._stores.add(state.name, op="delete"))
        self._worker.wake(state.name)
        return {"id": store, "object": "vector_store.deleted", "deleted": True}

    def _named_by(self, name: str) -> list[str]:
        releases = [f"release {ref}" for refs in self._registry.knowledge_releases(name).values() for ref in refs]
        return [*releases, *(f"pin {number}" for number in self._registry.knowledge_pins(name))]

    async def _store(self, store: str, principal: Principal) -> State:
        """The store of that id, as `principal` may see it."""
        state = await asyncio.to_thread(self._stores.get, store, principal)
        name = knowledge_name(store)
        if state is None and name is not None:
            state = await self._indexed(name, principal)
        if state is None:
            raise NotFound(
                f"there is no vector store '{store}'; GET /v1/vector_stores lists what is there",
                param="vector_store_id",
            )
        return state

    async def _changeable(self, store: str, principal: Principal) -> State:
        state = await self._store(store, principal)
        if state.read_only:
            raise BadInput(
                f"'{store}' is what `metier index` made of its documents and is changed there; files go into a store "
                "that was made here",
                param="vector_store_id",
            )
        return state

    async def _indexed(self, name: str, principal: Principal) -> State | None:
        """Knowledge that ``metier index`` made, with the documents that `principal` may read; None if there are none."""
        if await asyncio.to_thread(self._stores.made, name):
            return None
        versions = await asyncio.to_thread(self._registry.knowledge_versions, name)
        if principal.tenant not in {version.tenant for version in versions}:
            return None
        latest = versions[-1]
        try:
            held = await self._backend.documents(Snapshot.of(name, latest), principal)
        except (
            NotFound
        ):  # of this Milvus it is not, or was dropped just now; the other stores are to be listed all the same
            return None
        files = [
            StoreFile(
                id=read_only_id(name, document.doc_id),
                filename=document.source,
                path="",
                bytes=0,
                created=latest.created,
                revision=latest.number,
                applied=latest.number,
                attributes=attributes_of(document.metadata),
                document=document.doc_id,
            )
            for document in held
        ]
        if not files:
            return None
        return State(
            name,
            number=latest.number,
            title=name,
            tenant=principal.tenant,
            groups=principal.groups,
            created=versions[0].created,
            active=latest.created,
            files={file.id: file for file in files},
            read_only=True,
        )

    # -- files in stores -----------------------------------------------------------------------------------------

    async def attach_file(self, store: str, body: AttachFile, principal: Principal) -> dict[str, Any]:
        state = await self._changeable(store, principal)
        files = await self._wanted([body], principal)
        await self._attach(state.name, files, None)
        return await self.get_store_file(store, body.file_id, principal)

    async def list_store_files(self, store: str, query: ListStoreFiles, principal: Principal) -> dict[str, Any]:
        state = await self._store(store, principal)
        return _file_page(state, _readable(state, principal), query)

    async def get_store_file(self, store: str, file_id: str, principal: Principal) -> dict[str, Any]:
        state = await self._store(store, principal)
        return store_file(state.name, _file_in(state, file_id, principal))

    async def update_store_file(
        self, store: str, file_id: str, body: UpdateFile, principal: Principal
    ) -> dict[str, Any]:
        """Give a file other attributes; it is in progress until its rows have them."""
        state = await self._changeable(store, principal)
        file = _file_in(state, file_id, principal)
        if file.cancelled:
            raise BadInput(f"'{file_id}' was cancelled; attach it again", param="file_id")
        attributes = body.attributes or {}
        await asyncio.to_thread(
            lambda: self._stores.add(state.name, op="attributes", file=file_id, attributes=attributes)
        )
        self._worker.wake(state.name)
        return await self.get_store_file(store, file_id, principal)

    async def detach_file(self, store: str, file_id: str, principal: Principal) -> dict[str, Any]:
        """Take a file out of a store: it is found no more from now on, and its rows are removed."""
        state = await self._changeable(store, principal)
        _file_in(state, file_id, principal)
        await asyncio.to_thread(lambda: self._stores.add(state.name, op="detach", files=[file_id], forget=False))
        self._worker.wake(state.name)
        return {"id": file_id, "object": "vector_store.file.deleted", "deleted": True}

    async def file_content(self, store: str, file_id: str, principal: Principal) -> dict[str, Any]:
        """The text of a file, chunk by chunk."""
        state = await self._store(store, principal)
        file = _file_in(state, file_id, principal)
        snapshot = await self._snapshot(state)
        texts: list[str] = []
        if snapshot is not None and file.status == "completed":
            theirs = documents_of(file_id) if file.document is None else Compare("doc_id", "==", file.document)
            texts = await self._backend.texts(snapshot, principal, theirs)
        return {
            "object": "vector_store.file_content.page",
            "data": [{"type": "text", "text": text} for text in texts],
            "has_more": False,
            "next_page": None,
        }

    async def _wanted(
        self, attached: Sequence[AttachFile], principal: Principal
    ) -> list[tuple[File, dict[str, Any], tuple[int, int] | None]]:
        """The files that a client wants in a store, all of which must be there for it."""
        longest = self._config.embedder.max_tokens
        chunkings = [sizes(each.chunking_strategy, longest) for each in attached]
        unique = list(dict.fromkeys(each.file_id for each in attached))
        if len(unique) < len(attached):
            raise BadInput("a file is named twice; name each once", param="file_ids")
        files = await asyncio.to_thread(self._files.several, unique, principal)
        return [
            (file, dict(each.attributes or {}), chunking)
            for file, each, chunking in zip(files, attached, chunkings, strict=True)
        ]

    async def _attach(
        self, name: str, files: list[tuple[File, dict[str, Any], tuple[int, int] | None]], batch: str | None
    ) -> None:
        await asyncio.to_thread(self._stores.attach, name, files, batch)
        self._worker.wake(name)

    # -- batches -------------------------------------------------------------------------------------------------

    async def create_batch(self, store: str, body: CreateBatch, principal: Principal) -> dict[str, Any]:
        state = await self._changeable(store, principal)
        files = await self._wanted(body.attached, principal)
        batch = f"vsfb_{uuid.uuid4().hex[:24]}"
        await self._attach(state.name, files, batch)
        return await self.get_batch(store, batch, principal)

    async def get_batch(self, store: str, batch_id: str, principal: Principal) -> dict[str, Any]:
        state = await self._store(store, principal)
        batch = _batch_in(state, batch_id)
        return file_batch(state.name, batch, _files_of(state, batch, principal))

    async def cancel_batch(self, store: str, batch_id: str, principal: Principal) -> dict[str, Any]:
        """Give up what of a batch is not indexed yet."""
        state = await self._changeable(store, principal)
        _batch_in(state, batch_id)
        await asyncio.to_thread(lambda: self._stores.add(state.name, op="cancel", batch=batch_id))
        self._worker.wake(state.name)
        return await self.get_batch(store, batch_id, principal)

    async def list_batch_files(
        self, store: str, batch_id: str, query: ListStoreFiles, principal: Principal
    ) -> dict[str, Any]:
        state = await self._store(store, principal)
        return _file_page(state, _files_of(state, _batch_in(state, batch_id), principal), query)

    # -- search --------------------------------------------------------------------------------------------------

    async def search(self, store: str, body: Search, principal: Principal) -> dict[str, Any]:
        """The passages of a store for one query or several that ask for the same thing, best first.

        ``search_query`` says what was searched: queries are taken as they are, ``rewrite_query`` or not.
        """
        state = await self._store(store, principal)
        conditions: list[Condition] = [openai_filter(body.filters)] if body.filters is not None else []
        conditions += [Not(documents_of(file.id)) for file in state.files.values() if file.to_remove]
        snapshot = await self._snapshot(state)
        results: list[dict[str, Any]] = []
        if snapshot is not None:
            where = And(conditions) if conditions else None
            settings = self._settings(body)
            found = await self._backend.retrieve(body.queries, snapshot, principal, settings, where)
            for passage in found.passages:
                score = unit_score(passage)
                if score >= body.ranking_options.score_threshold and (named := _named(state, passage)):
                    results.append(search_result(passage, *named, score))
        return {
            "object": "vector_store.search_results.page",
            "search_query": body.queries,
            "data": results,
            "has_more": False,
            "next_page": None,
        }

    def _settings(self, body: Search) -> RetrievalConfig:
        """The configured retrieval, with as many passages as are asked for and no floor but the client's."""
        own = self._config.retrieval
        changes: dict[str, Any] = {
            "top_k": body.max_num_results,
            "candidates": max(own.candidates, body.max_num_results),
            "min_score": -1.0,
        }
        if body.ranking_options.ranker == "none":
            changes["rerank"] = 0
        return own.model_copy(update=changes)

    async def _snapshot(self, state: State) -> Snapshot | None:
        """What is to be searched now; None while nothing was indexed."""
        latest = await asyncio.to_thread(self._registry.knowledge_latest, state.name)
        return Snapshot.of(state.name, latest) if latest else None


def unit_score(passage: Passage) -> float:
    """What orders a passage, in [0, 1]: cosine, the fused score or what the reranker says; BM25 as s / (1 + s)."""
    score = passage.score
    if score == passage.scores.get("bm25"):
        return score / (1 + score)
    return min(max(score, 0.0), 1.0)


def _readable(state: State, principal: Principal) -> list[StoreFile]:
    return [file for file in state.shown if may_read_file(file, principal)]


def _file_in(state: State, file_id: str, principal: Principal) -> StoreFile:
    file = state.files.get(file_id)
    if file is None or not file.is_shown or not may_read_file(file, principal):
        raise NotFound(f"there is no file '{file_id}' in '{store_id(state.name)}'", param="file_id")
    return file


def _batch_in(state: State, batch_id: str) -> Batch:
    if batch_id not in state.batches:
        raise NotFound(f"there is no batch '{batch_id}' in '{store_id(state.name)}'", param="batch_id")
    return state.batches[batch_id]


def _file_page(state: State, files: Sequence[StoreFile], query: ListStoreFiles) -> dict[str, Any]:
    fitting = [file for file in files if query.filter in (None, file.status)]
    cut, more = page(fitting, lambda file: file.id, **query.model_dump(exclude={"filter"}))
    return listing([store_file(state.name, file) for file in cut], more)


def _files_of(state: State, batch: Batch, principal: Principal) -> list[StoreFile]:
    ids = set(batch.files)
    return [file for file in _readable(state, principal) if file.id in ids]


def _named(state: State, passage: Passage) -> tuple[str, str] | None:
    """Id and name of the file that a passage is of; None if it has just been taken out of the store."""
    if state.read_only:
        return read_only_id(state.name, passage.doc_id), passage.source
    file = state.files.get(file_of(passage.doc_id))
    return (file.id, file.filename) if file and file.wanted else None
