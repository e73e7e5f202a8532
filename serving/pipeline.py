"""The pipeline behind the HTTP routes: a request and its principal -> a settled question -> parts of an answer.

Knows the registry and the tokenizer, and two functions to retrieve and to generate; neither Ray nor HTTP.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from cluster.config import Config
from cluster.errors import BadInput
from cluster.registry import Registry
from retrieval.prompt import Tokenizer
from retrieval.types import Principal, Snapshot
from serving.answer import Generate, Part, Question, Retrieve, answer
from serving.engine.limits import check_sampling
from serving.names import Names, Resolved
from serving.openai import ChatRequest, Rag


class Pipeline:
    """Answers chat requests for one configuration."""

    def __init__(
        self,
        config: Config,
        registry: Registry,
        names: Names,
        tokenizer: Tokenizer,
        retrieve: Retrieve,
        generate: Generate,
    ) -> None:
        self.config, self.registry, self.names, self.tokenizer = config, registry, names, tokenizer
        self.retrieve, self.generate = retrieve, generate

    @property
    def principal(self) -> Principal:
        """Who asks: nobody is told apart yet, so everybody is who the configuration says."""
        return Principal(self.config.knowledge.tenant, self.config.knowledge.groups)

    def question(self, body: ChatRequest, request_id: str) -> Question:
        """Settle everything about a request that names and the registry decide; reads storage, so call it in a thread.

        Raises:
            ModelNotFound, Mismatch, BadInput: as :class:`serving.names.Names` and the knowledge asked for say.
            BadInput: a field of how to answer is out of its bounds.
        """
        sampling = body.sampling(self.config.serving.max_tokens)
        check_sampling(sampling, self.config.serving.generator.limits)
        resolved = self.names.resolve(body.model)
        return Question(
            request_id=request_id,
            conversation=body.conversation,
            sampling=sampling,
            principal=self.principal,
            resolved=resolved,
            snapshot=self._snapshot(body.rag, resolved),
            top_k=body.rag.top_k if body.rag else None,
            stream=body.stream,
            deadline_s=self.config.serving.request_timeout_s,
        )

    async def parts(self, question: Question) -> AsyncGenerator[Part, None]:
        """The answer, part by part; see :func:`serving.answer.answer`."""
        stream = answer(question, self.retrieve, self.generate, self.tokenizer, self.config.base.context_tokens)
        async with aclosing(stream):
            async for part in stream:
                yield part

    def _snapshot(self, rag: Rag | None, resolved: Resolved) -> Snapshot | None:
        """What to search: what the request's ``rag`` says, or else the release."""
        pinned = resolved.knowledge
        if (rag is None and pinned is None) or (rag is not None and not rag.enabled):
            return None
        default = pinned.name if pinned else self.config.knowledge.name
        name = (rag.knowledge if rag else None) or default
        if pinned is not None and name == pinned.name and pinned.version != "head":
            return Snapshot.of(name, self.registry.knowledge_version(name, pinned.version))
        latest = self.registry.knowledge_latest(name)
        if latest is None:
            raise BadInput(f"knowledge '{name}' is empty or not there; run `metier index`", param="rag.knowledge")
        return Snapshot.of(name, latest)
