"""One answer: retrieve -> prompt -> generate -> cite, as a stream of parts.

It takes two functions and knows neither Ray nor HTTP: a coroutine and a Serve ``DeploymentResponse`` are both
awaitable, an async generator and a ``DeploymentResponseGenerator`` are both async-iterable, so the same code runs in
one process and over replicas.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from cluster.config import RetrievalConfig
from retrieval.prompt import (
    Citation,
    Tokenizer,
    check_length,
    citations,
    ground,
    is_decline,
    prompt_ids,
    token_counter,
)
from retrieval.query import search_query
from retrieval.types import Passage, Principal, Retrieved
from serving.engine.base import Delta, GenerateRequest, Sampling
from serving.names import Resolved
from serving.text import Detokenizer

Retrieve = Callable[[str, str, int, Principal, RetrievalConfig], Awaitable[Retrieved]]
"""(query, knowledge, version, principal, settings) -> passages."""
Generate = Callable[[GenerateRequest], AsyncIterator[Delta]]


@dataclass(frozen=True)
class Question:
    """What is asked, with everything about it settled."""

    request_id: str
    conversation: Sequence[dict[str, str]]
    sampling: Sampling
    principal: Principal
    resolved: Resolved
    knowledge: str | None
    """Collection to search; ``None`` answers without retrieval."""
    version: int = 0
    """Knowledge version; set where `knowledge` is."""
    top_k: int | None = None
    stream: bool = False
    """Whether the client reads the answer as it is made."""


@dataclass(frozen=True)
class Found:
    """First part: the passages in the prompt, before any text."""

    passages: tuple[Passage, ...]


@dataclass(frozen=True)
class Text:
    """A piece of the answer."""

    text: str


@dataclass(frozen=True)
class Done:
    """Last part."""

    text: str
    """The whole answer."""
    finish_reason: str
    citations: tuple[Citation, ...]
    declined: bool
    prompt_tokens: int
    completion_tokens: int
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time per stage: ``embed``, ``search``, ``first_token`` (streams only), ``generate``."""


Part = Found | Text | Done


async def answer(
    question: Question, retrieve: Retrieve, generate: Generate, tokenizer: Tokenizer, context: int
) -> AsyncGenerator[Part, None]:
    """Parts of the answer: one :class:`Found`, any number of :class:`Text`, one :class:`Done`.

    Nothing above the score floor, or nothing that fits the passage budget, declines at once, without generating.

    Args:
        context: tokens the model reads, prompt and answer together.

    Raises:
        ContextTooLong: history and passages leave no room for the answer.
    """
    resolved = question.resolved
    seconds: dict[str, float] = {}
    passages: Sequence[Passage] | None = None
    if question.knowledge is not None:
        settings = resolved.retrieval
        if question.top_k is not None:
            wider = max(question.top_k, settings.candidates)
            settings = settings.model_copy(update={"top_k": question.top_k, "candidates": wider})
        query = search_query(question.conversation)
        found = await retrieve(query, question.knowledge, question.version, question.principal, settings)
        passages = found.passages
        seconds |= found.seconds

    grounded = ground(resolved.prompt, question.conversation, passages, token_counter(tokenizer))
    if passages is not None and not grounded.passages:
        yield Found(())
        yield Text(resolved.prompt.decline)
        yield Done(resolved.prompt.decline, "stop", (), True, 0, 0, seconds)
        return
    ids = prompt_ids(tokenizer, grounded.messages)
    check_length(len(ids), question.sampling.max_tokens, context)
    yield Found(grounded.passages)

    began = time.perf_counter()
    detokenizer = Detokenizer(tokenizer)
    made, reason = 0, "stop"
    request = GenerateRequest(question.request_id, tuple(ids), question.sampling, resolved.adapter, question.stream)
    async for delta in generate(request):
        if made == 0 and question.stream:
            seconds["first_token"] = time.perf_counter() - began
        made += len(delta.token_ids)
        if piece := detokenizer.push(delta.token_ids):
            yield Text(piece)
        if delta.finish_reason is not None:
            reason = delta.finish_reason
    if piece := detokenizer.flush():
        yield Text(piece)
    seconds["generate"] = time.perf_counter() - began
    text = detokenizer.text
    cited = tuple(citations(text, grounded.passages))
    yield Done(text, reason, cited, is_decline(resolved.prompt, text), len(ids), made, seconds)
