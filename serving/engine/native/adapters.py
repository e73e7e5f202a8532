"""Which adapters are in memory: loaded when first used, leased while a row decodes, least recently used out first.

Only the engine's own thread calls :meth:`Adapters.lease` and what follows, which is what makes loading single-flight.
Adapters are known by content digest, never by name, so a republished name can not meet old weights.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster.errors import NotFound
from serving.engine.native.lora import LoraBank


class Adapters:
    """The adapters of one model."""

    def __init__(self, model: Any, capacity: int) -> None:
        self.bank = LoraBank(model, capacity)
        self.directories: dict[str, Path] = {}
        self.resident: OrderedDict[str, int] = OrderedDict()
        """Digest -> slot, least recently used first."""
        self.free = list(range(capacity))[::-1]
        self.leases: Counter[str] = Counter()

    def add(self, digest: str, directory: Path) -> None:
        """Say where the files of `digest` are."""
        self.directories[digest] = directory

    def can_lease(self, digest: str | None) -> bool:
        """Whether :meth:`lease` would find room: resident, or a slot free, or someone unleased to evict."""
        if digest is None or digest in self.resident or self.free:
            return True
        return any(not self.leases[other] for other in self.resident)

    def lease(self, digest: str | None) -> None:
        """Hold `digest` in memory until :meth:`release`; loads it if need be.

        Raises:
            NotFound: its files were never added.
            Mismatch: its files do not fit this model.
        """
        if digest is None:
            return
        if digest not in self.resident:
            self.resident[digest] = self._load(digest)
        self.resident.move_to_end(digest)
        self.leases[digest] += 1

    def release(self, digest: str | None) -> None:
        """Give back one lease."""
        if digest is not None:
            self.leases[digest] -= 1

    def aim(self, digests: Sequence[str | None]) -> None:
        """Say which adapter each row of the next pass uses; all of them are leased."""
        self.bank.aim([None if digest is None else self.resident[digest] for digest in digests])

    def _load(self, digest: str) -> int:
        if digest not in self.directories:
            raise NotFound(f"adapter {digest[:12]} was not added to this engine")
        if not self.free:
            oldest = next(other for other in self.resident if not self.leases[other])
            self.free.append(self.resident.pop(oldest))
        slot = self.free.pop()
        try:
            self.bank.load(slot, self.directories[digest])
        except Exception:
            self.bank.clear(slot)
            self.free.append(slot)
            raise
        return slot
