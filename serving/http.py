"""The HTTP routes: OpenAI's shapes in and out, server-sent events, one place where errors become statuses.

Those of the knowledge API stand in :mod:`serving.knowledge.routes`.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from datetime import datetime
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from cluster.errors import BadInput, MetierError, ModelNotFound, NotFound
from serving.answer import Answer, Done, Found, Part, Question, Text
from serving.knowledge.api import KnowledgeApi
from serving.knowledge.routes import router
from serving.names import Served
from serving.openai import ChatRequest, chunk, completion, context, error_body, file_citations, logprobs, sse
from serving.pipeline import Pipeline
from serving.text import Pieces

log = logging.getLogger(__name__)
STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def routes(pipeline: Pipeline, knowledge: KnowledgeApi | None = None) -> FastAPI:
    """The application over `pipeline`, with the knowledge API if there is one; its work lives as long as the application."""

    @asynccontextmanager
    async def working(_: FastAPI) -> AsyncIterator[None]:
        if knowledge is not None:
            await knowledge.start()
        yield
        if knowledge is not None:
            await knowledge.close()

    api = FastAPI(title="metier", docs_url=None, redoc_url=None, lifespan=working)
    api.add_exception_handler(MetierError, _refuse)
    api.add_exception_handler(RequestValidationError, _refuse_body)
    api.add_exception_handler(HTTPException, _refuse_route)
    api.add_exception_handler(Exception, _refuse_unknown)

    @api.post("/v1/chat/completions", response_model=None)
    async def chat(body: ChatRequest, request: Request) -> JSONResponse | StreamingResponse:
        question = await asyncio.to_thread(pipeline.question, body, _request_id(request))
        pieces = Pieces(pipeline.tokenizer) if question.sampling.logprobs is not None else None
        if body.stream:
            parts = await _started(question, pipeline.parts(question))
            usage = bool(body.stream_options and body.stream_options.include_usage)
            return StreamingResponse(
                _events(question, parts, usage, pieces),
                media_type="text/event-stream",
                headers=STREAM_HEADERS | _headers(question),
            )
        return JSONResponse(await _whole(question, pipeline.parts(question), pieces), headers=_headers(question))

    if knowledge is not None:
        api.include_router(router(knowledge, lambda _: pipeline.principal))

    @api.get("/v1/models")
    async def models() -> dict[str, Any]:
        served = await asyncio.to_thread(lambda: list(pipeline.names.list()))
        return {"object": "list", "data": [_model(entry) for entry in served]}

    @api.get("/v1/models/{model:path}")
    async def model(model: str) -> dict[str, Any]:
        served = await asyncio.to_thread(lambda: list(pipeline.names.list()))
        for entry in served:
            if entry.id == model:
                return _model(entry)
        raise ModelNotFound(f"model '{model}' is not there; GET /v1/models lists what is", param="model")

    @api.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    return api


async def _whole(question: Question, parts: AsyncGenerator[Part, None], pieces: Pieces | None) -> dict[str, Any]:
    found, done = Found(()), None
    async for part in parts:
        if isinstance(part, Found):
            found = part
        elif isinstance(part, Done):
            done = part
    assert done is not None, "what is asked ends with Done or raises"
    _log(question, done)
    return completion(
        question.request_id,
        question.resolved.model,
        done.answers,
        passages=found.passages,
        pieces=pieces,
        usage=_usage(done),
        metier=_metier(question, found, done),
    )


async def _events(
    question: Question, parts: AsyncGenerator[Part, None], include_usage: bool, pieces: Pieces | None
) -> AsyncIterator[str]:
    """Role and citations of each choice, text, annotations with the finish reason, usage, ``[DONE]``; or an error and
    no ``[DONE]``. The last finish reason brings ``metier`` along."""
    created = int(time.time())
    found = Found(())
    usage: dict[str, Any] = {"usage": None} if include_usage else {}
    ended: Answer | None = None

    def event(delta: dict[str, Any] | None, **extra: Any) -> str:
        return sse(chunk(question.request_id, question.resolved.model, created, delta, **(usage | extra)))

    def end(answer: Answer, **extra: Any) -> str:
        notes = {"annotations": file_citations(answer.citations)}
        return event(notes, finish_reason=answer.finish_reason, index=answer.index, **extra)

    try:
        async for part in parts:
            if ended is not None and not isinstance(part, Done):
                yield end(ended)
                ended = None
            if isinstance(part, Found):
                found = part
                for index in range(question.sampling.n):
                    yield event({"role": "assistant", "content": "", "context": context(part.passages)}, index=index)
            elif isinstance(part, Text):
                told = logprobs(part.logprobs, pieces) if pieces is not None and part.logprobs else None
                yield event({"content": part.text}, index=part.index, logprobs=told)
            elif isinstance(part, Answer):
                ended = part
            else:
                assert ended is not None, "an answer ends before Done"
                yield end(ended, metier=_metier(question, found, part))
                if include_usage:
                    yield event(None, usage=_usage(part))
                _log(question, part)
        yield sse("[DONE]")
    except MetierError as error:
        yield sse(error_body(error))
    except Exception as error:  # the status is sent: what a handler would answer goes into the stream
        log.error("stream failed", exc_info=error)
        yield sse(error_body(_unknown()))


async def _started(question: Question, parts: AsyncGenerator[Part, None]) -> AsyncGenerator[Part, None]:
    """`parts` with the first ones already there, so that what fails before them still gets a status of its own.

    That is the first part alone, which comes before anything is generated; but a grammar and token ids are refused by
    the engine, so with these the stream waits for the first text too.
    """
    first = [await anext(parts)]
    if question.sampling.grammar is not None or question.sampling.logit_bias:
        first.append(await anext(parts))

    async def chained() -> AsyncGenerator[Part, None]:
        async with aclosing(parts):
            for part in first:
                yield part
            async for part in parts:
                yield part

    return chained()


async def _refuse(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, MetierError)
    headers = {"Retry-After": "1"} if error.http_status in (429, 503) else None
    return JSONResponse(error_body(error), status_code=error.http_status, headers=headers)


async def _refuse_body(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return await _refuse(request, BadInput(f"the body is not valid JSON: {first['ctx']['error']}"))
    param = ".".join(map(str, first["loc"][1:])) or None
    if first["type"] == "extra_forbidden":
        problem = BadInput(f"unknown field '{param}'; remove it", param=param)
    else:
        problem = BadInput(f"{param or 'body'}: {first['msg']}", param=param)
    return await _refuse(request, problem)


async def _refuse_unknown(request: Request, error: Exception) -> JSONResponse:
    log.error("request failed", exc_info=error)
    return await _refuse(request, _unknown())


def _unknown() -> MetierError:
    return MetierError("something went wrong on the server; its log has the details")


async def _refuse_route(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    problem = NotFound(f"{request.method} {request.url.path}: {error.detail}")
    return JSONResponse(error_body(problem), status_code=error.status_code, headers=error.headers)


def _log(question: Question, done: Done) -> None:
    log.info(
        "answered",
        extra={
            "request_id": question.request_id,
            "model": question.resolved.model,
            "declined": done.declined,
            "prompt_tokens": done.prompt_tokens,
            "completion_tokens": done.completion_tokens,
            **{f"{stage}_s": round(value, 4) for stage, value in done.seconds.items()},
        },
    )


def _request_id(request: Request) -> str:
    return request.headers.get("x-request-id", "")[:128] or uuid.uuid4().hex


def _headers(question: Question) -> dict[str, str]:
    release = question.resolved.release
    return {"x-request-id": question.request_id} | ({"x-metier-release": release} if release else {})


def _usage(done: Done) -> dict[str, Any]:
    return {
        "prompt_tokens": done.prompt_tokens,
        "completion_tokens": done.completion_tokens,
        "total_tokens": done.prompt_tokens + done.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": done.cached_tokens},
    }


def _metier(question: Question, found: Found, done: Done) -> dict[str, Any]:
    searched = question.snapshot
    return {
        "release": question.resolved.release,
        "adapter": question.resolved.adapter,
        "knowledge": {"name": searched.knowledge, "version": searched.version} if searched else None,
        "chunks": [passage.chunk_id for passage in found.passages],
        "declined": done.declined,
        "seconds": {stage: round(value, 4) for stage, value in done.seconds.items()},
    }


def _model(entry: Served) -> dict[str, Any]:
    return {
        "id": entry.id,
        "object": "model",
        "created": int(datetime.fromisoformat(entry.created).timestamp()) if entry.created else 0,
        "owned_by": "metier",
        "root": entry.root,
        "parent": entry.parent,
    }
