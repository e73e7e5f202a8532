"""One answer in one process: retrieve, prompt, generate, cite."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

import pytest

from cluster.config import PromptConfig, RetrievalConfig
from cluster.errors import ContextTooLong
from cluster.knowledge import KnowledgeVersion
from retrieval.types import Passage, Principal, Retrieved, Snapshot
from serving.answer import Answer, Done, Found, Part, Question, Text, answer
from serving.engine.base import Delta, GenerateRequest, Sampling, TokenLogprob
from serving.names import Resolved
from tests import trade

PROMPT = PromptConfig()
PASSAGES = tuple(
    Passage(f"c{n}", f"d{n}", "Tariff", "", text, f"d{n}.md", 0, 0.9)
    for n, text in enumerate(["A trailer costs 5 crowns.", "Dogs stay on a lead."])
)
SNAPSHOT = Snapshot.of("docs", KnowledgeVersion(number=7, reads=7, created="", **trade.knowledge_entry()))
QUESTION = Question(
    "r1",
    [{"role": "user", "content": "What does a trailer cost on the ferry?"}],
    Sampling(32, temperature=0.5, seed=4),
    Principal("acme", ("staff",)),
    Resolved("support@1", "a" * 64, None, PROMPT, RetrievalConfig(top_k=2, candidates=5)),
    SNAPSHOT,
)


class Pipeline:
    """Retrieves `passages`, generates `text` a byte a step, and keeps what it was asked."""

    def __init__(self, tokenizer: Any, text: str = "5 crowns [1]", passages: Sequence[Passage] = PASSAGES) -> None:
        self.tokenizer, self.text, self.passages = tokenizer, text, tuple(passages)
        self.retrieved: list[tuple[Any, ...]] = []
        self.generated: list[GenerateRequest] = []
        self.closed = 0

    async def retrieve(self, *asked: Any) -> Retrieved:
        self.retrieved.append(asked)
        return Retrieved(self.passages, "docs", 7, {"embed": 0.1, "search": 0.2})

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Delta]:
        self.generated.append(request)
        try:
            for token in self.tokenizer.encode(self.text, add_special_tokens=False):
                yield Delta((token,))
            yield Delta((), "length")
        finally:
            self.closed += 1

    def parts(self, question: Question = QUESTION, context: int = 2048) -> AsyncIterator[Part]:
        return answer(question, self.retrieve, self.generate, self.tokenizer, context)


def ask(pipeline: Pipeline, question: Question = QUESTION, **options: Any) -> list[Part]:
    async def run() -> list[Part]:
        return [part async for part in pipeline.parts(question, **options)]

    return asyncio.run(run())


def done(parts: list[Part]) -> Done:
    last = parts[-1]
    assert isinstance(last, Done)
    return last


def one(parts: list[Part]) -> Answer:
    """The only answer."""
    (only,) = done(parts).answers
    return only


def texts(parts: list[Part], index: int = 0) -> list[Text]:
    return [part for part in parts if isinstance(part, Text) and part.index == index]


def test_passages_come_first_then_text_then_the_end(tokenizer: Any) -> None:
    parts = ask(Pipeline(tokenizer))
    assert parts[0] == Found(PASSAGES)
    assert all(isinstance(part, Text) for part in parts[1:-2])
    assert "".join(part.text for part in texts(parts)) == one(parts).text == "5 crowns [1]"
    assert parts[-2] == one(parts)


def test_the_end_counts_tokens_and_says_why(tokenizer: Any) -> None:
    pipeline = Pipeline(tokenizer)
    end = done(ask(pipeline))
    assert end.answers[0].finish_reason == "length"
    assert end.prompt_tokens == len(pipeline.generated[0].token_ids)
    assert end.completion_tokens == len("5 crowns [1]")
    assert set(end.seconds) == {"embed", "search", "generate"}
    assert "first_token" in done(ask(pipeline, replace(QUESTION, stream=True))).seconds


def test_the_retriever_is_asked_as_the_question_says(tokenizer: Any) -> None:
    pipeline = Pipeline(tokenizer)
    ask(pipeline)
    (asked,) = pipeline.retrieved
    assert asked == (
        "What does a trailer cost on the ferry?",
        SNAPSHOT,
        Principal("acme", ("staff",)),
        RetrievalConfig(top_k=2, candidates=5),
    )


def test_top_k_of_the_request_widens_the_candidates(tokenizer: Any) -> None:
    pipeline = Pipeline(tokenizer)
    ask(pipeline, replace(QUESTION, top_k=9))
    settings = pipeline.retrieved[0][-1]
    assert (settings.top_k, settings.candidates) == (9, 9)


def test_the_engine_gets_adapter_and_sampling(tokenizer: Any) -> None:
    pipeline = Pipeline(tokenizer)
    ask(pipeline)
    (sent,) = pipeline.generated
    assert (sent.request_id, sent.adapter, sent.sampling) == ("r1", "a" * 64, QUESTION.sampling)
    assert "[1] Tariff\nA trailer costs 5 crowns.\n\n[2] Tariff\n" in tokenizer.decode(sent.token_ids)


def test_marks_become_citations_of_given_passages(tokenizer: Any) -> None:
    end = one(ask(Pipeline(tokenizer, "5 [2], not 6 [3] [1]")))
    assert [(c.number, c.passage.doc_id) for c in end.citations] == [(2, "d1"), (1, "d0")]
    assert [end.text[c.start : c.end] for c in end.citations] == ["[2]", "[1]"]


def test_marks_of_passages_that_did_not_fit_cite_nothing(tokenizer: Any) -> None:
    tight = replace(QUESTION, resolved=replace(QUESTION.resolved, prompt=PromptConfig(passage_tokens=40)))
    parts = ask(Pipeline(tokenizer, "5 [1] [2]"), tight)
    assert parts[0] == Found(PASSAGES[:1])
    assert [c.number for c in one(parts).citations] == [1]


def test_nothing_over_the_floor_declines_without_generating(tokenizer: Any) -> None:
    pipeline = Pipeline(tokenizer, passages=())
    parts = ask(pipeline)
    decline = Answer(PROMPT.decline, "stop", (), True)
    end = Done((decline,), 0, 0, 0, {"embed": 0.1, "search": 0.2})
    assert parts == [Found(()), Text(PROMPT.decline), decline, end]
    assert end.declined
    assert pipeline.generated == []


@pytest.mark.parametrize(("said", "declined"), [(PROMPT.decline, True), ("5 crowns", False)])
def test_a_generated_decline_is_known(tokenizer: Any, said: str, declined: bool) -> None:
    assert done(ask(Pipeline(tokenizer, said))).declined is declined


def test_a_closed_book_answer_asks_no_retriever(tokenizer: Any) -> None:
    pipeline = Pipeline(tokenizer)
    parts = ask(pipeline, replace(QUESTION, snapshot=None))
    assert pipeline.retrieved == []
    assert parts[0] == Found(())
    assert one(parts).citations == ()
    assert PROMPT.system_closed in tokenizer.decode(pipeline.generated[0].token_ids)


def test_a_prompt_that_is_too_long_is_refused_before_anything_is_said(tokenizer: Any) -> None:
    pipeline = Pipeline(tokenizer)
    with pytest.raises(ContextTooLong):
        ask(pipeline, context=200)
    assert pipeline.generated == []


def test_half_a_character_at_the_end_is_still_told(tokenizer: Any) -> None:
    pipeline = Pipeline(tokenizer)

    async def generate(request: GenerateRequest) -> AsyncIterator[Delta]:
        yield Delta(tuple(tokenizer.encode("ok 🚚", add_special_tokens=False)[:-1]), "length")

    pipeline.generate = generate  # type: ignore[method-assign]
    parts = ask(pipeline)
    assert "".join(part.text for part in texts(parts)) == one(parts).text
    assert one(parts).text.startswith("ok \ufffd")


def test_a_reader_that_leaves_ends_the_generation(tokenizer: Any) -> None:
    pipeline = Pipeline(tokenizer, "a long answer")

    async def run() -> None:
        stream = pipeline.parts()
        async for part in stream:
            if isinstance(part, Text):
                break
        await stream.aclose()  # type: ignore[attr-defined]
        for _ in range(10):
            await asyncio.sleep(0)
        assert pipeline.closed == 1

    asyncio.run(run())


# -- several answers, stop strings, log probabilities


class Scripted(Pipeline):
    """Generates `deltas`, whatever is asked."""

    def __init__(self, tokenizer: Any, deltas: Sequence[Delta], passages: Sequence[Passage] = PASSAGES) -> None:
        super().__init__(tokenizer, passages=passages)
        self.deltas = deltas

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Delta]:
        self.generated.append(request)
        for delta in self.deltas:
            yield delta


def ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(tokenizer.encode(text, add_special_tokens=False))


def asking(**sampling: Any) -> Question:
    return replace(QUESTION, sampling=Sampling(32, **sampling))


def test_several_answers_keep_apart_and_come_in_order(tokenizer: Any) -> None:
    deltas = [
        Delta(ids(tokenizer, "six "), index=1, cached_tokens=16),
        Delta(ids(tokenizer, "five"), index=0, cached_tokens=16),
        Delta(ids(tokenizer, "[2]"), "stop", index=1),
        Delta((), "length", index=0),
    ]
    parts = ask(Scripted(tokenizer, deltas), asking(n=2, temperature=1.0))
    end = done(parts)
    assert [(a.index, a.text, a.finish_reason) for a in end.answers] == [(0, "five", "length"), (1, "six [2]", "stop")]
    assert [part.index for part in parts if isinstance(part, Answer)] == [1, 0]
    assert ["".join(part.text for part in texts(parts, index)) for index in (0, 1)] == ["five", "six [2]"]
    assert [c.passage.doc_id for c in end.answers[1].citations] == ["d1"]
    assert end.answers[0].citations == ()
    assert (end.completion_tokens, end.cached_tokens) == (11, 16)


def test_each_of_several_answers_is_a_decline_of_its_own(tokenizer: Any) -> None:
    parts = ask(Scripted(tokenizer, [], passages=()), asking(n=3))
    assert [a.text for a in done(parts).answers] == [PROMPT.decline] * 3
    some = [Delta(ids(tokenizer, PROMPT.decline), "stop"), Delta(ids(tokenizer, "5 crowns"), "stop", index=1)]
    assert not done(ask(Scripted(tokenizer, some), asking(n=2))).declined


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_is_cut_and_never_shown(tokenizer: Any, stream: bool) -> None:
    made = ids(tokenizer, "5 crowns [1] END [2]")
    deltas = [Delta((token,)) for token in made] if stream else [Delta(made)]
    parts = ask(Scripted(tokenizer, [*deltas, Delta((), "stop")]), asking(stop=("END", "never")))
    assert one(parts).text == "".join(part.text for part in texts(parts)) == "5 crowns [1] "
    assert [c.number for c in one(parts).citations] == [1]
    assert done(parts).completion_tokens == len(made)


def test_what_only_began_like_a_stop_string_is_shown_at_the_end(tokenizer: Any) -> None:
    deltas = [*(Delta((token,)) for token in ids(tokenizer, "the EN")), Delta((), "length")]
    assert one(ask(Scripted(tokenizer, deltas), asking(stop=("END",)))).text == "the EN"


def logprob(token: int) -> TokenLogprob:
    return TokenLogprob(token, -token / 1000, ((token, -token / 1000),))


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_go_with_the_text_that_is_shown(tokenizer: Any, stream: bool) -> None:
    made = ids(tokenizer, "5 🚚ENDx")
    told = [logprob(token) for token in made]
    steps = zip(made, told, strict=True)
    deltas = [Delta((t,), logprobs=(p,)) for t, p in steps] if stream else [Delta(made, logprobs=tuple(told))]
    parts = ask(Scripted(tokenizer, [*deltas, Delta((), "stop")]), asking(stop=("END",), logprobs=1))
    shown = told[: len("5 🚚".encode())]
    assert list(one(parts).logprobs) == shown
    assert [each for part in texts(parts) for each in part.logprobs] == shown
    if stream:
        assert [(part.text, len(part.logprobs)) for part in texts(parts)] == [("5", 1), (" ", 1), ("🚚", 4)]


def test_log_probabilities_of_what_was_held_back_come_at_the_end(tokenizer: Any) -> None:
    made = ids(tokenizer, "the EN")
    deltas = [*(Delta((token,), logprobs=(logprob(token),)) for token in made), Delta((), "length")]
    parts = ask(Scripted(tokenizer, deltas), asking(stop=("END",), logprobs=0))
    assert [each.token for part in texts(parts) for each in part.logprobs] == list(made)
    assert texts(parts)[-1] == Text("EN", 0, tuple(logprob(token) for token in made[-2:]))


def test_the_engine_learns_tenant_and_deadline(tokenizer: Any) -> None:
    pipeline = Pipeline(tokenizer)
    ask(pipeline, replace(QUESTION, deadline_s=7.0))
    assert (pipeline.generated[0].tenant, pipeline.generated[0].deadline_s) == ("acme", 7.0)
