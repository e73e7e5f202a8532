"""Which adapters are where: read from disk once, checked, kept in host memory, moved into a slot to decode.

Two tiers, both by content digest and never by name, so a republished name cannot meet old weights:

- **slots** of the executor, least recently leased out first. A lease keeps an adapter in its slot while a sequence
  uses it, a pin for good.
- **host memory**, by bytes, least recently asked for out first: what was read and checked. What also has a slot leaves
  before what has none. The adapter asked for last always stays, so one that is larger than the whole budget is held
  alone until it is in its slot.

Any thread may add, prefetch, pin and drop; reading happens in a few threads of its own, once for all who ask at the
same time. Only the engine's thread asks for the state and leases. What is checked before an adapter is ready: the
size of its file, before it is opened; then what ``read`` checks (no pickle, a safetensors header, plain LoRA, rank,
finite values); then its place in this model.

Not covered: the files themselves (:mod:`serving.adapter_disk`) and whether the adapter's card names this base
(:mod:`serving.generator`).
"""

from __future__ import annotations

import copy
import logging
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cluster.adapter_files import WEIGHTS_FILE
from cluster.errors import ConfigError, MetierError, Mismatch, NotFound, ResourcesShort, Unavailable
from cluster.release import short
from serving.engine.native.executor import Executor

if TYPE_CHECKING:
    from serving.engine.native.lora import LoraWeights

log = logging.getLogger(__name__)

READERS = 2
"""Adapters read at the same time; each is in memory beside the host tier while it is read."""
HEADER_BYTES = 1 << 20
"""What a file may have beside the values of its matrices."""
WIDEST = 2
"""Files may hold values twice as wide as the base's (float32 for a bfloat16 base)."""


