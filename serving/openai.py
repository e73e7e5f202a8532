"""OpenAI's shapes on the wire: the request (an allowlist), answers, stream chunks and errors.

Beyond OpenAI's fields a request may carry ``rag`` and a response carries ``message.annotations`` (where in the text
a citation stands), ``message.context.citations`` (the chunks, whole) and ``metier`` (release, chunk ids, times).
Unknown fields are refused by name. Not covered: tools, images, several choices, stop strings, logprobs.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from cluster.errors import MetierError
from retrieval.prompt import Citation
from retrieval.types import Passage


class _Allowlist(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TextPart(_Allowlist):
    type: Literal["text"]
    text: str


class ChatMessage(_Allowlist):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class StreamOptions(_Allowlist):
    include_usage: bool = False


class Rag(_Allowlist):
    """Whether and how passages are looked up; left out, the release decides."""

    enabled: bool = True
    knowledge: str | None = None
    """Collection to search instead of the release's."""
    top_k: int | None = Field(None, ge=1, le=50)


class ChatRequest(_Allowlist):
    """Body of ``POST /v1/chat/completions``."""

    model: str = Field(min_length=1, max_length=256)
    messages: list[ChatMessage] = Field(min_length=1, max_length=256)
    max_tokens: int | None = Field(None, ge=1, le=4096)
    max_completion_tokens: int | None = Field(None, ge=1, le=4096)
    temperature: float = Field(0.0, ge=0, le=2)
    """0 by default, unlike OpenAI's 1: a grounded answer is to be the same twice."""
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = None
    n: Literal[1] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, max_length=256)
    rag: Rag | None = None

    @property
    def conversation(self) -> list[dict[str, str]]:
        return [{"role": message.role, "content": message.text} for message in self.messages]

    @property
    def answer_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


def completion(
    request_id: str,
    model: str,
    text: str,
    finish_reason: str,
    *,
    citations: Sequence[Citation],
    passages: Sequence[Passage],
    usage: dict[str, int],
    metier: dict[str, Any],
) -> dict[str, Any]:
    """A whole ``chat.completion``."""
    message = {
        "role": "assistant",
        "content": text,
        "refusal": None,
        "annotations": file_citations(citations),
        "context": context(passages),
    }
    return {
        "id": f"chatcmpl-{request_id}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [{"index": 0, "message": message, "finish_reason": finish_reason, "logprobs": None}],
        "usage": usage,
        "metier": metier,
    }


def chunk(
    request_id: str,
    model: str,
    created: int,
    delta: dict[str, Any] | None,
    finish_reason: str | None = None,
    **extra: Any,
) -> dict[str, Any]:
    """One ``chat.completion.chunk``; without `delta` it has no choices (the usage chunk)."""
    choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}]
    return {
        "id": f"chatcmpl-{request_id}",
        "object": "chat.completion.chunk",
        "created": created,
        "model": model,
        "choices": choices,
        **extra,
    }


def file_citations(citations: Sequence[Citation]) -> list[dict[str, Any]]:
    """Where the marks stand in the text and which document each cites (OpenAI's ``file_citation``, with the span)."""
    return [
        {
            "type": "file_citation",
            "file_id": citation.passage.doc_id,
            "filename": citation.passage.source,
            "index": citation.number,
            "start_index": citation.start,
            "end_index": citation.end,
            "chunk_id": citation.passage.chunk_id,
        }
        for citation in citations
    ]


def context(passages: Sequence[Passage]) -> dict[str, Any]:
    """The passages that were given to the model, in the order of their numbers (Azure's ``context.citations``)."""
    return {
        "citations": [
            {
                "content": passage.text,
                "title": passage.title if not passage.heading else f"{passage.title} > {passage.heading}",
                "filepath": passage.source,
                "url": None,
                "chunk_id": passage.chunk_id,
                "file_id": passage.doc_id,
                "score": round(passage.score, 4),
            }
            for passage in passages
        ]
    }


def sse(payload: dict[str, Any] | str) -> str:
    """One server-sent event."""
    return f"data: {payload if isinstance(payload, str) else json.dumps(payload, ensure_ascii=False)}\n\n"


def error_body(error: MetierError) -> dict[str, Any]:
    """OpenAI's error object, all four keys always there."""
    return {"error": {"message": error.message, "type": error.error_type, "param": error.param, "code": error.code}}
