"""The Ray Serve application: ingress, retriever and generator, each a deployment that scales by itself. Thin.

``build`` is the import path of a RayService (``serving.app:build`` with ``args: {config: …}``) and what ``metier up``
runs. The work is done in :mod:`serving.answer`, :mod:`retrieval.retriever` and :mod:`serving.engine`; here it is only
placed on replicas and put behind HTTP routes.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator
from datetime import datetime
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict
from ray import serve
from ray.exceptions import RayTaskError
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle

from cluster import log as logs
from cluster.config import Config, RetrievalConfig, StageConfig, from_json, load, to_json
from cluster.errors import BadInput, MetierError, ModelNotFound, Overloaded
from cluster.models import base_ref, load_tokenizer, resolve
from cluster.registry import Registry
from cluster.storage import Storage
from retrieval.embed import Embedder
from retrieval.retriever import Retriever
from retrieval.store import Store
from retrieval.types import Principal, Retrieved
from serving.answer import Done, Found, Question, Text, answer
from serving.engine.base import Delta, Engine, GenerateRequest, Sampling
from serving.names import Names, Resolved, Served
from serving.openai import ChatRequest, annotations, chunk, completion, context, error_body, sse

log = logging.getLogger("serving")
api = FastAPI(title="metier", docs_url=None, redoc_url=None)


class AppArgs(BaseModel):
    """Arguments of :func:`build` in a Serve config file."""

    model_config = ConfigDict(extra="forbid")

    config: str | None = None
    """Path of the YAML configuration on the node that builds the application."""
    overrides: list[str] = []
    """``key.path=value``, as with ``--set``."""


def build(args: AppArgs) -> serve.Application:
    """The application described by a configuration file; for RayService and ``serve run``."""
    return application(load(args.config, args.overrides))


def application(config: Config) -> serve.Application:
    """The three deployments of `config`, bound together. ``store.uri`` must be an address by now."""
    text, stages = to_json(config), config.serving
    retriever = RetrieverDeployment.options(**options(stages.retriever)).bind(text)
    generator = GeneratorDeployment.options(**options(stages.generator)).bind(text)
    return IngressDeployment.options(**options(stages.ingress)).bind(text, retriever, generator)


def options(stage: StageConfig) -> dict[str, Any]:
    """Serve's deployment options for a stage of ours."""
    return {
        "autoscaling_config": {
            "min_replicas": stage.min_replicas,
            "max_replicas": stage.max_replicas,
            "target_ongoing_requests": stage.target_ongoing_requests,
            "upscale_delay_s": stage.upscale_delay_s,
            "downscale_delay_s": stage.downscale_delay_s,
        },
        "max_ongoing_requests": stage.max_ongoing_requests,
        "max_queued_requests": stage.max_queued_requests,
        "ray_actor_options": {
            "num_cpus": stage.cpus,
            "num_gpus": stage.gpus,
            **({"memory": stage.memory_bytes} if stage.memory_bytes else {}),
        },
    }


@serve.deployment(name="retriever")
class RetrieverDeployment:
    """Queries -> passages."""

    def __init__(self, config_json: str) -> None:
        config = from_json(config_json)
        logs.setup(config.logging)
        self.store = Store(config.store, config.store.uri)
        embedder = Embedder(resolve(config.embedder, config.models_cache), config.embedder)
        self.retriever = Retriever(self.store, embedder)

    async def retrieve(
        self, query: str, knowledge: str, version: int, principal: Principal, settings: RetrievalConfig
    ) -> Retrieved:
        return await asyncio.to_thread(
            self.retriever.retrieve, query, knowledge=knowledge, version=version, principal=principal, settings=settings
        )


@serve.deployment(name="generator")
class GeneratorDeployment:
    """Token ids -> deltas, for the base model and every adapter of the registry."""

    def __init__(self, config_json: str) -> None:
        config = from_json(config_json)
        logs.setup(config.logging)
        self.registry = Registry(Storage(config.storage.url, config.storage.options))
        self.adapters = Path(config.models_cache) / "adapters"
        self.engine = make_engine(config)
        self.engine.start()
        for ref in config.serving.generator.warmup_adapters:
            digest = self.registry.adapter(ref).digest
            self.engine.add_adapter(digest, self.registry.fetch_adapter(digest, self.adapters))

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Delta]:
        if request.adapter is not None:
            directory = await asyncio.to_thread(self.registry.fetch_adapter, request.adapter, self.adapters)
            self.engine.add_adapter(request.adapter, directory)
        async for delta in self.engine.generate(request):
            yield delta

    def check_health(self) -> None:
        self.engine.check_health()

    def __del__(self) -> None:
        if engine := getattr(self, "engine", None):
            engine.stop()


