"""Rows become token ids: the very ids that serving sends, and a mask over what is learned."""

import asyncio
import copy
from collections.abc import AsyncIterator, Iterable
from typing import Any

import pytest

from cluster.config import PromptConfig, RetrievalConfig
from cluster.errors import BadInput
from retrieval.types import Chunk, Passage, Principal, Retrieved
from serving.answer import Question, answer
from serving.engine.base import Delta, GenerateRequest, Sampling
from serving.names import Resolved
from training.data.encode import check_template, encode
from training.data.examples import Example
from training.data.grounded import ground_rows
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
) -> Example:
    asked = messages or ({"role": "user", "content": "How much?"},)
    return Example(id=id, messages=asked, answer=answer, documents=(), chunks=())


def sequences(rows: Iterable[Example], tokenizer: Any, max_tokens: int) -> list[Any]:
    return encode(rows, tokenizer, max_tokens).sequences


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
    (encoded,) = sequences(rows, tokenizer, 4096)
    prompt = encoded["input_ids"][: encoded["completion_mask"].index(1)]
    assert prompt == ids_of_serving(asked.conversation, tokenizer)


def test_the_loss_covers_exactly_the_answer_and_its_end_of_turn(tokenizer: Any) -> None:
    (encoded,) = sequences([grounded(answer="18.50 crowns [1]")], tokenizer, 4096)
    learned = [token for token, mask in zip(*encoded.values(), strict=True) if mask]
    assert tokenizer.decode(learned) == "18.50 crowns [1]<|im_end|>"
    assert tokenizer.decode(encoded["input_ids"]).endswith("<|im_start|>assistant\n18.50 crowns [1]<|im_end|>")
    assert encoded["completion_mask"] == sorted(encoded["completion_mask"])


def test_a_row_may_be_as_long_as_allowed(tokenizer: Any) -> None:
    (encoded,) = sequences([grounded()], tokenizer, 4096)
    exact = len(encoded["input_ids"])
    assert sequences([grounded()], tokenizer, exact) == [encoded]
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
    made = encode([grounded(), grounded(answer="x" * 50)], tokenizer, 4096)
    assert made.tokens == sum(len(sequence["completion_mask"]) for sequence in made.sequences) > 100


TALK = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "uno"},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "due"},
    {"role": "user", "content": "Three?"},
)


def talk(**facts: Any) -> Example:
    return Example(id="talk", messages=TALK, answer="tre", **facts)


def learned(sequence: Any, tokenizer: Any) -> str:
    return str(tokenizer.decode([t for t, m in zip(*sequence.values(), strict=True) if m]))


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({}, "tre<|im_end|>"),
        ({"turns": (2, 4)}, "uno<|im_end|>due<|im_end|>tre<|im_end|>"),
        ({"turns": (4,), "learned": False}, "due<|im_end|>"),
    ],
)
def test_the_turns_that_are_asked_for_are_learned_in_one_sequence(
    facts: dict[str, Any], said: str, tokenizer: Any
) -> None:
    (sequence,) = sequences([talk(**facts)], tokenizer, 4096)
    assert learned(sequence, tokenizer) == said


FORGETFUL = (
    "{% for m in messages %}{% if m.role == 'assistant' and not loop.last %}<|im_start|>assistant\n…<|im_end|>\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""A template that leaves out what earlier answers said, as reasoning models do with their thoughts."""


def test_turns_that_the_template_rewrites_become_sequences_of_their_own(tokenizer: Any) -> None:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = FORGETFUL
    made = sequences([talk(turns=(2, 4))], changed, 4096)
    assert sorted(learned(sequence, tokenizer) for sequence in made) == [
        f"{w}<|im_end|>" for w in ("due", "tre", "uno")
    ]
    for sequence in made:
        assert sequence["completion_mask"] == sorted(sequence["completion_mask"])


def test_too_long_drops_or_cuts_the_oldest_turns_and_keeps_the_answer(tokenizer: Any) -> None:
    (whole,) = sequences([talk(turns=(2, 4))], tokenizer, 4096)
    limit = len(whole["input_ids"]) - 1
    assert encode([talk(), grounded()], tokenizer, limit, "drop").dropped == 1
    made = encode([talk(turns=(2, 4))], tokenizer, limit, "truncate")
    (cut,) = made.sequences
    assert (made.truncated, made.dropped) == (1, 0)
    assert len(cut["input_ids"]) <= limit
    text = tokenizer.decode(cut["input_ids"])
    assert "Be brief." in text and "One?" not in text and "Three?" in text
    assert learned(cut, tokenizer) == "due<|im_end|>tre<|im_end|>"


def test_a_question_that_is_too_long_by_itself_is_dropped_even_when_truncating(tokenizer: Any) -> None:
    made = encode(
        [grounded(messages=({"role": "user", "content": "x" * 200},)), grounded()], tokenizer, 100, "truncate"
    )
    assert (made.dropped, made.ids) == (1, ["r"])


def test_nothing_to_learn_is_refused(tokenizer: Any) -> None:
    with pytest.raises(BadInput, match="no row has anything to learn"):
        encode([talk(learned=False)], tokenizer, 4096)
    with pytest.raises(BadInput, match=r"all 1 are longer than training.max_tokens \(32\)"):
        encode([talk()], tokenizer, 32, "drop")


def test_raw_text_is_learned_whole_in_pieces(tokenizer: Any) -> None:
    text = "Ferries run late. " * 10
    made = sequences([Example(id="t", text=text)], tokenizer, 64)
    assert [len(piece["input_ids"]) for piece in made] == [64, 64, 53]
    assert all(piece["completion_mask"] == [0] + [1] * (len(piece["input_ids"]) - 1) for piece in made)
    joined = [token for piece in made for token in piece["input_ids"]]
    assert tokenizer.decode(joined) == text + "<|im_end|>"


HEADLESS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
INST = "{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]{% else %}{{ m.content }}{% endif %}{% endfor %}"


def test_a_template_without_a_generation_marker_is_refused_by_name(tokenizer: Any) -> None:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = HEADLESS
    with pytest.raises(BadInput, match=r"no generation marker: it writes '<\|im_start\|>assistant' before an answer"):
        encode([grounded()], changed, 4096)
    changed.chat_template = INST
    check_template(changed)
