"""The routes of the knowledge API: OpenAI's paths in, plain data out. Errors: :mod:`serving.http`.

An upload goes to a temporary file as it comes, and from there into the storage; it is never whole in memory.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Annotated, Any, get_args

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import FileResponse
from starlette.background import BackgroundTask
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from cluster.errors import BadInput, ResourcesShort, TooLarge
from cluster.materialize import is_disk_full
from retrieval.types import Principal
from serving.knowledge.api import KnowledgeApi
from serving.knowledge.shapes import (
    AttachFile,
    CreateBatch,
    CreateStore,
    Embeddings,
    ListFiles,
    ListStoreFiles,
    ListStores,
    Purpose,
    Rerank,
    Search,
    UpdateFile,
    UpdateStore,
)

FIELDS_BYTES = 64 * 1024
"""What a form may hold beside its file."""
POLL_MS = 200
Json = dict[str, Any]
OfFiles = Annotated[ListFiles, Query()]
OfStores = Annotated[ListStores, Query()]
OfStoreFiles = Annotated[ListStoreFiles, Query()]


def router(api: KnowledgeApi, who: Callable[[Request], Principal]) -> APIRouter:
    """The routes over `api`; `who` says who asks."""
    made = APIRouter(prefix="/v1")
    _files(made, api, who)
    _stores(made, api, who)
    _store_files(made, api, who)
    _batches(made, api, who)

    @made.post("/embeddings")
    async def embed(body: Embeddings) -> Json:
        return await api.models.embed(body)

    @made.post("/rerank")
    async def rerank(body: Rerank) -> Json:
        return await api.models.rerank(body)

    return made


def _files(made: APIRouter, api: KnowledgeApi, who: Callable[[Request], Principal]) -> None:
    @made.post("/files")
    async def upload(request: Request) -> Json:
        form = await _form(request, api.max_file_bytes)
        try:
            file, purpose = _upload(form)
            size = file.size or 0
            if size > api.max_file_bytes:
                raise _too_large(api.max_file_bytes)
            # Opened by its number, the temporary file has a path although it has no name.
            local = Path(f"/dev/fd/{file.file.fileno()}")
            file.file.flush()
            return await api.upload(local, size, file.filename or "", purpose, who(request))
        finally:
            await form.close()

    @made.get("/files")
    async def list_files(query: OfFiles, request: Request) -> Json:
        return await api.list_files(query, who(request))

    @made.get("/files/{file_id}")
    async def get_file(file_id: str, request: Request) -> Json:
        return await api.get_file(file_id, who(request))

    @made.delete("/files/{file_id}")
    async def delete_file(file_id: str, request: Request) -> Json:
        return await api.delete_file(file_id, who(request))

    @made.get("/files/{file_id}/content", response_model=None)
    async def content(file_id: str, request: Request) -> FileResponse:
        directory = await asyncio.to_thread(tempfile.TemporaryDirectory, prefix="metier-")
        local = Path(directory.name) / "content"
        try:
            filename = await api.download(file_id, local, who(request))
        except BaseException:
            directory.cleanup()
            raise
        return FileResponse(
            local,
            filename=filename,
            media_type="application/octet-stream",
            headers={"X-Content-Type-Options": "nosniff"},
            background=BackgroundTask(directory.cleanup),
        )


def _stores(made: APIRouter, api: KnowledgeApi, who: Callable[[Request], Principal]) -> None:
    @made.post("/vector_stores")
    async def create(body: CreateStore, request: Request) -> Json:
        return await api.create_store(body, who(request))

    @made.get("/vector_stores")
    async def list_stores(query: OfStores, request: Request) -> Json:
        return await api.list_stores(query, who(request))

    @made.get("/vector_stores/{store}")
    async def get(store: str, request: Request) -> Json:
        return await api.get_store(store, who(request))

    @made.post("/vector_stores/{store}")
    async def update(store: str, body: UpdateStore, request: Request) -> Json:
        return await api.update_store(store, body, who(request))

    @made.delete("/vector_stores/{store}")
    async def delete(store: str, request: Request) -> Json:
        return await api.delete_store(store, who(request))

    @made.post("/vector_stores/{store}/search")
    async def search(store: str, body: Search, request: Request) -> Json:
        return await api.search(store, body, who(request))


def _store_files(made: APIRouter, api: KnowledgeApi, who: Callable[[Request], Principal]) -> None:
    @made.post("/vector_stores/{store}/files")
    async def attach(store: str, body: AttachFile, request: Request) -> Json:
        return await api.attach_file(store, body, who(request))

    @made.get("/vector_stores/{store}/files")
    async def list_files(store: str, query: OfStoreFiles, request: Request) -> Json:
        return await api.list_store_files(store, query, who(request))

    @made.get("/vector_stores/{store}/files/{file_id}")
    async def get(store: str, file_id: str, request: Request, response: Response) -> Json:
        return _polled(await api.get_store_file(store, file_id, who(request)), response)

    @made.post("/vector_stores/{store}/files/{file_id}")
    async def update(store: str, file_id: str, body: UpdateFile, request: Request) -> Json:
        return await api.update_store_file(store, file_id, body, who(request))

    @made.delete("/vector_stores/{store}/files/{file_id}")
    async def detach(store: str, file_id: str, request: Request) -> Json:
        return await api.detach_file(store, file_id, who(request))

    @made.get("/vector_stores/{store}/files/{file_id}/content")
    async def content(store: str, file_id: str, request: Request) -> Json:
        return await api.file_content(store, file_id, who(request))


def _batches(made: APIRouter, api: KnowledgeApi, who: Callable[[Request], Principal]) -> None:
    path = "/vector_stores/{store}/file_batches"

    @made.post(path)
    async def create(store: str, body: CreateBatch, request: Request) -> Json:
        return await api.create_batch(store, body, who(request))

    @made.get(path + "/{batch}")
    async def get(store: str, batch: str, request: Request, response: Response) -> Json:
        return _polled(await api.get_batch(store, batch, who(request)), response)

    @made.post(path + "/{batch}/cancel")
    async def cancel(store: str, batch: str, request: Request) -> Json:
        return await api.cancel_batch(store, batch, who(request))

    @made.get(path + "/{batch}/files")
    async def list_files(store: str, batch: str, query: OfStoreFiles, request: Request) -> Json:
        return await api.list_batch_files(store, batch, query, who(request))


def _polled(found: Json, response: Response) -> Json:
    """`found`; OpenAI's clients ask again after the time that the header says, else after a second."""
    if found["status"] == "in_progress":
        response.headers["openai-poll-after-ms"] = str(POLL_MS)
    return found


