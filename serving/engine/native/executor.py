"""What the step loop asks of whatever computes: forward passes over pages of keys and values, and adapters in slots.

Two executors stand behind it: :mod:`.modules` runs transformers' own modules (any model, any device), :mod:`.fused` our
kernels for models of Llama's shape on CPUs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

    from serving.engine.native.lora import LoraWeights


@dataclass(frozen=True)
class Part:
    """What one sequence computes in a pass: one token when it decodes, a chunk of its prompt before."""

    tokens: Sequence[int]
    start: int
    """Position of ``tokens[0]``; everything before it is in `pages` already."""
    pages: Sequence[int]
    """The sequence's page table. Position ``p`` lies in page ``pages[p // page_tokens]``; it reaches to the last token."""
    slot: int | None = None
    """Slot of its adapter; ``None`` is the base model."""
    logits: bool = True
    """Whether the logits of its last token are wanted."""


@dataclass(frozen=True)
class Memory:
    """Bytes that an executor holds, for good, once it is built."""

    weights: int
    cache: int
    adapters: int


class Executor(Protocol):
    """Forward passes of one base model; used by one thread."""

    vocabulary: int
    """Columns of the logits."""
    pages: int
    """Pages in the cache."""
    page_tokens: int
    """Positions in a page."""
    memory: Memory

    def forward(self, parts: Sequence[Part]) -> torch.Tensor:
        """Compute all `parts` in one pass, write their keys and values into their pages.

        Returns:
            Logits ``[parts that want them, vocabulary]`` (float32) in the order of `parts`.
        """
        ...

    def check_adapter(self, weights: LoraWeights) -> None:
        """Raise ``Mismatch`` if `weights` have no place in this model; may be called by any thread."""

    def load_adapter(self, slot: int, weights: LoraWeights) -> None:
        """Put `weights` into `slot`, over whatever was there."""

    def clear_adapter(self, slot: int) -> None:
        """Take the adapter in `slot` out."""
