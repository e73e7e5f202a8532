"""OpenAI's shapes for knowledge on the wire: requests (allowlists, with OpenAI's limits) and objects that are answered.

Beyond OpenAI's fields: ``input_type`` of an embedding (models that tell queries from passages need it). Refused by
name: ``expires_after``, token arrays, and dimensions other than the model's.
"""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictStr, field_validator, model_validator

from cluster.errors import BadInput
from retrieval.types import Passage
from serving.knowledge.page import Order
from serving.knowledge.state import STATUSES, Batch, State, Status, StoreFile
from serving.knowledge.stores import store_id

PAIRS = 16
Key = Annotated[str, Field(min_length=1, max_length=64)]
Text = Annotated[StrictStr, Field(max_length=512)]
Whole = Annotated[int, Field(strict=True, ge=-(2**53), le=2**53)]
"""Exact in every JSON reader."""
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Attributes = Annotated[dict[Key, StrictBool | Whole | Number | Text], Field(max_length=PAIRS)]
Metadata = Annotated[dict[Key, Text], Field(max_length=PAIRS)]
FileIds = Annotated[list[str], Field(max_length=500)]
Purpose = Literal["assistants", "batch", "fine-tune", "vision", "user_data", "evals"]


class _Allowlist(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class AutoChunking(_Allowlist):
    type: Literal["auto"]


class StaticSizes(_Allowlist):
    max_chunk_size_tokens: int = Field(ge=100, le=4096)
    chunk_overlap_tokens: int = Field(ge=0)

    @model_validator(mode="after")
    def _check_overlap(self) -> Self:
        if self.chunk_overlap_tokens * 2 > self.max_chunk_size_tokens:
            raise ValueError("chunk_overlap_tokens must be at most half of max_chunk_size_tokens")
        return self


class StaticChunking(_Allowlist):
    type: Literal["static"]
    static: StaticSizes


Chunking = Annotated[AutoChunking | StaticChunking, Field(discriminator="type")]


class _Expiring(_Allowlist):
    expires_after: Any = None

    @field_validator("expires_after")
    @classmethod
    def _refuse(cls, value: Any) -> None:
        if value is not None:
            raise ValueError("nothing expires here; leave it out, and delete what is no longer wanted")


class CreateStore(_Expiring):
    """Body of ``POST /v1/vector_stores``."""

    name: str | None = Field(None, max_length=256)
    description: str | None = Field(None, max_length=512)
    file_ids: FileIds = []
    chunking_strategy: Chunking | None = None
    metadata: Metadata | None = None


class UpdateStore(_Expiring):
    """Body of ``POST /v1/vector_stores/{id}``; what is left out stays."""

    name: str | None = Field(None, max_length=256)
    metadata: Metadata | None = None


class AttachFile(_Allowlist):
    """Body of ``POST /v1/vector_stores/{id}/files``, and one of the ``files`` of a batch."""

    file_id: str
    attributes: Attributes | None = None
    chunking_strategy: Chunking | None = None


class CreateBatch(_Allowlist):
    """Body of ``POST …/file_batches``: the same for all ``file_ids``, or each of ``files`` apart."""

    file_ids: list[str] | None = Field(None, min_length=1, max_length=2000)
    files: list[AttachFile] | None = Field(None, min_length=1, max_length=2000)
    attributes: Attributes | None = None
    chunking_strategy: Chunking | None = None

    @model_validator(mode="after")
    def _check_one(self) -> Self:
        if (self.file_ids is None) == (self.files is None):
            raise ValueError("give either file_ids or files")
        if self.files and (self.attributes is not None or self.chunking_strategy is not None):
            raise ValueError("with files, attributes and chunking_strategy stand with each file")
        return self

    @property
    def attached(self) -> list[AttachFile]:
        return self.files or [
            AttachFile(file_id=file_id, attributes=self.attributes, chunking_strategy=self.chunking_strategy)
            for file_id in self.file_ids or ()
        ]


class UpdateFile(_Allowlist):
    """Body of ``POST /v1/vector_stores/{id}/files/{file_id}``."""

    attributes: Attributes | None


class RankingOptions(_Allowlist):
    ranker: Literal["none", "auto", "default-2024-11-15"] = "auto"
    score_threshold: float = Field(0.0, ge=0, le=1)


Query = Annotated[str, Field(min_length=1)]


class Search(_Allowlist):
    """Body of ``POST /v1/vector_stores/{id}/search``."""

    query: Query | Annotated[list[Query], Field(min_length=1, max_length=16)]
    rewrite_query: bool = False
    max_num_results: int = Field(10, ge=1, le=50)
    filters: dict[str, Any] | None = None
    ranking_options: RankingOptions = RankingOptions()

    @property
    def queries(self) -> list[str]:
        return [self.query] if isinstance(self.query, str) else self.query


class Embeddings(_Allowlist):
    """Body of ``POST /v1/embeddings``."""

    model: str = Field(min_length=1, max_length=256)
    input: str | list[Any]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1)
    input_type: Literal["query", "document"] = "document"
    user: str | None = Field(None, max_length=256)

    @field_validator("input")
    @classmethod
    def _check_input(cls, value: str | list[Any]) -> str | list[Any]:
        texts = [value] if isinstance(value, str) else value
        if not 1 <= len(texts) <= 2048:
            raise ValueError(f"give 1 to 2048 texts, not {len(texts)}")
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("give texts; tokens are those of another model's tokenizer and cannot be used")
        if "" in texts:
            raise ValueError("an empty text cannot be embedded; leave it out")
        return value

    @property
    def texts(self) -> list[str]:
        return [self.input] if isinstance(self.input, str) else self.input


class RerankText(_Allowlist):
    text: str


