"""The Ray Serve application: ingress, retriever and generator, each a deployment that scales by itself. Thin.

``build`` is the import path of a RayService (``serving.app:build`` with ``args: {config: …}``) and what ``metier up``
runs. The work is done in :mod:`serving.pipeline`, :mod:`retrieval.retriever` and :mod:`serving.generator`; here it
is only placed on replicas.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import fields
from typing import Any, TypeVar

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from cluster import log as logs
from cluster.config import Config, GeneratorConfig, RetrievalConfig, StageConfig, from_json, load, to_json
from cluster.errors import MetierError, Overloaded, Unavailable
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
from serving.engine.base import Delta, GenerateRequest
from serving.generator import GeneratorReplica
from serving.http import routes
from serving.knowledge.api import KnowledgeApi
from serving.knowledge.backend import Backend
from serving.knowledge.library import Held, Indexed, IndexJob, Library
from serving.names import Names
from serving.pipeline import Pipeline
from serving.reporting import Reporter
from serving.scaling import WAITING_TOKENS

log = logging.getLogger(__name__)
T = TypeVar("T")

REPORT_S = 1.0
"""How often a generator replica tells routers how it is doing."""
NAMES_S = 10.0
"""How long the digests of the names in ``adapter_replicas`` are believed."""
STOP_S = 5.0
"""Time to stop the engine, after the running answers were given theirs."""


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
    generator = serve.deployment(Generator).options(**generator_options(stages.generator)).bind(text)
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


def generator_options(stage: GeneratorConfig) -> dict[str, Any]:
    """The same for the generator: who gets a request, when to scale, when a replica is given up, how it ends."""
    chosen = options("generator", stage)
    if stage.target_waiting_tokens:
        chosen["autoscaling_config"] |= {
            "policy": {
                "policy_function": "serving.scaling:WaitingTokens",
                "policy_kwargs": {"target_waiting_tokens": stage.target_waiting_tokens},
            },
            "metrics_interval_s": 2.0,
            "look_back_period_s": 10.0,
        }
    return chosen | {
        "request_router_config": RequestRouterConfig(
            request_router_class="serving.router:AdapterRouter",
            request_router_kwargs={"batch": stage.batch_size},
            request_routing_stats_period_s=REPORT_S,
        ),
        "health_check_period_s": min(10.0, stage.stuck_s),
        "health_check_timeout_s": min(30.0, stage.stuck_s),
        "graceful_shutdown_wait_loop_s": 0.5,
        "graceful_shutdown_timeout_s": stage.drain_s + STOP_S,
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


class Generator(GeneratorReplica):
    """The generator as Serve runs it: it also says how it is doing, to routers and to the autoscaler."""

    def __init__(self, config_json: str) -> None:
        super().__init__(config_json)
        self.reporter = Reporter()
        self._streams: set[asyncio.Task[Any]] = set()
        self._given_up: MetierError | None = None
        self._least: tuple[float, dict[str, int]] = (0.0, {})

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Delta, None]:
        tokens = len(request.token_ids)
        stream = asyncio.current_task()
        assert stream is not None
        self._streams.add(stream)
        try:
            async with aclosing(super().generate(request)) as deltas:
                async for delta in deltas:
                    tokens += len(delta.token_ids) - delta.cached_tokens
                    yield delta
        except asyncio.CancelledError:
            if self._given_up is None:
                raise
            raise Unavailable(f"{self._given_up}; try again") from self._given_up
        finally:
            self._streams.discard(stream)
            if request.adapter is not None:
                self.reporter.demand.add(request.adapter, tokens)

    async def check_health(self) -> None:  # type: ignore[override]
        """Raise if this replica can serve no more, and end what runs on it: Serve would wait for that before it replaces it."""
        try:
            super().check_health()
        except MetierError as error:
            self._given_up = error
            for stream in self._streams:
                stream.cancel()
            raise
        self._given_up = None

    async def record_routing_stats(self) -> dict[str, Any]:
        """Asked by Serve every :data:`REPORT_S`, given to all routers."""
        return self.reporter.report(self.engine.stats(), await asyncio.to_thread(self._minimum))

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What :class:`serving.scaling.WaitingTokens` reads."""
        return {WAITING_TOKENS: float(self.engine.stats().waiting_tokens)}

    def _minimum(self) -> dict[str, int]:
        """``adapter_replicas`` by digest, looked up anew now and then: a name may have a new version."""
        at, least = self._least
        if self.settings.adapter_replicas and (not at or time.monotonic() > at + NAMES_S):
            least = {}
            for ref, count in self.settings.adapter_replicas.items():
                try:
                    least[self.registry.adapter(ref).digest] = count
                except MetierError as error:
                    log.warning("serving.generator.adapter_replicas: %s is not kept ready: %s", ref, error)
            self._least = time.monotonic(), least
        return least


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
        streaming = generator.options(stream=True)  # from here on its router runs, and asks homes to keep adapters

        def remote(method: str) -> Callable[..., Awaitable[Any]]:
            async def call(*args: Any) -> Any:
                with _from_replicas():
                    return await getattr(retriever, method).remote(*args)

            return call

        tokenizer = load_tokenizer(directory, config.base.trust_remote_code)
        self.pipeline = Pipeline(
            config, registry, names, tokenizer, remote("retrieve"), functools.partial(generate, streaming)
        )
        backend = Backend(**{each.name: remote(each.name) for each in fields(Backend)})
        self.knowledge = KnowledgeApi(config, registry, backend)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return routes(self.pipeline, self.knowledge)


async def generate(streaming: DeploymentHandle, request: GenerateRequest) -> AsyncIterator[Delta]:
    """Deltas from whatever replica the router of `streaming` chooses.

    Raises:
        Unavailable: the replica ended before the answer was complete.
        MetierError: what the replica raised.
    """
    deltas = streaming.generate.remote(request)
    try:
        with _from_replicas():
            async for delta in deltas:
                yield delta
    finally:
        deltas.cancel()


@contextlib.contextmanager
def _from_replicas() -> Iterator[None]:
    """Errors of ours come back from a replica inside Ray's; here they are taken out again."""
    try:
        yield
    except RayTaskError as error:
        if isinstance(error.cause, MetierError):
            raise error.cause from None
        raise
    except RayActorError as error:
        raise Unavailable("the replica that was answering ended before the answer was complete; try again") from error
    except DeploymentUnavailableError as error:
        raise Unavailable(f"a stage of the pipeline does not start; the log of Ray Serve says why ({error})") from error
    except BackPressureError:
        raise Overloaded("all replicas are busy and the queue is full; try again in a moment") from None
