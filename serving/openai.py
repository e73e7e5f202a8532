"""OpenAI's shapes on the wire: the request (an allowlist), answers, stream chunks and errors.

Beyond OpenAI's fields a request may carry ``rag`` and a response carries ``message.annotations`` (where in the text
a citation stands), ``message.context.citations`` (the chunks, whole) and ``metier`` (release, chunk ids, times).
Unknown fields are refused by name. vLLM's ``top_k``, ``min_p``, ``repetition_penalty`` and ``structured_outputs`` are
understood too. The bounds of what is asked of the generator stand in :mod:`serving.engine.limits`, not here. Not
covered: tools, images, audio.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from cluster.errors import BadInput, MetierError
from retrieval.prompt import Citation
from retrieval.types import Passage
from serving.answer import Answer
from serving.engine.base import Grammar, Sampling, TokenLogprob
from serving.text import Pieces


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


class JsonSchema(_Allowlist):
    """A schema of the answer; `strict` or not, the answer keeps to it."""

    name: str = Field(max_length=64)
    description: str | None = None
    json_schema: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(_Allowlist):
    """What the answer has to look like, as OpenAI says it."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(_Allowlist):
    """What the answer has to look like, as vLLM says it; exactly one of these."""

    json_schema: dict[str, Any] | str | None = Field(None, alias="json")
    regex: str | None = None
    choice: list[str] | None = Field(None, min_length=1)


class ChatRequest(_Allowlist):
    """Body of ``POST /v1/chat/completions``; ``null`` is as good as leaving a field out."""

    model: str = Field(min_length=1, max_length=256)
    messages: list[ChatMessage] = Field(min_length=1, max_length=256)
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    """0 by default, unlike OpenAI's 1: a grounded answer is to be the same twice."""
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    n: int | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, max_length=256)
    rag: Rag | None = None

    @property
    def conversation(self) -> list[dict[str, str]]:
        return [{"role": message.role, "content": message.text} for message in self.messages]

    def sampling(self, max_tokens: int) -> Sampling:
        """How the answer is to be made; `max_tokens` if the request does not say how long.

        Raises:
            BadInput: fields contradict each other, or a grammar cannot be read.
        """
        asked = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "repetition_penalty": self.repetition_penalty,
            "n": self.n,
        }
        lengths = [each for each in (self.max_completion_tokens, self.max_tokens, max_tokens) if each is not None]
        if self.top_logprobs is not None and not self.logprobs:
            raise BadInput("top_logprobs needs logprobs: true beside it", param="top_logprobs")
        return Sampling(
            lengths[0],
            logit_bias=tuple((self.logit_bias or {}).items()),
            seed=self.seed,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            grammar=self._grammar(),
            **{field: value for field, value in asked.items() if value is not None},  # type: ignore[arg-type]
        )

    def _grammar(self) -> Grammar | None:
        format, outputs = self.response_format, self.structured_outputs
        bound = format is not None and format.type != "text"
        if outputs is None:
            return _response_grammar(format) if format is not None and bound else None
        given = [value for value in (outputs.json_schema, outputs.regex, outputs.choice) if value is not None]
        if bound or len(given) != 1:
            raise BadInput(
                "structured_outputs takes exactly one of json, regex and choice, and no response_format beside it",
                param="structured_outputs",
            )
        if outputs.regex is not None:
            return Grammar("regex", outputs.regex)
        if outputs.choice is not None:
            return Grammar("regex", "|".join(map(re.escape, outputs.choice)))
        schema = outputs.json_schema
        return Grammar("json_schema", schema if isinstance(schema, str) else _json(schema, "structured_outputs.json"))


def _response_grammar(format: ResponseFormat) -> Grammar:
    if format.type == "json_object":
        return Grammar("json_object")
    if format.json_schema is None or format.json_schema.json_schema is None:
        raise BadInput(
            "response_format of type json_schema needs json_schema.schema", param="response_format.json_schema"
        )
    return Grammar("json_schema", _json(format.json_schema.json_schema, "response_format.json_schema"))


def _json(value: Any, param: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError:
        raise BadInput(f"{param} has a number that is NaN or infinite; JSON knows none", param=param) from None


def completion(
    request_id: str,
    model: str,
    answers: Sequence[Answer],
    *,
    passages: Sequence[Passage],
    pieces: Pieces | None,
    usage: dict[str, Any],
    metier: dict[str, Any],
) -> dict[str, Any]:
    """A whole ``chat.completion``; with `pieces` it tells log probabilities."""
    choices = [
        {
            "index": answer.index,
            "message": {
                "role": "assistant",
                "content": answer.text,
                "refusal": None,
                "annotations": file_citations(answer.citations),
                "context": context(passages),
            },
            "finish_reason": answer.finish_reason,
            "logprobs": pieces and logprobs(answer.logprobs, pieces),
        }
        for answer in answers
    ]
    return {
        "id": f"chatcmpl-{request_id}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": choices,
        "usage": usage,
        "metier": metier,
    }


def chunk(
    request_id: str,
    model: str,
    created: int,
    delta: dict[str, Any] | None,
    finish_reason: str | None = None,
    index: int = 0,
    logprobs: dict[str, Any] | None = None,
    **extra: Any,
) -> dict[str, Any]:
    """One ``chat.completion.chunk``; without `delta` it has no choices (the usage chunk)."""
    choice = {"index": index, "delta": delta, "finish_reason": finish_reason, "logprobs": logprobs}
    return {
        "id": f"chatcmpl-{request_id}",
        "object": "chat.completion.chunk",
        "created": created,
        "model": model,
        "choices": [] if delta is None else [choice],
        **extra,
    }


def logprobs(tokens: Sequence[TokenLogprob], pieces: Pieces) -> dict[str, Any]:
    """OpenAI's ``logprobs`` of a choice."""

    def told(token: int, logprob: float) -> dict[str, Any]:
        text, data = pieces.of(token)
        # JSON knows no infinity; OpenAI writes the same number for what is out of the question.
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": data}

    content = [
        told(each.token, each.logprob) | {"top_logprobs": [told(token, value) for token, value in each.top]}
        for each in tokens
    ]
    return {"content": content, "refusal": None}


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