async def _form(request: Request, max_file_bytes: int) -> FormData:
    """The form of an upload, its file on disk. What is too large is read to its end, as clients only then listen."""
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise BadInput("a file is uploaded as multipart/form-data with the fields file and purpose", param="file")
    bounded = _Bounded(request.stream(), max_file_bytes + FIELDS_BYTES)
    parser = MultiPartParser(request.headers, bounded.chunks(), max_files=1, max_fields=8, max_part_size=FIELDS_BYTES)
    try:
        return await parser.parse()
    except MultiPartException as error:
        raise BadInput(f"the form cannot be read: {error.message}") from None
    except OSError as error:
        if not is_disk_full(error):
            raise
        raise ResourcesShort("no space is left for uploads; free some in the temporary directory") from error
    except _Full:
        async for _ in bounded.stream:
            pass
        raise _too_large(max_file_bytes) from None


class _Full(Exception):
    """More bytes than are taken."""


class _Bounded:
    """A stream of chunks that ends with :class:`_Full` beyond `limit` bytes."""

    def __init__(self, stream: AsyncGenerator[bytes, None], limit: int) -> None:
        self.stream, self._left = stream, limit

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        async for chunk in self.stream:
            self._left -= len(chunk)
            if self._left < 0:
                raise _Full
            yield chunk


def _upload(form: FormData) -> tuple[UploadFile, str]:
    """The file and its purpose."""
    for name in form:
        if name.partition("[")[0] == "expires_after":
            raise BadInput("nothing expires here; leave expires_after out", param="expires_after")
        if name not in ("file", "purpose"):
            raise BadInput(f"unknown field '{name}'; remove it", param=name)
    file, purpose = form.get("file"), form.get("purpose")
    if not isinstance(file, UploadFile):
        raise BadInput("the field file is missing, or holds no file", param="file")
    if purpose not in get_args(Purpose):
        raise BadInput(f"purpose must be one of {', '.join(get_args(Purpose))}", param="purpose")
    return file, str(purpose)


def _too_large(limit: int) -> TooLarge:
    return TooLarge(
        f"the file is larger than the {limit / 1e6:g} MB that are taken here; split it, or raise knowledge.max_file_mb",
        param="file",
    )