class Rerank(_Allowlist):
    """Body of ``POST /v1/rerank``, as Cohere and Jina have it."""

    model: str | None = Field(None, max_length=256)
    query: Query
    documents: list[str | RerankText] = Field(min_length=1, max_length=1000)
    top_n: int | None = Field(None, ge=1)
    return_documents: bool = False

    @property
    def texts(self) -> list[str]:
        return [document if isinstance(document, str) else document.text for document in self.documents]


class ListFiles(_Allowlist):
    """Query of ``GET /v1/files``."""

    purpose: str | None = None
    limit: int = Field(10_000, ge=1, le=10_000)
    order: Order = "desc"
    after: str | None = None


class ListStores(_Allowlist):
    """Query of ``GET /v1/vector_stores``."""

    limit: int = Field(20, ge=1, le=100)
    order: Order = "desc"
    after: str | None = None
    before: str | None = None


class ListStoreFiles(ListStores):
    """Query of the lists of files in a store or a batch."""

    filter: Status | None = None


# -- objects -----------------------------------------------------------------------------------------------------


def vector_store(
    name: str,
    *,
    title: str,
    created: str,
    active: str,
    counts: Mapping[str, int],
    usage_bytes: int = 0,
    metadata: Mapping[str, str] | None = None,
    description: str | None = None,
) -> dict[str, Any]:
    """OpenAI's ``vector_store``."""
    return {
        "id": store_id(name),
        "object": "vector_store",
        "created_at": seconds(created),
        "name": title,
        "description": description,
        "usage_bytes": usage_bytes,
        "file_counts": dict(counts),
        "status": "in_progress" if counts["in_progress"] else "completed",
        "last_active_at": seconds(active),
        "expires_at": None,
        "metadata": dict(metadata or {}),
    }


def made_store(state: State, files: Sequence[StoreFile]) -> dict[str, Any]:
    """A store that was made over the API, with those of its `files` that the asker may know of."""
    return vector_store(
        state.name,
        title=state.title,
        created=state.created,
        active=state.active,
        counts=file_counts(files),
        usage_bytes=sum(file.usage_bytes for file in files if file.wanted),
        metadata=state.metadata,
        description=state.description,
    )


def file_counts(files: Sequence[StoreFile]) -> dict[str, int]:
    """How many of `files` have each status, and ``total``."""
    found = Counter(file.status for file in files)
    return {status: found[status] for status in STATUSES} | {"total": len(files)}


def store_file(name: str, file: StoreFile) -> dict[str, Any]:
    """OpenAI's ``vector_store.file``. Chunks as the configuration has them are ``other``: OpenAI's begin at 100 tokens."""
    chunking: dict[str, Any] = {"type": "other"}
    if file.chunking:
        size, overlap = file.chunking
        chunking = {"type": "static", "static": {"max_chunk_size_tokens": size, "chunk_overlap_tokens": overlap}}
    return {
        "id": file.id,
        "object": "vector_store.file",
        "usage_bytes": file.usage_bytes,
        "created_at": seconds(file.created),
        "vector_store_id": store_id(name),
        "status": file.status,
        "last_error": file.error if file.status == "failed" else None,
        "chunking_strategy": chunking,
        "attributes": file.attributes,
    }


def file_batch(name: str, batch: Batch, files: Sequence[StoreFile]) -> dict[str, Any]:
    """OpenAI's ``vector_store.file_batch``."""
    counts = file_counts(files)
    status = "completed"
    if counts["in_progress"]:
        status = "in_progress"
    elif batch.cancelled:
        status = "cancelled"
    elif counts["total"] and counts["failed"] == counts["total"]:
        status = "failed"
    return {
        "id": batch.id,
        "object": "vector_store.files_batch",
        "created_at": seconds(batch.created),
        "vector_store_id": store_id(name),
        "status": status,
        "file_counts": counts,
    }


def search_result(passage: Passage, file_id: str, filename: str, score: float) -> dict[str, Any]:
    """One item of a ``vector_store.search_results.page``."""
    return {
        "file_id": file_id,
        "filename": filename,
        "score": score,
        "attributes": attributes_of(passage.metadata),
        "content": [{"type": "text", "text": passage.text}],
    }


def attributes_of(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What of a row's metadata OpenAI's limits let an attribute be."""
    plain = {
        key: value[:512] if isinstance(value, str) else value
        for key, value in metadata.items()
        if isinstance(value, str | int | float | bool) and len(key) <= 64
    }
    return dict(list(plain.items())[:PAIRS])


def embedding(index: int, vector: Sequence[float], encoding: Literal["float", "base64"]) -> dict[str, Any]:
    """One ``embedding``; base64 is of its little-endian float32 bytes."""
    if encoding == "float":
        return {"object": "embedding", "index": index, "embedding": list(vector)}
    packed = base64.b64encode(np.asarray(vector, dtype="<f4").tobytes()).decode()
    return {"object": "embedding", "index": index, "embedding": packed}


def seconds(created: str) -> int:
    """Seconds since the epoch of an ISO 8601 time."""
    return int(datetime.fromisoformat(created).timestamp())


def sizes(strategy: AutoChunking | StaticChunking | None, longest: int) -> tuple[int, int] | None:
    """Tokens of chunk and overlap that a client asks for; None: those of the configuration.

    Raises:
        BadInput: chunks would be longer than the `longest` text that the embedder reads.
    """
    if not isinstance(strategy, StaticChunking):
        return None
    size = strategy.static.max_chunk_size_tokens
    if size > longest:
        raise BadInput(
            f"max_chunk_size_tokens ({size}) is longer than what the embedder reads ({longest}), so the end of each "
            "chunk would not be found; give at most that, or leave chunking_strategy out",
            param="chunking_strategy",
        )
    return size, strategy.static.chunk_overlap_tokens
