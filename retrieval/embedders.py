"""Which embedder a version of a knowledge needs -> that model, loaded: two at most, as while a knowledge moves.

Not covered: batching and caching queries.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

from cluster.config import EmbedderConfig
from cluster.errors import MetierError, Mismatch
from cluster.knowledge import EmbedderState
from cluster.models import resolve
from retrieval.embed import Embedder, Embeds

RESIDENT = 2
"""Models kept: that of the version served, and that of the one that is coming. The least recently used goes first."""
WATCH_S = 10.0
"""Between looks for a model that is coming; filling a collection takes longer."""
logger = logging.getLogger(__name__)


class Embedders:
    """Loaded embedders by the state that a version names. Thread-safe; each is loaded once, however many ask."""

    def __init__(self, config: EmbedderConfig, models_cache: str) -> None:
        """`config` says how a model is run; which one it is, the state says."""
        self._config = config
        self._cache = Path(models_cache)
        self._lock = threading.Lock()
        self._models: OrderedDict[tuple[str, int], Future[Embeds]] = OrderedDict()

    def __call__(self, state: EmbedderState) -> Embeds:
        """The model of `state`; the first call loads it, from the source that it names.

        A model that cannot be had from there is taken from ``embedder.source``, if it is the same one.

        Raises:
            NotFound, Unavailable: the model is not there.
            Mismatch: what is there is another model by now.
        """
        key = (state.fingerprint, state.max_tokens)
        with self._lock:
            waiting = self._models.get(key)
            model = self._models.setdefault(key, Future())
            self._models.move_to_end(key)
            while len(self._models) > RESIDENT:
                self._models.popitem(last=False)
        if waiting is None:
            self._fill(key, model, state)
        return model.result()

    def prepare(self, state: EmbedderState) -> None:
        """Load the model of `state` in the background, so that no query waits for it."""
        if (state.fingerprint, state.max_tokens) not in self._models:
            threading.Thread(target=self._try, args=(state,), name="metier-embedder", daemon=True).start()

    def watch(self, coming: Callable[[], EmbedderState | None], every_s: float = WATCH_S) -> threading.Event:
        """Ask `coming` for a model that a knowledge is about to move to, and prepare it; until the returned event is set."""
        ended = threading.Event()

        def look() -> None:
            while not ended.wait(every_s):
                try:
                    if (state := coming()) is not None:
                        self.prepare(state)
                except MetierError as error:
                    logger.warning("whether another embedder is coming cannot be seen now: %s", error)

        threading.Thread(target=look, name="metier-embedders", daemon=True).start()
        return ended

    def _fill(self, key: tuple[str, int], model: Future[Embeds], state: EmbedderState) -> None:
        try:
            model.set_result(self._load(state))
        except BaseException as error:
            with self._lock:
                if self._models.get(key) is model:
                    del self._models[key]
            model.set_exception(error)

    def _try(self, state: EmbedderState) -> None:
        try:
            self(state)
        except MetierError as error:
            logger.warning("the embedder of a version to come cannot be loaded yet: %s", error)

    def _load(self, state: EmbedderState) -> Embeds:
        own = self._config.model_copy(update={"max_tokens": state.max_tokens})
        if (own.source, own.revision) == (state.source, state.revision):
            return self._verified(own, state)
        # Code of a model runs only if the configuration of this process names the model.
        named = {"source": state.source, "revision": state.revision, "trust_remote_code": False}
        try:
            return self._verified(own.model_copy(update=named), state)
        except MetierError:
            try:
                return self._verified(own, state)
            except MetierError:
                pass
            raise

    def _verified(self, config: EmbedderConfig, state: EmbedderState) -> Embeds:
        embedder = Embedder(resolve(config, self._cache), config)
        if (embedder.fingerprint, embedder.dimension) != (state.fingerprint, state.dimension):
            raise Mismatch(
                f"{config.source} is another model ({embedder.dimension} dimensions) than the one that the knowledge "
                f"was embedded with ({state.source}, {state.dimension} dimensions), or its files changed; bring those "
                "back, or move to it with `metier knowledge reindex`",
                param="embedder",
            )
        return embedder
