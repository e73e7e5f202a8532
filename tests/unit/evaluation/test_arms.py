"""The four arms: what is asked, how a reply is judged, what is averaged."""

import math
import threading
from typing import Any

import pytest

from evaluation.arms import Arm, Score, arms, judge, run, score
from serving.client import Cited, Client, Reply
from training.data.rows import Evidence, Row

ARM = Arm("tuned+RAG", "support", True)


def row(id: str = "r", reference: str = "5 crowns", *documents: str) -> Row:
    return Row(
        id=id,
        messages=({"role": "user", "content": f"{id}?"}, {"role": "assistant", "content": reference}),
        evidence=tuple(Evidence(document=document, quote="q") for document in documents),
    )


def reply(text: str, *cited: str, declined: bool = False) -> Reply:
    notes = tuple(Cited(number, doc, f"{doc}.md") for number, doc in enumerate(cited, 1))
    return Reply(text, "support@1", "stop", notes, (), declined, None)


class FakeClient(Client):
    """Answers with the question; keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.together = threading.Barrier(2)

    def ask(self, model: str, messages: Any, **options: Any) -> Reply:
        self.together.wait(timeout=30)
        self.asked.append((model, options))
        return reply(messages[-1]["content"])


def test_the_four_arms_differ_in_model_and_retrieval() -> None:
    made = [(arm.name, arm.model, arm.rag) for arm in arms("base", "base:shop", "support")]
    assert made == [
        ("base", "base", False),
        ("base+RAG", "base", True),
        ("tuned", "base:shop", False),
        ("tuned+RAG", "support", True),
    ]


def test_every_question_is_asked_and_answers_come_in_order() -> None:
    client, seen = FakeClient(), []
    rows = [row(str(number)) for number in range(6)]
    answered = run(client, ARM, rows, max_tokens=7, concurrency=2, on_answer=lambda: seen.append(1))
    assert [(a.id, a.answer) for a in answered] == [(str(n), f"{n}?") for n in range(6)]
    assert client.asked == [("support", {"max_tokens": 7, "rag": {"enabled": True}})] * 6
    assert len(seen) == 6


def test_a_right_answer_with_the_right_source_scores_full() -> None:
    judged = judge("base", row("r", "5 crowns", "fees"), reply("5 crowns [1] [1]", "fees", "fees"))
    assert (judged.exact_match, judged.token_f1, judged.citation_hit) == (1.0, 1.0, 1.0)
    assert judged.cited == ("fees",)


def test_a_declined_answer_scores_nothing() -> None:
    judged = judge("base", row("r", "5 crowns", "fees"), reply("5 crowns", "fees", declined=True))
    assert (judged.exact_match, judged.token_f1, judged.citation_hit) == (0.0, 0.0, 0.0)


def test_an_unanswerable_question_has_only_its_decline() -> None:
    judged = judge("base", row("r", ""), reply("", declined=False))
    assert (judged.exact_match, judged.token_f1, judged.citation_hit, judged.declined) == (0.0, 0.0, 0.0, False)


def test_answerable_and_unanswerable_questions_are_averaged_apart() -> None:
    rows = [row("a", "5 crowns", "fees"), row("b", "5 crowns", "fees"), row("c", ""), row("d", ""), row("e", "")]
    replies = [
        reply("5 crowns", "fees"),
        reply("No.", declined=True),
        reply("No.", declined=True),
        reply("7 crowns"),
        reply("8"),
    ]
    answered = [judge(ARM.name, asked, said) for asked, said in zip(rows, replies, strict=True)]
    assert score(ARM, answered, rows) == Score(
        "tuned+RAG", "support", 5, 0.5, 0.5, 0.5, abstention=pytest.approx(1 / 3), false_abstention=0.5
    )


def test_a_mean_over_no_questions_is_not_a_number() -> None:
    rows = [row("a", "5 crowns", "fees")]
    assert math.isnan(score(ARM, [judge(ARM.name, rows[0], reply("5"))], rows).abstention)


def test_answers_and_rows_must_belong_together() -> None:
    with pytest.raises(ValueError, match="longer"):
        score(ARM, [], [row("a", "5 crowns", "fees")])
