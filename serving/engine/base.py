"""The seam between the pipeline and whatever decodes: token ids in, deltas out, adapters by digest, health.

Text, prompts, citations and names stay on the other side of it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    max_tokens: int
    temperature: float = 0.0
    """0 takes the likeliest token."""
    top_p: float = 1.0
    seed: int | None = None


@dataclass(frozen=True)
class GenerateRequest:
    """One prompt to be continued."""

    request_id: str
    token_ids: tuple[int, ...]
    sampling: Sampling
    adapter: str | None = None
    """Digest of the adapter, told to the engine before by :meth:`Engine.add_adapter`; ``None`` is the base model."""
    stream: bool = True
    """Whether someone reads along. If not, the engine may keep all tokens for one last delta, which spares the way
    back a message a token."""


@dataclass(frozen=True)
class Delta:
    """What one step gave; the last one carries a finish reason."""

    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None


class Engine(Protocol):
    """A decoder for one base model and many adapters."""

    def start(self) -> None:
        """Load the model and begin to serve; blocks until ready."""

    def add_adapter(self, digest: str, directory: Path) -> None:
        """Say where the files of an adapter are; it is loaded when first used. Idempotent."""

    def generate(self, request: GenerateRequest) -> AsyncIterator[Delta]:
        """Deltas of `request`; closing the iterator early frees its place within a step.

        Raises:
            ContextTooLong: prompt and answer do not fit the context.
            NotFound: the adapter was never added.
            Overloaded: the engine's queue is full.
        """
        ...

    def check_health(self) -> None:
        """Raise if the engine can serve no more."""

    def stop(self) -> None:
        """End all work and free the model."""
