"""The Ray Serve application: ingress, retriever and generator, each a deployment that scales by itself. Thin.

``build`` is the import path of a RayService (``serving.app:build`` with ``args: {config: …}``) and what ``metier up``
runs. The work is done in :mod:`serving.pipeline`, :mod:`retrieval.retriever` and :mod:`serving.engine`; here it is
only placed on replicas.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict
from ray import serve
from ray.exceptions import RayTaskError
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle

from cluster import log as logs
from cluster.config import Config, RetrievalConfig, StageConfig, from_json, load, to_json
from cluster.errors import MetierError, Overloaded
from cluster.knowledge import EmbedderState
from cluster.models import base_ref, load_tokenizer, resolve
from cluster.registry import Registry
from cluster.storage import Storage
from retrieval.embed import Embedder, Embeds
from retrieval.embedders import Embedders
from retrieval.filters import Condition
from retrieval.query_vectors import QueryVectors
from retrieval.rerank import load_reranker
from retrieval.retriever import Retriever
from retrieval.store import Store
from retrieval.types import Principal, Retrieved, Snapshot
from serving.engine.base import Delta, Engine, GenerateRequest
from serving.http import routes
from serving.knowledge.api import KnowledgeApi
from serving.knowledge.backend import Backend
from serving.knowledge.library import Held, Indexed, IndexJob, Library
from serving.names import Names
from serving.pipeline import Pipeline

log = logging.getLogger(__name__)
T = TypeVar("T")


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
    retriever = serve.deployment(RetrieverReplica).options(**options("retriever", stages.retriever)).bind(text)
    generator = serve.deployment(GeneratorReplica).options(**options("generator", stages.generator)).bind(text)
    return serve.deployment(Ingress).options(**options("ingress", stages.ingress)).bind(text, retriever, generator)


def options(name: str, stage: StageConfig) -> dict[str, Any]:
    """Serve's deployment options for a stage of ours."""
    return {
        "name": name,
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


class RetrieverReplica:
    """Queries -> passages; and what the knowledge API asks of the models and of Milvus."""

    def __init__(self, config_json: str) -> None:
        config = from_json(config_json)
        logs.setup(config.logging)
        self.registry = Registry(Storage.of(config.storage))
        self.store = Store(config.store, config.store.uri)
        reranker = load_reranker(config)
        embedders = Embedders(config.embedder, config.models_cache)
        embedders.watch(functools.partial(self._coming, config.knowledge.name))
        queries = QueryVectors(embedders, cached=config.embedder.cached_queries, wait_ms=config.embedder.query_wait_ms)
        self.retriever = Retriever(self.store, queries, reranker)
        self.pool = ThreadPoolExecutor(config.serving.retriever.max_ongoing_requests, "metier-retrieve")

        @functools.cache
        def configured() -> Embeds:
            return Embedder(resolve(config.embedder, config.models_cache), config.embedder)

        self.library = Library(config, self.store, self.registry, configured, reranker)
        if latest := self.registry.knowledge_latest(config.knowledge.name):
            try:
                embedders(latest.embedder)  # so that the first question does not wait for it
            except MetierError as error:  # questions get the sentence; what else is served is not held up
                log.warning("the embedder of knowledge '%s' is not loaded: %s", config.knowledge.name, error)

    def _coming(self, knowledge: str) -> EmbedderState | None:
        build = self.registry.knowledge_build(knowledge)
        return build.embedder if build else None

    async def retrieve(
        self,
        query: str | Sequence[str],
        snapshot: Snapshot,
        principal: Principal,
        settings: RetrievalConfig,
        where: Condition | None = None,
    ) -> Retrieved:
        return await self._work(
            self.retriever.retrieve, query, snapshot, principal=principal, settings=settings, where=where
        )

    async def embed(self, texts: Sequence[str], query: bool) -> tuple[list[list[float]], list[int]]:
        return await self._work(self.library.embed, texts, query)

    async def rerank(self, query: str, texts: Sequence[str]) -> list[float]:
        return await self._work(self.library.rerank, query, texts)

    async def documents(self, snapshot: Snapshot, principal: Principal) -> list[Held]:
        return await self._work(self.library.documents, snapshot, principal)

    async def texts(self, snapshot: Snapshot, principal: Principal, which: Condition) -> list[str]:
        return await self._work(self.library.texts, snapshot, principal, which)

    async def index(self, job: IndexJob) -> dict[str, Indexed]:
        return await asyncio.to_thread(self.library.index, job)  # minutes: no place for it among the questions

    async def _work(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        call = functools.partial(function, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self.pool, call)


class GeneratorReplica:
    """Token ids -> deltas, for the base model and every adapter of the registry."""

    def __init__(self, config_json: str) -> None:
        config = from_json(config_json)
        logs.setup(config.logging)
        self.registry = Registry(Storage.of(config.storage))
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


@serve.ingress()
class Ingress:
    """HTTP: the routes of :mod:`serving.http` over the two stages above."""

    def __init__(self, config_json: str, retriever: DeploymentHandle, generator: DeploymentHandle) -> None:
        config = from_json(config_json)
        logs.setup(config.logging)
        directory = resolve(config.base, config.models_cache)
        registry = Registry(Storage.of(config.storage))
        names = Names(config, registry, base_ref(config.base, directory))
        if config.serving.release is not None:
            names.resolve(config.serving.release)
        streaming = generator.options(stream=True)

        def remote(method: str) -> Callable[..., Awaitable[Any]]:
            async def call(*args: Any) -> Any:
                with _from_replicas():
                    return await getattr(retriever, method).remote(*args)

            return call

        async def generate(request: GenerateRequest) -> AsyncIterator[Delta]:
            deltas = streaming.generate.remote(request)
            try:
                with _from_replicas():
                    async for delta in deltas:
                        yield delta
            finally:
                deltas.cancel()

        tokenizer = load_tokenizer(directory, config.base.trust_remote_code)
        self.pipeline = Pipeline(config, registry, names, tokenizer, remote("retrieve"), generate)
        backend = Backend(**{each.name: remote(each.name) for each in fields(Backend)})
        self.knowledge = KnowledgeApi(config, registry, backend)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return routes(self.pipeline, self.knowledge)


@contextlib.contextmanager
def _from_replicas() -> Iterator[None]:
    """Errors of ours come back from a replica inside Ray's; here they are taken out again."""
    try:
        yield
    except RayTaskError as error:
        if isinstance(error.cause, MetierError):
            raise error.cause from None
        raise
    except BackPressureError:
        raise Overloaded("all replicas are busy and the queue is full; try again in a moment") from None