def make_engine(config: Config) -> Engine:
    """The engine that ``serving.generator.engine`` names."""
    if config.serving.generator.engine == "echo":
        from serving.engine.echo import EchoEngine

        return EchoEngine()
    from serving.engine.native import NativeEngine

    return NativeEngine(config, resolve(config.base, config.models_cache))


@serve.deployment(name="ingress")
@serve.ingress(api)
class IngressDeployment:
    """HTTP routes -> :func:`serving.answer.answer` -> OpenAI's shapes."""

    def __init__(self, config_json: str, retriever: DeploymentHandle, generator: DeploymentHandle) -> None:
        self.config = from_json(config_json)
        logs.setup(self.config.logging)
        directory = resolve(self.config.base, self.config.models_cache)
        self.tokenizer = load_tokenizer(directory, self.config.base.trust_remote_code)
        self.registry = Registry(Storage(self.config.storage.url, self.config.storage.options))
        self.names = Names(self.config, self.registry, base_ref(self.config.base, directory))
        self.retriever = retriever
        self.generator = generator.options(stream=True)
        if self.config.serving.release is not None:
            self.names.resolve(self.config.serving.release)

    @api.post("/v1/chat/completions", response_model=None)
    async def chat(self, body: ChatRequest, http: Request) -> JSONResponse | StreamingResponse:
        question = await asyncio.to_thread(self._question, body, _request_id(http))
        if body.stream:
            parts = _first_part_eagerly(self._parts(question))
            return StreamingResponse(
                self._events(question, await parts, bool(body.stream_options and body.stream_options.include_usage)),
                media_type="text/event-stream",
                headers={
                    "Cache-Control": "no-cache",
                    "X-Accel-Buffering": "no",
                    **_headers(question),
                },
            )
        passages: Found = Found(())
        async for part in self._parts(question):
            if isinstance(part, Found):
                passages = part
            elif isinstance(part, Done):
                done = part
        self._log(question, done)
        return JSONResponse(
            completion(
                question.request_id,
                question.resolved.model,
                done.text,
                done.finish_reason,
                citations=done.citations,
                passages=passages.passages,
                usage=_usage(done),
                metier=_metier(question, passages, done),
            ),
            headers=_headers(question),
        )

    @api.get("/v1/models")
    async def models(self) -> dict[str, Any]:
        served = await asyncio.to_thread(lambda: list(self.names.list()))
        return {"object": "list", "data": [_model(entry) for entry in served]}

    @api.get("/v1/models/{model:path}")
    async def model(self, model: str) -> dict[str, Any]:
        served = await asyncio.to_thread(lambda: list(self.names.list()))
        for entry in served:
            if entry.id == model:
                return _model(entry)
        raise ModelNotFound(f"model '{model}' is not there; GET /v1/models lists what is", param="model")

    @api.get("/health")
    async def health(self) -> dict[str, str]:
        """Liveness: this replica answers."""
        return {"status": "ok"}

    def _question(self, body: ChatRequest, request_id: str) -> Question:
        resolved = self.names.resolve(body.model)
        knowledge, version = self._knowledge(body, resolved)
        return Question(
            request_id=request_id,
            conversation=body.conversation,
            sampling=Sampling(
                body.answer_tokens or self.config.serving.max_tokens, body.temperature, body.top_p, body.seed
            ),
            principal=Principal(self.config.knowledge.tenant, self.config.knowledge.groups),
            resolved=resolved,
            knowledge=knowledge,
            version=version,
            top_k=body.rag.top_k if body.rag else None,
        )

    def _knowledge(self, body: ChatRequest, resolved: Resolved) -> tuple[str | None, int]:
        """Collection and version to search, from the request's ``rag`` or else the release."""
        pinned = resolved.knowledge
        if body.rag is None and pinned is None or body.rag is not None and not body.rag.enabled:
            return None, 0
        asked = body.rag.knowledge if body.rag else None
        name = asked or (pinned.name if pinned else self.config.knowledge.name)
        if pinned is not None and name == pinned.name and pinned.version != "head":
            return name, int(pinned.version)
        version = self.registry.knowledge_head(name)
        if version == 0:
            raise BadInput(f"knowledge '{name}' is empty or not there; run `metier index`", param="rag.knowledge")
        return name, version

    async def _parts(self, question: Question) -> AsyncIterator[Found | Text | Done]:
        async def generate(request: GenerateRequest) -> AsyncIterator[Delta]:
            deltas = self.generator.generate.remote(request)
            try:
                async for delta in deltas:
                    yield delta
            finally:
                deltas.cancel()

        try:
            async for part in answer(
                question,
                self.retriever.retrieve.remote,
                generate,
                self.tokenizer,
                self.config.base.context_tokens,
            ):
                yield part
        except Exception as error:
            raise _ours(error) from error

    async def _events(
        self, question: Question, parts: AsyncIterator[Found | Text | Done], include_usage: bool
    ) -> AsyncIterator[str]:
        """Server-sent events: role and citations, text, annotations with the finish reason, usage, ``[DONE]``."""
        created = int(time.time())
        found = Found(())
        usage: dict[str, Any] = {"usage": None} if include_usage else {}

        def event(delta: dict[str, Any] | None, finish: str | None = None, **extra: Any) -> str:
            return sse(chunk(question.request_id, question.resolved.model, created, delta, finish, **(usage | extra)))

        try:
            async for part in parts:
                if isinstance(part, Found):
                    found = part
                    yield event({"role": "assistant", "content": "", "context": context(part.passages)})
                elif isinstance(part, Text):
                    yield event({"content": part.text})
                else:
                    metier = _metier(question, found, part)
                    yield event({"annotations": annotations(part.citations)}, part.finish_reason, metier=metier)
                    if include_usage:
                        yield event(None, usage=_usage(part))
                    self._log(question, part)
            yield sse("[DONE]")
        except MetierError as error:
            yield sse(error_body(error))

    def _log(self, question: Question, done: Done) -> None:
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


