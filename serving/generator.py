"""A replica of the generator: token ids to deltas, for the base model and every adapter of the registry.

It brings an adapter's files to this node's disk, looks whether its card names the base that is served, holds the
files while they may be read, and counts what runs, so that it can end in peace. What decodes is behind
:mod:`serving.engine.base`. Plain Python; :mod:`serving.app` puts it on Ray Serve.

Not covered: names (a request says the digest), and who may use an adapter.
"""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster import log as logs
from cluster.config import Config, from_json
from cluster.errors import ConfigError, DeadlineExceeded, MetierError, Unavailable
from cluster.models import base_ref, resolve
from cluster.registry import Registry
from cluster.release import check_match, short
from cluster.storage import Storage
from serving.adapter_disk import AdapterDisk
from serving.engine.base import Delta, Engine, EngineStats, GenerateRequest, Sampling

log = logging.getLogger(__name__)

FETCHES = 4
"""Adapters fetched at the same time."""
WARM_UP_PROMPT = tuple(range(8))
WARM_UP_TOKENS = 4


def make_engine(config: Config) -> Engine:
    """The engine that ``serving.generator.engine`` names.

    Raises:
        ConfigError: it needs an extra that is not installed.
    """
    name = config.serving.generator.engine
    if name == "echo":
        from serving.engine.echo import EchoEngine

        return EchoEngine(config)
    directory = resolve(config.base, config.models_cache)
    if name == "vllm":
        if importlib.util.find_spec("vllm") is None:
            raise ConfigError(
                "serving.generator.engine=vllm needs vLLM, which is not installed; run `pip install metier[vllm]`, or use native",
                param="serving.generator.engine",
            )
        from serving.engine.vllm import VllmEngine

        return VllmEngine(config, directory)
    from serving.engine.native.engine import NativeEngine

    return NativeEngine(config, directory)


class GeneratorReplica:
    """Ready to answer once it is made: the model is loaded, adapters as configured, and a first answer was given."""

    def __init__(self, config_json: str) -> None:
        config = from_json(config_json)
        logs.setup(config.logging)
        self.settings = config.serving.generator
        self.registry = Registry(Storage.of(config.storage))
        self.disk = AdapterDisk(
            self.registry, Path(config.models_cache) / "adapters", self.settings.adapters_disk_bytes
        )
        self.base = base_ref(config.base, resolve(config.base, config.models_cache))
        self._fitting: set[str] = set()
        """Adapters whose card names the base that is served."""
        self._fetching: dict[str, Future[None]] = {}
        self._pool = ThreadPoolExecutor(FETCHES, "metier-fetch")
        self._running = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._ending = False
        self.engine = make_engine(config)
        self.engine.start()
        for ref in self.settings.pinned_adapters:
            self._preload(self.registry.adapter(ref).digest, pin=True)
        for ref in self.settings.warmup_adapters:
            self._preload(self.registry.adapter(ref).digest)
        self._warm_up()

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Delta, None]:
        """What :meth:`serving.engine.base.Engine.generate` gives; the time an adapter takes to get here counts for the deadline.

        Raises:
            NotFound: the registry has no such adapter.
            Mismatch: the adapter was made for another base.
            Unavailable: the storage does not answer and the adapter is not here, or this replica is ending.
            DeadlineExceeded: as the engine's other errors.
        """
        if self._ending:
            raise Unavailable("this replica of the generator is ending; try again")
        began = time.monotonic()
        self._running += 1
        self._idle.clear()
        try:
            async with self._adapter(request.adapter, request.deadline_s):
                if request.deadline_s is not None:
                    request = replace(request, deadline_s=max(0.0, request.deadline_s - (time.monotonic() - began)))
                deltas: Any = self.engine.generate(request)
                async with aclosing(deltas):
                    async for delta in deltas:
                        yield delta
        finally:
            self._running -= 1
            if not self._running:
                self._idle.set()

    async def keep(self, digests: Sequence[str]) -> None:
        """Have adapters ready before anybody asks for them. One that cannot be is logged; requests will get its error."""
        loop = asyncio.get_running_loop()
        for digest in digests:
            try:
                await loop.run_in_executor(self._pool, self._preload, digest)
            except MetierError as error:
                log.warning("adapter %s is not kept ready: %s", short(digest), error)

    def stats(self) -> EngineStats:
        """The engine's."""
        return self.engine.stats()

    def check_health(self) -> None:
        """Raise if this replica can serve no more."""
        self.engine.check_health()

    async def shutdown(self) -> None:
        """Take no more requests, let what runs end for up to ``drain_s``, and stop the engine, which ends the rest."""
        self._ending = True
        try:
            await asyncio.wait_for(self._idle.wait(), self.settings.drain_s)
        except TimeoutError:
            log.warning("%d answers were not complete after %g s", self._running, self.settings.drain_s)
        await asyncio.to_thread(self._stop)

    def __del__(self) -> None:
        """Stop the engine. Nobody reads a stream of a replica that nobody has; Serve drains before it calls this."""
        self._stop()

    def _stop(self) -> None:
        if engine := getattr(self, "engine", None):
            engine.stop()
            self._pool.shutdown(wait=False, cancel_futures=True)

    @asynccontextmanager
    async def _adapter(self, digest: str | None, seconds: float | None) -> AsyncIterator[None]:
        """The engine knows `digest`, and its files stay where they are: a sequence that lost its slot may need them again."""
        if digest is None:
            yield
            return
        try:
            async with asyncio.timeout(seconds):
                directory = await self._acquire(digest)
        except TimeoutError:
            raise DeadlineExceeded(f"adapter {short(digest)} was not here after {seconds:g} s; try again") from None
        try:
            self.engine.add_adapter(digest, directory)
            yield
        finally:
            self.disk.release(digest)

    async def _acquire(self, digest: str) -> Path:
        while digest not in self._fitting or (directory := self.disk.try_acquire(digest)) is None:
            fetch = self._fetching.get(digest)
            if fetch is None:
                fetch = self._fetching[digest] = self._pool.submit(self._fetch, digest)
                fetch.add_done_callback(lambda _: self._fetching.pop(digest, None))
            await asyncio.shield(asyncio.wrap_future(fetch))
        return directory

    def _fetch(self, digest: str) -> None:
        with self.disk.hold(digest):
            self._check_card(digest)

    def _check_card(self, digest: str) -> None:
        check_match(self.disk.card(digest), self.base, None)
        self._fitting.add(digest)

    def _preload(self, digest: str, pin: bool = False) -> None:
        with self.disk.hold(digest) as directory:
            self._check_card(digest)
            self.engine.add_adapter(digest, directory)
            self.engine.preload(digest, pin)

    def _warm_up(self) -> None:
        """A first answer, on an event loop of its own: this may run on one already."""

        async def answer() -> None:
            sampling = Sampling(WARM_UP_TOKENS, ignore_eos=True)
            async for _ in self.engine.generate(GenerateRequest("warm-up", WARM_UP_PROMPT, sampling)):
                pass

        began = time.monotonic()
        with ThreadPoolExecutor(1, "metier-warm-up") as thread:
            thread.submit(asyncio.run, answer()).result()
        log.info("warmed up", extra={"seconds": round(time.monotonic() - began, 2)})
