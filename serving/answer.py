"""One answer: retrieve -> prompt -> generate -> cite, as a stream of parts.

It takes two functions and knows neither Ray nor HTTP: a coroutine and a Serve ``DeploymentResponse`` are both
awaitable, an async generator and a ``DeploymentResponseGenerator`` are both async-iterable, so the same code runs in
one process and over replicas.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from cluster.config import RetrievalConfig
from cluster.errors import MetierError
from retrieval.prompt import (
    Citation,
    Message,
    Tokenizer,
    check_length,
    citations,
    ground,
    is_decline,
    prompt_ids,
    token_counter,
)
from retrieval.query import search_query
from retrieval.rewrite import rewriting, stand_alone
from retrieval.types import Passage, Principal, Retrieved, Snapshot
from serving.engine.base import Delta, GenerateRequest, Sampling
from serving.names import Resolved
from serving.text import Detokenizer

Retrieve = Callable[[str | Sequence[str], Snapshot, Principal, RetrievalConfig], Awaitable[Retrieved]]
"""(query or queries, snapshot, principal, settings) -> passages."""
Generate = Callable[[GenerateRequest], AsyncIterator[Delta]]
REWRITE_TOKENS = 48
REWRITE_SECONDS = 5.0
"""A question that takes longer to be written out is searched for as the rule makes it."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Question:
    """What is asked, with everything about it settled."""

    request_id: str
    conversation: Sequence[dict[str, str]]
    sampling: Sampling
    principal: Principal
    resolved: Resolved
    snapshot: Snapshot | None
    """What to search; ``None`` answers without retrieval."""
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
    """Wall time per stage: ``embed``, ``search``, ``fuse``, ``first_token`` (streams only), ``generate``; also ``rewrite``,
    and the other stages of :class:`retrieval.retriever.Retriever`, where they were asked for."""


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
    if question.snapshot is not None:
        settings = resolved.retrieval
        if question.top_k is not None:
            wider = max(question.top_k, settings.candidates)
            settings = settings.model_copy(update={"top_k": question.top_k, "candidates": wider})
        query: str | Sequence[str] = search_query(question.conversation)
        if settings.rewrite == "generator" and (messages := rewriting(question.conversation)):
            began = time.perf_counter()
            if written := await _written_out(question, messages, generate, tokenizer, context):
                query = [str(query), written]
            seconds["rewrite"] = time.perf_counter() - began
        found = await retrieve(query, question.snapshot, question.principal, settings)
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


async def _written_out(
    question: Question, messages: Sequence[Message], generate: Generate, tokenizer: Tokenizer, context: int
) -> str | None:
    """The question that stands alone, as the bare base model writes it; None if it does not, or not in time."""
    ids = prompt_ids(tokenizer, messages)
    request = GenerateRequest(f"{question.request_id}-rewrite", tuple(ids), Sampling(REWRITE_TOKENS), stream=False)
    detokenizer = Detokenizer(tokenizer)
    try:
        check_length(len(ids), REWRITE_TOKENS, context)
        async with asyncio.timeout(REWRITE_SECONDS):
            async for delta in generate(request):
                detokenizer.push(delta.token_ids)
    except (MetierError, TimeoutError) as error:
        log.info("the follow-up of %s is searched for by rule: %s", question.request_id, error or "no answer in time")
        return None
    detokenizer.flush()
    return stand_alone(detokenizer.text, question.conversation)
