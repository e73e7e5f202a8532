"""Training rows that give held-out questions away: which are found, which honest ones are not, and what is said."""

from pathlib import Path
from typing import Any

import pytest

from cluster.errors import BadInput
from training.data.leakage import Leak, guard, leaks
from training.data.rows import Evidence, Message, Row, Text, read_rows

TRADE = Path(__file__).parents[4] / "examples/corvane"
QUESTION = "What does a caravan of seven metres cost on R1?"


def row(name: str, *said: str, documents: tuple[str, ...] | None = None) -> Row:
    """A conversation whose user turns are `said`; every answer is the same."""
    messages: list[Message] = []
    for question in said:
        messages += [Message(role="user", content=question), Message(role="assistant", content="5 crowns")]
    evidence: Any = None if documents is None else [Evidence(document=document, quote="q") for document in documents]
    return Row(id=name, messages=tuple(messages), evidence=evidence)


def reasons(train: Row | Text, heldout: Row) -> list[str]:
    return [leak.reason for leak in leaks([train], [heldout])]


@pytest.mark.parametrize(
    ("train", "heldout", "expected"),
    [
        ((QUESTION,), (QUESTION,), ["same question"]),
        (("what does a caravan of seven metres cost on r1",), (QUESTION,), ["same question"]),
        (("What does a\u00a0caravan of seven \uff4detres cost on R1??",), (QUESTION,), ["same question"]),
        (("Đi b\u1ed9 m\u1ea5t bao lâu?",), ("Đi b\u006f\u0323\u0302 m\u1ea5t bao lâu?",), ["same question"]),
        (("???",), ("???",), ["same question"]),
        (("And what does a caravan of seven metres cost on R1?",), (QUESTION,), ["near copy"]),
        (("What does a caravan of seven metres cost on R4?",), (QUESTION,), []),
        (("What does a bicycle cost?",), (QUESTION,), []),
        # A question that stands by itself is looked for in every turn.
        (("Hello!", QUESTION, "And a trailer?"), (QUESTION,), ["same question"]),
        # One that follows others is compared together with them.
        (("What is R4?", "And for a trailer?"), ("What does R1 cost?", "And for a trailer?"), []),
        (("What does R1 cost?", "And for a trailer?"), ("What does R1 cost?", "And for a trailer?"), ["same question"]),
        (("What does R1 cost?", "And for a trailer?", "And for a dog?"), ("What does R1 cost?", "And for a trailer?"),
         ["same question"]),
        (("What does R1 cost?",), ("What does R1 cost?", "And for a trailer?"), []),
        ((QUESTION, "And for a trailer?"), (QUESTION, "And for a canoe?"), []),
        ((QUESTION, "And for a small trailer?"), (QUESTION, "And for a small trailers?"), ["near copy"]),
    ],
)  # fmt: skip
def test_questions(train: tuple[str, ...], heldout: tuple[str, ...], expected: list[str]) -> None:
    assert reasons(row("t", *train), row("q", *heldout)) == expected


@pytest.mark.parametrize(
    ("text", "question", "expected"),
    [
        (f"Guests ask: {QUESTION.upper()} Five crowns.", QUESTION, ["same question"]),
        ("What does a caravan of seven metres cost on R12?", QUESTION, []),
        ("Read on. Why not? Because.", "Why not?", []),
        ("Whats does a caravan of seven metres cost on R1?", QUESTION, ["near copy"]),
    ],
)
def test_raw_text_that_holds_a_question(text: str, question: str, expected: list[str]) -> None:
    assert reasons(Text(id="t", text=text), row("q", question)) == expected


def test_gold_documents_are_those_a_question_is_answerable_from() -> None:
    heldout = row("q", QUESTION, documents=("tariff", "ships"))
    train = [
        row("t1", "Which colour?", documents=("ships",)),
        row("t2", "Which day?", documents=("days",)),
        Text(id="t3", text="Ships.", document="tariff"),
    ]
    assert leaks(train, [heldout]) == [Leak("t1", "q", "gold document"), Leak("t3", "q", "gold document")]


def test_a_question_without_an_answer_counts_for_copies_only() -> None:
    heldout = row("q", QUESTION, documents=())
    assert not heldout.answerable
    assert reasons(row("t", QUESTION, documents=()), heldout) == ["same question"]
    assert reasons(row("t", "Which colour?", documents=("tariff",)), heldout) == []


def test_a_pair_is_told_once_in_the_order_of_the_rows() -> None:
    heldout = [row("q1", "Which?", documents=("tariff",)), row("q2", QUESTION, documents=("tariff",))]
    train = [row("t1", QUESTION, documents=("tariff",)), row("t2", QUESTION)]
    assert leaks(train, heldout) == [
        Leak("t1", "q1", "gold document"),
        Leak("t1", "q2", "same question"),
        Leak("t2", "q2", "same question"),
    ]


def test_the_guard_refuses_or_drops() -> None:
    heldout = [row("q", QUESTION, documents=("tariff",))]
    clean = row("t0", "Which colour?")
    train = [
        clean,
        *(row(f"t{n}", f"Question {n}?", documents=("tariff",)) for n in range(1, 13)),
        row("t13", QUESTION),
    ]
    with pytest.raises(BadInput) as caught:
        guard(train, heldout, "refuse")
    lines = str(caught.value).splitlines()
    assert lines[0] == (
        "row t1: uses a document that answers the held-out question q; "
        "take it out of data.train, or set data.leakage=drop"
    )
    assert (len(lines), lines[10]) == (11, "… and 3 more rows; `metier data check --all` lists all of them")
    both = [row("t14", QUESTION, documents=("tariff",))]
    with pytest.raises(BadInput, match="row t14: asks the held-out question q2"):
        guard(both, [row("q1", "Which?", documents=("tariff",)), row("q2", QUESTION)], "refuse")
    assert guard(train, heldout, "drop") == [clean]
    assert guard([clean], heldout, "refuse") == [clean]
    assert guard(train, [], "refuse") == train


@pytest.mark.parametrize("name", ["heldout", "heldout.vi"])
def test_the_sample_trade_is_clean_and_would_not_be_with_its_questions(name: str) -> None:
    train, heldout = read_rows([TRADE / "train.jsonl"]), read_rows([TRADE / f"{name}.jsonl"])
    assert leaks(train, heldout) == []
    found = leaks([*train, heldout[0]], heldout)
    assert found[0] == Leak(heldout[0].id, heldout[0].id, "same question")
