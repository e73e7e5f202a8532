"""A follow-up that the generator writes out is searched for beside the rule's query, and never instead of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from cluster.config import PromptConfig, RetrievalConfig
from cluster.errors import Overloaded
from cluster.knowledge import KnowledgeVersion
from retrieval.types import Passage, Principal, Retrieved, Snapshot
from serving import answer as module
from serving.answer import Done, Question, answer
from serving.engine.base import Delta, GenerateRequest, Sampling
from serving.engine.echo import EchoEngine
from serving.names import Resolved
from tests import trade

FIRST, LAST = "What does a trailer cost on the ferry?", "And for residents of Henn?"
WRITTEN = "What does a trailer cost for residents of Henn?"
RULE = f"{FIRST}\n{LAST}"
QUESTION = Question(
    "r1",
    [
        {"role": "user", "content": FIRST},
        {"role": "assistant", "content": "Five crowns."},
        {"role": "user", "content": LAST},
    ],
    Sampling(16),
    Principal(),
    Resolved("support@1", "a" * 64, None, PromptConfig(), RetrievalConfig(rewrite="generator")),
    Snapshot.of("docs", KnowledgeVersion(number=7, reads=7, created="", **trade.knowledge_entry())),
)


class Pipeline:
    """Writes `written` when it is asked for a question, and keeps what it was asked."""

    def __init__(self, tokenizer: Any, written: str) -> None:
        self.tokenizer, self.written = tokenizer, written
        self.queries: list[Any] = []
        self.requests: list[GenerateRequest] = []
        self.hangs, self.closed, self.error = False, 0, None

    async def retrieve(self, query: Any, *rest: Any) -> Retrieved:
        self.queries.append(query)
        found = Passage("c", "d", "Tariff", "", "A trailer costs 3 crowns for residents.", "d.md", 0, 0.9)
        return Retrieved((found,), "docs", 7, {"embed": 0.1})

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Delta]:
        self.requests.append(request)
        rewrites = request.request_id.endswith("-rewrite")
        if rewrites and self.error:
            raise self.error
        try:
            if rewrites and self.hangs:
                await asyncio.Event().wait()
            text = self.written if rewrites else "3 crowns [1]"
            yield Delta(tuple(self.tokenizer.encode(text, add_special_tokens=False)), "stop")
        finally:
            self.closed += 1

    def ask(self, question: Question = QUESTION, context: int = 2048) -> Done:
        async def run() -> Any:
            return [p async for p in answer(question, self.retrieve, self.generate, self.tokenizer, context)][-1]

        done: Done = asyncio.run(run())
        return done


def test_both_queries_are_searched_the_rules_first(tokenizer: Any) -> None:
    pipeline = Pipeline(tokenizer, f"\n{WRITTEN}\nFive")
    done = pipeline.ask()
    assert pipeline.queries == [[RULE, WRITTEN]]
    assert done.answers[0].text == "3 crowns [1]"
    assert {"rewrite", "embed", "generate"} <= set(done.seconds)
    rewrite, answered = pipeline.requests
    assert (rewrite.adapter, rewrite.sampling, rewrite.stream) == (None, Sampling(module.REWRITE_TOKENS), False)
    assert answered.adapter == "a" * 64
    assert FIRST in tokenizer.decode(rewrite.token_ids)


def test_by_rule_the_generator_is_not_asked(tokenizer: Any) -> None:
    pipeline = Pipeline(tokenizer, WRITTEN)
    by_rule = replace(QUESTION, resolved=replace(QUESTION.resolved, retrieval=RetrievalConfig()))
    assert "rewrite" not in pipeline.ask(by_rule).seconds
    assert pipeline.queries == [RULE]
    pipeline.ask(replace(QUESTION, conversation=QUESTION.conversation[:1]))
    assert pipeline.queries[1:] == [FIRST]
    assert [request.request_id for request in pipeline.requests] == ["r1", "r1"]


@pytest.mark.parametrize("written", ["", "Five crowns.", "What do whales eat in winter?"])
def test_what_is_no_question_about_this_is_not_searched(tokenizer: Any, written: str) -> None:
    pipeline = Pipeline(tokenizer, written)
    assert pipeline.ask().answers[0].text == "3 crowns [1]"
    assert pipeline.queries == [RULE]


def test_an_engine_that_is_full_leaves_the_rule(tokenizer: Any) -> None:
    pipeline = Pipeline(tokenizer, WRITTEN)
    pipeline.error = Overloaded("full")
    assert pipeline.ask().answers[0].text == "3 crowns [1]"
    assert pipeline.queries == [RULE]


def test_an_engine_that_is_slow_leaves_the_rule_and_is_let_go(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REWRITE_SECONDS", 0.05)
    pipeline = Pipeline(tokenizer, WRITTEN)
    pipeline.hangs = True
    assert pipeline.ask().answers[0].text == "3 crowns [1]"
    assert pipeline.queries == [RULE]
    assert pipeline.closed == 2


def test_a_history_that_does_not_fit_leaves_the_rule(tokenizer: Any) -> None:
    pipeline = Pipeline(tokenizer, WRITTEN)
    room = len(tokenizer.encode(FIRST + LAST, add_special_tokens=False))
    short = replace(QUESTION, resolved=replace(QUESTION.resolved, prompt=PromptConfig(system=".", passage_tokens=80)))
    pipeline.ask(short, context=room + 190)
    assert pipeline.queries == [RULE]
    assert [request.request_id for request in pipeline.requests] == ["r1"]


def test_the_echo_engine_writes_no_question(tokenizer: Any) -> None:
    pipeline = Pipeline(tokenizer, WRITTEN)
    pipeline.generate = EchoEngine().generate  # type: ignore[method-assign]
    bare = replace(QUESTION, resolved=replace(QUESTION.resolved, adapter=None))
    assert pipeline.ask(bare).completion_tokens == 16
    assert pipeline.queries == [RULE]
