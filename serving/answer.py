"""One question's answers: retrieve -> prompt -> generate -> cite, as a stream of parts.

It takes two functions and knows neither Ray nor HTTP: a coroutine and a Serve ``DeploymentResponse`` are both
awaitable, an async generator and a ``DeploymentResponseGenerator`` are both async-iterable, so the same code runs in
one process and over replicas.
"""

from __future__ import annotations

import asyncio
import logging
import time
from bisect import bisect_left
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
from serving.engine.base import Delta, FinishReason, GenerateRequest, Sampling, TokenLogprob
from serving.names import Resolved
from serving.text import Detokenizer, StopText

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
    deadline_s: float | None = None
    """Seconds after which an engine gives the answer up."""


@dataclass(frozen=True)
class Found:
    """First part: the passages in the prompt, before any text."""

    passages: tuple[Passage, ...]


@dataclass(frozen=True)
class Text:
    """A piece of one answer."""

    text: str
    index: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()
    """Of the tokens since the piece before, if they were asked for."""


@dataclass(frozen=True)
class Answer:
    """One of the `n` answers has ended."""

    text: str
    """The whole of it."""
    finish_reason: FinishReason
    citations: tuple[Citation, ...]
    declined: bool
    index: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()
    """Of all its tokens."""


@dataclass(frozen=True)
class Done:
    """Last part."""

    answers: tuple[Answer, ...]
    """All of them, by index."""
    prompt_tokens: int
    cached_tokens: int
    """Of `prompt_tokens`, those whose keys and values the engine had from an earlier prompt."""
    completion_tokens: int
    """Of all answers."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time per stage: ``embed``, ``search``, ``fuse``, ``first_token`` (streams only), ``generate``; also ``rewrite``,
    and the other stages of :class:`retrieval.retriever.Retriever`, where they were asked for."""

    @property
    def declined(self) -> bool:
        """Whether every answer is a decline."""
        return all(answer.declined for answer in self.answers)


Part = Found | Text | Answer | Done


async def answer(
    question: Question, retrieve: Retrieve, generate: Generate, tokenizer: Tokenizer, context: int
) -> AsyncGenerator[Part, None]:
    """Parts of the answers: one :class:`Found`, any number of :class:`Text`, :class:`Answer` at each one's end, :class:`Done`.

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
    sampling = question.sampling
    if passages is not None and not grounded.passages:
        decline = resolved.prompt.decline
        declines = tuple(Answer(decline, "stop", (), True, index) for index in range(sampling.n))
        yield Found(())
        for each in declines:
            yield Text(decline, each.index)
            yield each
        yield Done(declines, 0, 0, 0, seconds)
        return
    ids = prompt_ids(tokenizer, grounded.messages)
    check_length(len(ids), sampling.max_tokens, context)
    yield Found(grounded.passages)

    began = time.perf_counter()
    growing = [_Growing(tokenizer, sampling, index) for index in range(sampling.n)]
    answers: dict[int, Answer] = {}
    made = cached = 0
    request = GenerateRequest(
        question.request_id,
        tuple(ids),
        sampling,
        resolved.adapter,
        question.stream,
        question.principal.tenant,
        question.deadline_s,
    )
    async for delta in generate(request):
        if made == 0 and question.stream:
            seconds["first_token"] = time.perf_counter() - began
        made += len(delta.token_ids)
        cached = max(cached, delta.cached_tokens)
        one = growing[delta.index]
        if piece := one.push(delta):
            yield piece
        if delta.finish_reason is not None:
            if piece := one.flush():
                yield piece
            text = one.stop_text.text
            cited = tuple(citations(text, grounded.passages))
            declined = is_decline(resolved.prompt, text)
            each = Answer(text, delta.finish_reason, cited, declined, one.index, tuple(one.logprobs))
            answers[one.index] = each
            yield each
    seconds["generate"] = time.perf_counter() - began
    yield Done(tuple(answers[index] for index in sorted(answers)), len(ids), cached, made, seconds)


class _Growing:
    """The text of one answer while it is made, and the log probabilities that go with it."""

    def __init__(self, tokenizer: Tokenizer, sampling: Sampling, index: int) -> None:
        self.stop_text = StopText(tokenizer, sampling.stop)
        self.index = index
        self.logprobs: list[TokenLogprob] = []
        self.starts: list[int] = []
        """Where in the text each token of `logprobs` begins."""
        self.told = 0

    def push(self, delta: Delta) -> Text | None:
        """The piece that `delta` makes certain, if there is one."""
        if not delta.logprobs:
            return self._piece(self.stop_text.push(delta.token_ids))
        shown = ""
        for token, logprob in zip(delta.token_ids, delta.logprobs, strict=True):
            self.starts.append(len(self.stop_text.detokenizer.text))
            self.logprobs.append(logprob)
            shown += self.stop_text.push((token,))
        return self._piece(shown)

    def flush(self) -> Text | None:
        """The last piece, if something is left."""
        piece = self._piece(self.stop_text.flush(), last=not self.stop_text.stopped)
        del self.logprobs[self.told :]  # those of the stop string
        return piece

    def _piece(self, shown: str, last: bool = False) -> Text | None:
        end = len(self.starts) if last else bisect_left(self.starts, len(self.stop_text.text))
        if not shown and end == self.told:
            return None
        logprobs = tuple(self.logprobs[self.told : end])
        self.told = end
        return Text(shown, self.index, logprobs)


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
