"""LoRA adapters in memory: loaded when first used, leased while a row decodes with them, least recently used out first.

Only the engine's own thread calls this, which is what makes loading single-flight. Adapters are known by content
digest, never by name, so a republished name can not meet old weights.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import torch

from cluster.errors import NotFound


class Adapters:
    """The adapters of one model."""

    def __init__(self, model: Any, capacity: int) -> None:
        self.model = model
        self.capacity = capacity
        self.directories: dict[str, Path] = {}
        self.resident: OrderedDict[str, None] = OrderedDict()
        self.leases: Counter[str] = Counter()
        self.active: str | None = None
        self.wrapped = False

    def add(self, digest: str, directory: Path) -> None:
        """Say where the files of `digest` are."""
        self.directories[digest] = directory

    def can_lease(self, digest: str | None) -> bool:
        """Whether :meth:`lease` would find room: resident, or a place free, or someone unleased to evict."""
        if digest is None or digest in self.resident or len(self.resident) < self.capacity:
            return True
        return any(not self.leases[other] for other in self.resident)

    def lease(self, digest: str | None) -> None:
        """Hold `digest` in memory until :meth:`release`; loads it if need be.

        Raises:
            NotFound: its files were never added.
        """
        if digest is None:
            return
        if digest not in self.resident:
            if digest not in self.directories:
                raise NotFound(f"adapter {digest[:12]} was not added to this engine")
            self._make_room()
            self._load(digest)
        self.resident[digest] = None
        self.resident.move_to_end(digest)
        self.leases[digest] += 1

    def release(self, digest: str | None) -> None:
        """Give back one lease."""
        if digest is not None:
            self.leases[digest] -= 1

    def activate(self, digest: str | None) -> None:
        """Decode with `digest` (``None``: the bare base) from the next pass on."""
        if not self.wrapped or digest == self.active:
            return
        if digest is None:
            self.model.base_model.disable_adapter_layers()
        else:
            if self.active is None:
                self.model.base_model.enable_adapter_layers()
            self.model.set_adapter(digest)
        self.active = digest

    def _make_room(self) -> None:
        while len(self.resident) >= self.capacity:
            oldest = next(other for other in self.resident if not self.leases[other])
            del self.resident[oldest]
            if len(self.resident):
                self.activate(None)
                self.model.delete_adapter(oldest)

    def _load(self, digest: str) -> None:
        from peft import PeftModel

        directory = str(self.directories[digest])
        if not self.wrapped:
            self.model = PeftModel.from_pretrained(
                self.model, directory, adapter_name=digest, autocast_adapter_dtype=False, is_trainable=False
            )
            self.wrapped = True
        else:
            self.model.load_adapter(directory, adapter_name=digest, autocast_adapter_dtype=False, is_trainable=False)
        dtype = next(self.model.parameters()).dtype
        for name, parameter in self.model.named_parameters():
            if digest in name and parameter.dtype != dtype:
                parameter.data = parameter.data.to(dtype)
        self.model.eval()
        with torch.no_grad():
            self.model.set_adapter(digest)
        self.model.base_model.enable_adapter_layers()
        self.active = digest
