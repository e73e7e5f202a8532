"""Vectors of queries: those of requests that come together are embedded together, and known ones are kept.

A model embeds eight short questions in little more time than one. While a batch is embedded, the requests that come
gather for the next, so that nobody waits for company and the batches grow with the load. Threads only: a coroutine
calls :func:`asyncio.to_thread`. Not covered: sharing the cache between processes.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import numpy as np

from cluster.knowledge import EmbedderState
from retrieval.embed import Embeds, Vectors

LARGEST_BATCH = 64
"""Texts embedded at once; more wait for the next batch, so that one burst does not delay everybody."""


class QueryVectors:
    """The embedders that it is given, for queries. Thread-safe."""

    def __init__(
        self, embedders: Callable[[EmbedderState], Embeds], *, cached: int = 4096, wait_ms: float = 0.0
    ) -> None:
        """`cached` vectors are kept, least recently used first out; a query that could start waits `wait_ms` for others."""
        self._embedders = embedders
        self._cache = _Cache(cached)
        self._wait_s = wait_ms / 1000
        self._lock = threading.Lock()
        self._queues: WeakKeyDictionary[Embeds, _Queue] = WeakKeyDictionary()

    def __call__(self, state: EmbedderState) -> BatchedQueries:
        """The embedder of `state`, batching and remembering.

        Raises:
            MetierError: as the embedders say, when the model cannot be had.
        """
        model = self._embedders(state)
        with self._lock:
            queue = self._queues.setdefault(model, _Queue(self._wait_s))
        return BatchedQueries(model, queue, self._cache)


class BatchedQueries:
    """One model; looks like :class:`retrieval.embed.Embeds` to whoever embeds queries."""

    def __init__(self, model: Embeds, queue: _Queue, cache: _Cache) -> None:
        self._model, self._queue, self._cache = model, queue, cache
        self.fingerprint, self.dimension = model.fingerprint, model.dimension

    def count_tokens(self, text: str) -> int:
        return self._model.count_tokens(text)

    def embed(self, texts: Sequence[str], *, query: bool = False) -> Vectors:
        """float32 ``[len(texts), dimension]`` as of the model; what are no queries goes to it as it is."""
        if not query:
            return self._model.embed(texts)
        found = {text: self._cache.get(self.fingerprint, text) for text in texts}
        missing = [text for text, vector in found.items() if vector is None]
        if missing:
            for text, vector in zip(missing, self._queue.embed(self._model, missing), strict=True):
                self._cache.put(self.fingerprint, text, vector)
                found[text] = vector
        return np.array([found[text] for text in texts], dtype=np.float32).reshape(len(texts), self.dimension)


@dataclass(eq=False)
class _Waiting:
    """What one caller wants, and what it gets."""

    texts: Sequence[str]
    called: threading.Event = field(default_factory=threading.Event)
    """Set when it is served, or when it is its turn to serve."""
    vectors: Vectors | None = None
    error: BaseException | None = None


class _Queue:
    """Callers of one model: one of them embeds for those that wait, then hands over."""

    def __init__(self, wait_s: float) -> None:
        self._wait_s = wait_s
        self._lock = threading.Lock()
        self._waiting: list[_Waiting] = []
        self._busy = False

    def embed(self, model: Embeds, texts: Sequence[str]) -> Vectors:
        mine = _Waiting(texts)
        with self._lock:
            self._waiting.append(mine)
            leads = not self._busy
            self._busy = True
        if not leads:
            mine.called.wait()
        if mine.vectors is None and mine.error is None:
            if self._wait_s:
                time.sleep(self._wait_s)
            self._serve(model)
        if mine.error is not None:
            raise mine.error
        assert mine.vectors is not None
        return mine.vectors

    def _serve(self, model: Embeds) -> None:
        """Embed what waits, the caller's own first among it, and call the next who will."""
        with self._lock:
            batch = self._take()
        texts = list(dict.fromkeys(text for waiting in batch for text in waiting.texts))
        try:
            vectors = dict(zip(texts, model.embed(texts, query=True), strict=True))
            for waiting in batch:
                waiting.vectors = np.stack([vectors[text] for text in waiting.texts])
        except BaseException as error:
            for waiting in batch:
                waiting.error = error
        with self._lock:
            self._busy = bool(self._waiting)
            if self._busy:
                self._waiting[0].called.set()
        for waiting in batch:
            waiting.called.set()

    def _take(self) -> list[_Waiting]:
        """As many of the callers, first come first, as have :data:`LARGEST_BATCH` texts together; at least one."""
        count = texts = 0
        for waiting in self._waiting:
            texts += len(waiting.texts)
            if count and texts > LARGEST_BATCH:
                break
            count += 1
        batch, self._waiting = self._waiting[:count], self._waiting[count:]
        return batch


class _Cache:
    """Vectors by (fingerprint, text), the least recently used first out."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._lock = threading.Lock()
        self._vectors: OrderedDict[tuple[str, str], Vectors] = OrderedDict()

    def get(self, fingerprint: str, text: str) -> Vectors | None:
        with self._lock:
            vector = self._vectors.get((fingerprint, text))
            if vector is not None:
                self._vectors.move_to_end((fingerprint, text))
            return vector

    def put(self, fingerprint: str, text: str, vector: Vectors) -> None:
        with self._lock:
            self._vectors[fingerprint, text] = vector
            self._vectors.move_to_end((fingerprint, text))
            while len(self._vectors) > self._size:
                self._vectors.popitem(last=False)