class Residency:
    """The adapters of one executor. ``None`` as a digest is the base model, which is always ready."""

    def __init__(self, executor: Executor, *, slots: int, host_bytes: int, read: Callable[[Path], LoraWeights]) -> None:
        self._executor, self._read = executor, read
        self._slots, self._host_bytes = slots, host_bytes
        self._largest_file = HEADER_BYTES + WIDEST * executor.memory.adapters // slots
        self._lock = threading.Lock()
        self._directories: dict[str, Path] = {}
        self._on_change: dict[str, Callable[[], None]] = {}
        """Whom to tell of a read that nobody asked for: of what left host memory before it was leased."""
        self._resident: OrderedDict[str, int] = OrderedDict()
        """Digest -> slot, least recently leased first."""
        self._free = list(range(slots))[::-1]
        self._leases: Counter[str] = Counter()
        self._pins: set[str] = set()
        self._dropped: set[str] = set()
        """In a slot, but no longer known; the slot is cleared when nobody leases it."""
        self._host: OrderedDict[str, LoraWeights] = OrderedDict()
        """Least recently asked for first."""
        self._held = 0
        self._reading: dict[str, list[Callable[[], None]]] = {}
        self._failed: dict[str, MetierError] = {}
        """Why the last read failed; forgotten when it is asked for anew."""
        self._pool = ThreadPoolExecutor(READERS, "metier-adapters")
        self.loads = 0
        """Adapters read from disk so far."""
        self.load_s = 0.0
        """Seconds that took, all together."""

    # -- any thread

    def add(self, digest: str, directory: Path) -> None:
        """Say where the files of `digest` are. Idempotent."""
        with self._lock:
            self._dropped.discard(digest)
            self._directories[digest] = directory

    def known(self, digest: str) -> bool:
        """Whether `digest` was added, and not dropped since."""
        return digest in self._directories

    def prefetch(self, digest: str, on_change: Callable[[], None]) -> None:
        """Have `digest` read into host memory; `on_change` is called, by any thread, when that ended, well or not.

        An adapter that could not be read before is tried again. The last `on_change` given is also called when
        :meth:`state` had it read once more.

        Raises:
            NotFound: it was never added.
        """
        with self._lock:
            directory = self._find(digest)
            self._on_change[digest] = on_change
            if digest in self._reading:
                self._reading[digest].append(on_change)
                return
            here = digest in self._resident or digest in self._host
            if not here:
                self._failed.pop(digest, None)
                self._start_reading(digest, directory)
        if here:
            on_change()

    def pin(self, digest: str) -> None:
        """Keep `digest`, once it is read, until :meth:`unpin`.

        Raises:
            NotFound: it was never added.
            ConfigError: every slot has its pin already.
        """
        with self._lock:
            self._find(digest)
            if digest not in self._pins and len(self._pins) >= self._slots:
                raise ConfigError(
                    f"adapter {short(digest)} cannot be pinned: {len(self._pins)} others are, in as many slots; pin fewer, or "
                    "raise serving.generator.adapters_resident",
                    param="serving.generator.pinned_adapters",
                )
            self._pins.add(digest)

    def unpin(self, digest: str) -> None:
        """Let `digest` go like any other."""
        with self._lock:
            self._pins.discard(digest)

    def drop(self, digest: str) -> None:
        """Forget `digest`: no new lease, and its slot is cleared when the last lease ends."""
        with self._lock:
            self._directories.pop(digest, None)
            self._on_change.pop(digest, None)
            self._failed.pop(digest, None)
            self._pins.discard(digest)
            self._evict(digest)
            if digest in self._resident:
                self._dropped.add(digest)

    def resident(self) -> tuple[str, ...]:
        """Digests in slots, least recently leased first."""
        with self._lock:
            return tuple(digest for digest in self._resident if digest not in self._dropped)

    def hosted(self) -> tuple[str, ...]:
        """Digests in host memory that have no slot."""
        with self._lock:
            return tuple(digest for digest in self._host if digest not in self._resident)

    @property
    def hosted_bytes(self) -> int:
        """Bytes in host memory now."""
        return self._held

    def close(self) -> None:
        """Begin no more reads."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    # -- the engine's thread

    def state(self, digest: str | None) -> Literal["ready", "loading"]:
        """Whether `digest` could be leased as far as its weights go; :meth:`can_lease` says whether there is a slot.

        What left host memory before it was leased is read again, as soon as there is a slot for it.

        Raises:
            NotFound: it was never added, or dropped since.
            ResourcesShort: pinned adapters have all slots.
            MetierError: why it could not be read.
        """
        if digest is None:
            return "ready"
        self._clear_dropped()
        with self._lock:
            directory = self._find(digest)
            if digest in self._resident:
                return "ready"
            if digest not in self._pins and len(self._pins) >= self._slots:
                raise ResourcesShort(
                    f"adapter {short(digest)} finds no slot: pinned adapters have all {self._slots}; pin fewer, or raise "
                    "serving.generator.adapters_resident",
                    param="serving.generator.adapters_resident",
                )
            if digest in self._host:
                self._host.move_to_end(digest)
                return "ready"
            if error := self._failed.get(digest):
                raise copy.copy(error) from error.__cause__
            if digest not in self._reading and self._has_room():
                self._start_reading(digest, directory)
            return "loading"

    def can_lease(self, digest: str | None) -> bool:
        """Whether :meth:`lease` would find a slot: resident, or one is free, or its adapter is neither leased nor pinned."""
        if digest is None:
            return True
        self._clear_dropped()
        with self._lock:
            return digest in self._resident or self._has_room()

    def lease(self, digest: str | None) -> int | None:
        """Hold `digest` in a slot until :meth:`release`; ask :meth:`state` and :meth:`can_lease` before.

        Returns:
            The slot; ``None`` for the base model.

        Raises:
            MetierError: as :meth:`state`; nothing is held then.
        """
        if digest is None:
            return None
        with self._lock:
            directory = self._find(digest)
            slot = self._resident.get(digest)
            if slot is not None:
                self._resident.move_to_end(digest)
                self._leases[digest] += 1
                return slot
            weights = self._host.get(digest)
        if weights is None:  # another one that was read since the state was asked took its place
            weights = self._checked(digest, directory)
        with self._lock:
            slot = self._take_slot()
        try:
            self._executor.load_adapter(slot, weights)
        except BaseException:
            self._executor.clear_adapter(slot)
            self._free.append(slot)
            raise
        with self._lock:
            self._resident[digest] = slot
            self._leases[digest] += 1
            if digest not in self._directories:
                self._dropped.add(digest)
            self._trim()
        return slot

    def release(self, digest: str | None) -> None:
        """Give back one lease."""
        if digest is None:
            return
        with self._lock:
            self._leases[digest] -= 1
            if not self._leases[digest]:
                del self._leases[digest]
        self._clear_dropped()

    # -- within

    def _find(self, digest: str) -> Path:
        try:
            return self._directories[digest]
        except KeyError:
            raise NotFound(f"adapter {short(digest)} was not added to this engine, or dropped since") from None

    def _may_leave(self, digest: str) -> bool:
        return not self._leases[digest] and digest not in self._pins

    def _has_room(self) -> bool:
        return bool(self._free) or any(self._may_leave(digest) for digest in self._resident)

    def _take_slot(self) -> int:
        if self._free:
            return self._free.pop()
        oldest = next(digest for digest in self._resident if self._may_leave(digest))
        self._dropped.discard(oldest)
        return self._resident.pop(oldest)

    def _clear_dropped(self) -> None:
        if not self._dropped:
            return
        with self._lock:
            gone = [digest for digest in self._dropped if not self._leases[digest]]
            self._dropped.difference_update(gone)
            slots = [self._resident.pop(digest) for digest in gone]
        for slot in slots:
            self._executor.clear_adapter(slot)
        with self._lock:
            self._free += slots

    def _start_reading(self, digest: str, directory: Path) -> None:
        self._reading[digest] = [self._on_change[digest]] if digest in self._on_change else []
        self._pool.submit(self._read_one, digest, directory)

    def _read_one(self, digest: str, directory: Path) -> None:
        weights, failure = None, None
        try:
            weights = self._checked(digest, directory)
        except MetierError as error:
            failure = error
        with self._lock:
            waiting = self._reading.pop(digest)
            if digest in self._directories:
                if weights is not None:
                    self._keep(digest, weights)
                elif failure is not None:
                    self._failed[digest] = failure
        for on_change in dict.fromkeys(waiting):
            on_change()

    def _checked(self, digest: str, directory: Path) -> LoraWeights:
        """The weights in `directory`, fit for this model; errors name the adapter instead of the directory."""
        began = time.monotonic()
        try:
            self._check_size(directory / WEIGHTS_FILE)
            weights = self._read(directory)
            self._executor.check_adapter(weights)
        except MetierError as error:
            words = error.message.replace(f"{directory}/", "").replace(str(directory), "its directory")
            log.warning("adapter %s cannot be served: %s", short(digest), words)
            raise type(error)(f"adapter {short(digest)}: {words}", param=error.param) from error
        except Exception as error:
            log.exception("adapter %s cannot be read", short(digest))
            raise Unavailable(f"adapter {short(digest)} cannot be read: {error}") from error
        with self._lock:
            self.loads += 1
            self.load_s += time.monotonic() - began
        return weights

    def _check_size(self, file: Path) -> None:
        try:
            size = file.stat().st_size
        except OSError:  # `read` says what is missing
            return
        if size > self._largest_file:
            raise Mismatch(
                f"{file.name} has {size / 1e6:.1f} MB, but an adapter of this base has at most "
                f"{self._largest_file / 1e6:.1f} MB at rank serving.generator.max_rank; serve its own base, or raise that",
                param="serving.generator.max_rank",
            )

    def _keep(self, digest: str, weights: LoraWeights) -> None:
        self._evict(digest)
        self._host[digest] = weights
        self._held += weights.bytes
        self._trim()

    def _evict(self, digest: str) -> None:
        if (weights := self._host.pop(digest, None)) is not None:
            self._held -= weights.bytes

    def _trim(self) -> None:
        """Come back under the budget."""
        if self._held <= self._host_bytes:
            return
        newest = next((digest for digest in reversed(self._host) if digest not in self._resident), None)
        for digest in sorted(self._host, key=lambda digest: digest not in self._resident):
            if digest in self._resident or (digest != newest and digest not in self._pins):
                self._evict(digest)
            if self._held <= self._host_bytes:
                return
