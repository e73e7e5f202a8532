"""An engine without a model: it answers with the end of its prompt. For load tests of the path around the engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

from cluster.errors import NotFound
from serving.engine.base import Delta, GenerateRequest


class EchoEngine:
    """Deterministic: the answer is the last ``max_tokens`` ids of the prompt, in order, one a step."""

    def __init__(self) -> None:
        self.adapters: set[str] = set()

    def start(self) -> None:
        """Nothing to load."""

    def add_adapter(self, digest: str, directory: Path) -> None:
        self.adapters.add(digest)

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Delta]:
        if request.adapter is not None and request.adapter not in self.adapters:
            raise NotFound(f"adapter {request.adapter[:12]} was not added to this engine")
        answer = request.token_ids[-request.sampling.max_tokens :]
        for token in answer:
            await asyncio.sleep(0)
            yield Delta((token,))
        yield Delta((), "length" if len(answer) == request.sampling.max_tokens else "stop")

    def check_health(self) -> None:
        """Always well."""

    def stop(self) -> None:
        """Nothing to free."""
