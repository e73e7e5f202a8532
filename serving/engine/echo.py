"""An engine without a model: it answers with the end of its prompt. For tests and load tests of the path around it.

The whole seam of :mod:`serving.engine.base`, with the bounds of :mod:`serving.engine.limits`. Not covered: whatever
needs text or scores. Stop strings and grammars are refused; temperature, penalties and the like are checked and
change nothing, and every log probability is 0.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

from cluster.config import Config
from cluster.errors import BadInput, DeadlineExceeded, NotFound
from serving.engine.base import Delta, EngineStats, FinishReason, GenerateRequest, TokenLogprob
from serving.engine.limits import check_request

VOCABULARY = 1 << 24
"""More ids than any model has, so that whatever a tokenizer makes can be echoed."""


class EchoEngine:
    """Deterministic: each of the `n` answers is the last ``max_tokens`` ids of the prompt, in order, one a step."""

    def __init__(self, config: Config | None = None) -> None:
        config = config or Config()
        self.limits, self.context = config.serving.generator.limits, config.base.context_tokens
        self.adapters: set[str] = set()
        self.running = 0
        self.left = self.prompt_tokens = self.answer_tokens = 0

    def start(self) -> None:
        """Nothing to load."""

    def add_adapter(self, digest: str, directory: Path) -> None:
        self.adapters.add(digest)

    def preload(self, digest: str, pin: bool = False) -> None:
        self._check_adapter(digest)

    def drop_adapter(self, digest: str) -> None:
        self.adapters.discard(digest)

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Delta]:
        sampling = request.sampling
        check_request(request, self.limits, VOCABULARY, self.context)
        for field, asked in (("stop", sampling.stop), ("response_format", sampling.grammar)):
            if asked:
                raise BadInput(f"the echo engine has no tokenizer and serves no {field}; leave it out", param=field)
        if request.adapter is not None:
            self._check_adapter(request.adapter)
        began = time.monotonic()
        answer = request.token_ids[-sampling.max_tokens :]
        reason: FinishReason = "length" if len(answer) == sampling.max_tokens else "stop"
        left = sampling.n * len(answer)
        self.running += sampling.n
        self.left += left
        self.prompt_tokens += len(request.token_ids)
        try:
            for token in answer:
                await asyncio.sleep(0)
                if request.deadline_s is not None and time.monotonic() - began > request.deadline_s:
                    raise DeadlineExceeded(f"the answer was not complete within {request.deadline_s:g} s")
                for index in range(sampling.n):
                    left -= 1
                    self.left -= 1
                    self.answer_tokens += 1
                    if request.stream:
                        yield self._delta(request, (token,), index)
            for index in range(sampling.n):
                yield self._delta(request, () if request.stream else answer, index, reason)
        finally:
            self.running -= sampling.n
            self.left -= left

    def stats(self) -> EngineStats:
        return EngineStats(
            running=self.running,
            waiting_tokens=self.left,
            resident=tuple(sorted(self.adapters)),
            prompt_tokens=self.prompt_tokens,
            answer_tokens=self.answer_tokens,
        )

    def check_health(self) -> None:
        """Always well."""

    def stop(self) -> None:
        """Nothing to free."""

    def _check_adapter(self, digest: str) -> None:
        if digest not in self.adapters:
            raise NotFound(f"adapter {digest[:12]} was not added to this engine")

    def _delta(
        self, request: GenerateRequest, tokens: tuple[int, ...], index: int, reason: FinishReason | None = None
    ) -> Delta:
        width = request.sampling.logprobs
        logprobs = () if width is None else tuple(TokenLogprob(t, 0.0, ((t, 0.0),)[:width]) for t in tokens)
        return Delta(tokens, reason, index, logprobs)