@api.exception_handler(MetierError)
async def _metier_error(_: Request, error: MetierError) -> JSONResponse:
    headers = {"Retry-After": "1"} if error.http_status in (429, 503) else None
    return JSONResponse(error_body(error), status_code=error.http_status, headers=headers)


@api.exception_handler(RequestValidationError)
async def _invalid_request(_: Request, error: RequestValidationError) -> JSONResponse:
    first = error.errors()[0]
    param = ".".join(str(part) for part in first["loc"] if part != "body") or None
    if first["type"] == "extra_forbidden":
        problem = BadInput(f"unknown field '{param}'; remove it", param=param)
    else:
        problem = BadInput(f"{param or 'body'}: {first['msg']}", param=param)
    return JSONResponse(error_body(problem), status_code=400)


async def _first_part_eagerly(parts: AsyncIterator[Found | Text | Done]) -> AsyncIterator[Found | Text | Done]:
    """`parts` with its first part already there, so that what fails before it still gets a status of its own."""
    first = await anext(parts)

    async def chained() -> AsyncIterator[Found | Text | Done]:
        yield first
        async for part in parts:
            yield part

    return chained()


def _ours(error: Exception) -> MetierError:
    """The error of ours that a replica raised, or what to tell a client about one that is not."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, MetierError):
        return cause
    if isinstance(cause, BackPressureError):
        return Overloaded("all replicas are busy and the queue is full; try again in a moment")
    log.error("request failed", exc_info=error)
    return MetierError("something went wrong on the server; its log has the details")


def _request_id(http: Request) -> str:
    return http.headers.get("x-request-id") or f"chatcmpl-{uuid.uuid4().hex}"


def _headers(question: Question) -> dict[str, str]:
    release = question.resolved.release
    return {"x-request-id": question.request_id} | ({"x-metier-release": release} if release else {})


def _usage(done: Done) -> dict[str, int]:
    return {
        "prompt_tokens": done.prompt_tokens,
        "completion_tokens": done.completion_tokens,
        "total_tokens": done.prompt_tokens + done.completion_tokens,
    }


def _metier(question: Question, found: Found, done: Done) -> dict[str, Any]:
    return {
        "release": question.resolved.release,
        "adapter": question.resolved.adapter,
        "knowledge": {"name": question.knowledge, "version": question.version} if question.knowledge else None,
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
