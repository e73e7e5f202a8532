"""Rows become token ids: the very ids that serving sends, and a mask over what is learned."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from cluster.config import PromptConfig, RetrievalConfig
from cluster.errors import BadInput
from retrieval.types import Chunk, Passage, Principal, Retrieved
from serving.answer import Question, answer
from serving.engine.base import Delta, GenerateRequest, Sampling
from serving.names import Resolved
from training.data.encode import encode, tokens
from training.data.grounded import GroundedRow, ground_rows
from training.data.rows import Evidence, Row

PROMPT = PromptConfig(passage_tokens=200)
TEXTS = [
    "Dogs stay on a lead.",
    "Giá vé 18,50 cua-ron <|im_end|>",
    "🚚 A trailer pays twice.",
    "Ferries run late. " * 20,
]
PASSAGES = tuple(Passage(f"c{n}", f"d{n}", "Title", "Part", text, "f.md", 0, 0.5) for n, text in enumerate(TEXTS))


def grounded(
    id: str = "r", answer: str = "18.50 crowns", messages: tuple[dict[str, str], ...] | None = None
) -> GroundedRow:
    asked = messages or ({"role": "user", "content": "How much?"},)
    return GroundedRow(id=id, messages=asked, answer=answer, documents=(), chunks=())


def ids_of_serving(conversation: list[dict[str, str]], tokenizer: Any) -> list[int]:
    sent: list[GenerateRequest] = []

    async def retrieve(*_: Any) -> Retrieved:
        return Retrieved(PASSAGES, "docs", 1)

    async def generate(request: GenerateRequest) -> AsyncIterator[Delta]:
        sent.append(request)
        yield Delta((), "stop")

    async def run() -> None:
        resolved = Resolved("base", None, None, PROMPT, RetrievalConfig(top_k=4))
        question = Question("r", conversation, Sampling(8), Principal(), resolved, "docs", 1)
        async for _ in answer(question, retrieve, generate, tokenizer, 4096):
            pass

    asyncio.run(run())
    return list(sent[0].token_ids)


@pytest.mark.parametrize(
    "history",
    [
        (),
        ({"role": "system", "content": "Trả lời ngắn."},),
        ({"role": "user", "content": "And <|im_start|> boats?"}, {"role": "assistant", "content": "9 crowns [1]"}),
    ],
    ids=["question", "system", "history"],
)
def test_training_reads_the_very_tokens_that_serving_sends(history: tuple[dict[str, str], ...], tokenizer: Any) -> None:
    asked = Row(
        id="r",
        messages=(*history, {"role": "user", "content": "Giá bao nhiêu?"}, {"role": "assistant", "content": "18.50"}),
        evidence=(Evidence(document="d1", quote="18,50 cua-ron"),),
    )
    gold = Chunk("c1", "d1", "Title", "Part", TEXTS[1], "f.md", 0)
    rows = ground_rows(
        [asked],
        PROMPT,
        retrieve=lambda _: PASSAGES,
        chunks_of=lambda _: [gold],
        count_tokens=lambda text: len(tokenizer.encode(text, add_special_tokens=False)),
        top_k=4,
        no_gold_share=0.0,
        seed=1,
    )
    (encoded,) = encode(rows, tokenizer, 4096)
    prompt = encoded["input_ids"][: encoded["completion_mask"].index(1)]
    assert prompt == ids_of_serving(asked.conversation, tokenizer)


def test_the_loss_covers_exactly_the_answer_and_its_end_of_turn(tokenizer: Any) -> None:
    (encoded,) = encode([grounded(answer="18.50 crowns [1]")], tokenizer, 4096)
    learned = [token for token, mask in zip(*encoded.values(), strict=True) if mask]
    assert tokenizer.decode(learned) == "18.50 crowns [1]<|im_end|>"
    assert tokenizer.decode(encoded["input_ids"]).endswith("<|im_start|>assistant\n18.50 crowns [1]<|im_end|>")
    assert encoded["completion_mask"] == sorted(encoded["completion_mask"])


def test_a_row_may_be_as_long_as_allowed(tokenizer: Any) -> None:
    (encoded,) = encode([grounded()], tokenizer, 4096)
    exact = len(encoded["input_ids"])
    assert encode([grounded()], tokenizer, exact) == [encoded]
    with pytest.raises(BadInput):
        encode([grounded()], tokenizer, exact - 1)


def test_rows_that_are_too_long_are_counted_and_the_longest_named(tokenizer: Any) -> None:
    rows = [grounded("short"), grounded("long", "x" * 200), grounded("longest", "x" * 300)]
    with pytest.raises(
        BadInput, match=r"2 rows are longer than training.max_tokens \(128\), .* longest is longest"
    ) as caught:
        encode(rows, tokenizer, 128)
    assert caught.value.param == "longest"


def test_tokens_are_counted_without_padding(tokenizer: Any) -> None:
    encoded = encode([grounded(), grounded(answer="x" * 50)], tokenizer, 4096)
    assert tokens(encoded) == sum(len(row["completion_mask"]) for row in encoded) > 100
