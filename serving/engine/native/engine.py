"""The step loop: admit what waits, prefill it, decode one token for every running row, hand out the deltas.

One thread owns the model. Callers live on event loops: they put requests into a bounded queue and receive deltas
through ``call_soon_threadsafe``. All running rows decode in one pass, whatever their adapters. Not covered: paged
cache, prefix reuse, chunked prefill.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cluster.config import Config
from cluster.errors import MetierError, Overloaded, Unavailable
from cluster.models import load_tokenizer
from retrieval.prompt import check_length
from serving.engine.base import Delta, FinishReason, GenerateRequest
from serving.engine.native.adapters import Adapters
from serving.engine.native.attention import register
from serving.engine.native.cache import SlotCache
from serving.engine.native.sampling import choose, generator_for

log = logging.getLogger(__name__)
STUCK_SECONDS = 60.0
"""A step that takes longer than this makes the engine unhealthy."""


@dataclass(eq=False)
class Row:
    """One request on its way; `slot` is -1 while it waits."""

    request: GenerateRequest
    loop: asyncio.AbstractEventLoop
    out: asyncio.Queue[Delta | Exception]
    chance: torch.Generator | None
    slot: int = -1
    length: int = 0
    """Positions written to the cache."""
    token: int = -1
    """The newest token, not yet in the cache."""
    made: int = 0
    held: list[int] = field(default_factory=list)
    """Tokens that were not handed out yet."""
    cancelled: bool = field(default=False)

    def put(self, item: Delta | Exception) -> None:
        try:
            self.loop.call_soon_threadsafe(self.out.put_nowait, item)
        except RuntimeError:  # the caller's event loop is closed: nobody reads on
            self.cancelled = True


class NativeEngine:
    """See the module's docstring; the seam is :class:`serving.engine.base.Engine`."""

    def __init__(self, config: Config, directory: Path) -> None:
        self.config = config
        self.directory = directory
        self.settings = config.serving.generator
        self.waiting: deque[Row] = deque()
        self.running: list[Row] = []
        self.wake = threading.Condition()
        self.stopping = False
        self.step_began = 0.0
        self.failure: Exception | None = None
        self.thread: threading.Thread | None = None

    # -- the seam, called from event loops -----------------------------------------------------------------------

    def start(self) -> None:
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(self.settings.threads or os.cpu_count() or 1)
        device = torch.device("cuda" if torch.cuda.is_available() and self.settings.gpus > 0 else "cpu")
        dtype = getattr(torch, self.config.base.dtype)
        model = AutoModelForCausalLM.from_pretrained(
            self.directory,
            dtype=dtype,
            attn_implementation=register(),
            trust_remote_code=self.config.base.trust_remote_code,
        ).to(device)
        model.eval()
        eos = model.generation_config.eos_token_id
        # Training teaches the tokenizer's end of turn, which a model's own settings need not name.
        taught = load_tokenizer(self.directory, self.config.base.trust_remote_code).eos_token_id
        self.eos = frozenset([*(eos if isinstance(eos, list) else [eos]), taught])
        self.device = device
        self.model = model
        self.adapters = Adapters(model, self.settings.adapters_resident)
        self.cache = SlotCache(
            model.config.get_text_config(), self.settings.batch_size, self.config.base.context_tokens, dtype, device
        )
        self.free = list(range(self.settings.batch_size))[::-1]
        self.thread = threading.Thread(target=self._run, name="metier-engine", daemon=True)
        self.thread.start()

    def add_adapter(self, digest: str, directory: Path) -> None:
        self.adapters.add(digest, directory)

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Delta]:
        check_length(len(request.token_ids), request.sampling.max_tokens, self.config.base.context_tokens)
        row = Row(request, asyncio.get_running_loop(), asyncio.Queue(), generator_for(request.sampling))
        with self.wake:
            self.check_health()
            if self.stopping:
                raise Unavailable("the engine is stopping")
            if len(self.waiting) >= self.settings.max_ongoing_requests:
                raise Overloaded(f"the generator has {len(self.waiting)} requests waiting; try again in a moment")
            self.waiting.append(row)
            self.wake.notify()
        try:
            while True:
                item = await row.out.get()
                if isinstance(item, Exception):
                    raise item
                yield item
                if item.finish_reason is not None:
                    return
        finally:
            row.cancelled = True

    def check_health(self) -> None:
        if self.failure is not None:
            raise Unavailable(f"the engine stopped: {self.failure}") from self.failure
        if self.thread is None or not self.thread.is_alive():
            raise Unavailable("the engine is not running")
        if self.step_began and time.monotonic() - self.step_began > STUCK_SECONDS:
            raise Unavailable(f"the engine has been in one step for over {STUCK_SECONDS:.0f} s")

    def stop(self) -> None:
        with self.wake:
            self.stopping = True
            self.wake.notify()
        if self.thread is not None:
            self.thread.join(timeout=30)

    # -- the loop, on the engine's thread ------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                while self._wait():
                    self.step_began = time.monotonic()
                    self._step()
                    self.step_began = 0.0
        except Exception as error:
            log.exception("engine failed")
            self.failure = error
        with self.wake:
            self.stopping = True  # from here on nobody joins a queue that is not read any more
            for row in [*self.running, *self.waiting]:
                row.put(Unavailable("the engine stopped before the answer was complete"))

    def _wait(self) -> bool:
        """Sleep until there is work; False when told to stop."""
        with self.wake:
            while not (self.stopping or self.running or self.waiting):
                self.wake.wait()
            return not self.stopping

    def _step(self) -> None:
        for row in [row for row in self.running if row.cancelled]:
            self._leave(row)
        for row in self._admit():
            try:
                self._prefill(row)
            except MetierError as error:
                self._leave(row)
                row.put(error)
        if self.running:
            self._decode(self.running)

    def _admit(self) -> list[Row]:
        """Waiting rows that get a slot now, in order of arrival.

        A row whose adapter finds no room waits on. Rows of the base pass it, rows with adapters do not: they could
        keep theirs leased for ever.
        """
        admitted: list[Row] = []
        blocked = False
        with self.wake:
            waiting = list(self.waiting)
        for row in waiting:
            adapter = row.request.adapter
            if not row.cancelled:
                if not self.free or (blocked and adapter is not None):
                    continue
                if not self.adapters.can_lease(adapter):
                    blocked = True
                    continue
            with self.wake:  # not held while an adapter loads: event loops wait for it
                self.waiting.remove(row)
            if row.cancelled:
                continue
            try:
                self.adapters.lease(adapter)
            except Exception as error:
                row.put(error)
                continue
            row.slot = self.free.pop()
            self.running.append(row)
            admitted.append(row)
        return admitted

    def _prefill(self, row: Row) -> None:
        length = len(row.request.token_ids)
        ids = torch.tensor([row.request.token_ids], device=self.device)
        positions = torch.arange(length, device=self.device)[None]
        later = torch.full((length, length), float("-inf"), device=self.device).triu(1)
        logits = self._forward([row], ids, positions, later[None, None], reach=length)
        row.length = length
        self._take(row, logits[0])

    def _decode(self, rows: Sequence[Row]) -> None:
        lengths = torch.tensor([row.length for row in rows], device=self.device)
        ids = torch.tensor([[row.token] for row in rows], device=self.device)
        reach = int(lengths.max()) + 1
        unread = torch.arange(reach, device=self.device)[None] > lengths[:, None]
        mask = torch.zeros(unread.shape, device=self.device).masked_fill_(unread, float("-inf"))
        logits = self._forward(rows, ids, lengths[:, None], mask[:, None, None], reach=reach)
        for row, row_logits in zip(list(rows), logits, strict=True):
            row.length += 1
            self._take(row, row_logits)

    def _forward(
        self, rows: Sequence[Row], ids: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor, *, reach: int
    ) -> torch.Tensor:
        """Logits of the last position, ``[rows, vocabulary]``."""
        self.adapters.aim([row.request.adapter for row in rows])
        self.cache.aim(torch.tensor([row.slot for row in rows], device=self.device), positions, reach)
        out: Any = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return out.logits[:, -1]

    def _take(self, row: Row, logits: torch.Tensor) -> None:
        token = choose(logits, row.request.sampling, row.chance)
        row.made += 1
        row.token = token
        reason: FinishReason | None = None
        if token in self.eos:
            reason = "stop"
        elif row.made >= row.request.sampling.max_tokens:
            reason = "length"
        if token not in self.eos:
            row.held.append(token)
        if reason is not None or row.request.stream:
            row.put(Delta(tuple(row.held), reason))
            row.held.clear()
        if reason is not None:
            self._leave(row)

    def _leave(self, row: Row) -> None:
        self.running.remove(row)
        self.free.append(row.slot)
        self.adapters.release(row.request.adapter)
