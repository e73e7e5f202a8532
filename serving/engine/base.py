"""The seam between the pipeline and whatever decodes: token ids in, deltas out, adapters by digest, health.

Text, prompts, citations and names stay on the other side of it; the one exception are stop strings and grammars, which
end or bind an answer while it is made. :mod:`serving.engine.limits` says what a request may ask for.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Grammar:
    """What the answer has to look like."""

    kind: Literal["json_object", "json_schema", "regex"]
    text: str = ""
    """The JSON schema as JSON text, or the regular expression; nothing for ``json_object``."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen and when an answer ends; the names are OpenAI's and vLLM's."""

    max_tokens: int
    temperature: float = 0.0
    """0 takes the likeliest token."""
    top_p: float = 1.0
    top_k: int = 0
    """Only among the so many likeliest; 0: all."""
    min_p: float = 0.0
    """Only tokens at least so likely as a share of the likeliest one."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    """Both count the answer's own tokens, as OpenAI's do."""
    repetition_penalty: float = 1.0
    """Counts prompt and answer, as transformers' does."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, what is added to its logit)."""
    seed: int | None = None
    """The same seed gives the same answer in any batch; choice `i` of several uses ``seed + i``."""
    stop: tuple[str, ...] = ()
    """Strings that end the answer. The ids still hold the one that ended it; :class:`serving.text.StopText` cuts the text."""
    min_tokens: int = 0
    ignore_eos: bool = False
    """Go on to `max_tokens` whatever the model says; for benchmarks."""
    logprobs: int | None = None
    """Log probabilities of each token and so many likeliest ones beside it; ``None``: none."""
    n: int = 1
    """Answers to the same prompt; greedy ones are all alike."""
    grammar: Grammar | None = None


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
    tenant: str = ""
    """Whose turn it is: waiting requests of different tenants take turns by what they were given so far."""
    deadline_s: float | None = None
    """Seconds from its arrival at the engine until it is given up, wherever it is then; ``None``: never."""


@dataclass(frozen=True)
class TokenLogprob:
    """Log probability of a chosen token, and of the likeliest ones in its place (before temperature and penalties)."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """(token id, log probability), likeliest first."""


@dataclass(frozen=True)
class Delta:
    """What one step gave to one answer; its last one carries a finish reason."""

    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    index: int = 0
    """Which of the `n` answers."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """One a token, if they were asked for."""
    cached_tokens: int = 0
    """On the first delta of an answer: prompt tokens whose keys and values were in the prefix cache."""


@dataclass(frozen=True)
class EngineStats:
    """What routing, scaling and metrics want to know of a running engine; a moment's picture, cheap to take."""

    running: int = 0
    waiting: int = 0
    waiting_tokens: int = 0
    """Prompt tokens not yet computed and answer tokens not yet made, of running and waiting requests (at most)."""
    pages: int = 0
    free_pages: int = 0
    """Pages of the cache that nobody holds; those with a reusable prefix count as free."""
    resident: tuple[str, ...] = ()
    """Digests of the adapters that decode without loading."""
    hosted: tuple[str, ...] = ()
    """Digests of the adapters in host memory, ready to move into a slot."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Of `prompt_tokens`, those read from the prefix cache."""
    answer_tokens: int = 0
    preemptions: int = 0
    adapter_loads: int = 0
    """Times an adapter was read from disk."""
    adapter_load_s: float = 0.0
    """Seconds that those reads took, all of them together."""


class Engine(Protocol):
    """A decoder for one base model and many adapters."""

    def start(self) -> None:
        """Load the model and begin to serve; blocks until ready."""

    def add_adapter(self, digest: str, directory: Path) -> None:
        """Say where the files of an adapter are; it is loaded when first used. Idempotent."""

    def preload(self, digest: str, pin: bool = False) -> None:
        """Load an added adapter now and wait for it; pinned, it stays.

        Raises:
            NotFound, BadInput, Mismatch: as :meth:`generate` would.
        """

    def drop_adapter(self, digest: str) -> None:
        """Forget an adapter: no new request uses it, and its memory is free when the last running one ends."""

    def generate(self, request: GenerateRequest) -> AsyncIterator[Delta]:
        """Deltas of `request`, until each of its `n` answers has ended; closing the iterator early frees its place within a step.

        Raises:
            ContextTooLong: prompt and answer do not fit the context.
            BadInput: a sampling value or grammar cannot be used.
            NotFound: the adapter was never added.
            Mismatch: the adapter does not fit the base.
            Overloaded: the engine's queue is full.
            DeadlineExceeded: `deadline_s` is over.
        """
        ...

    def stats(self) -> EngineStats:
        """See :class:`EngineStats`."""
        ...

    def check_health(self) -> None:
        """Raise if the engine can serve no more."""

    def stop(self) -> None:
        """End all work and free the model."""
