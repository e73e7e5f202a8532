import pytest

from retrieval.rewrite import LONGEST, TURNS, rewriting, stand_alone

CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What does a trailer cost on the ferry?"},
    {"role": "assistant", "content": "Five crowns."},
    {"role": "user", "content": "And for residents of Henn?"},
]


def test_the_generator_is_shown_the_conversation_and_asked_for_the_question() -> None:
    messages = rewriting(CONVERSATION)
    assert messages is not None
    system, user = messages
    assert system["role"] == "system"
    assert user["content"] == (
        "User: What does a trailer cost on the ferry?\nAssistant: Five crowns.\n\n"
        "Last question: And for residents of Henn?\nQuestion that stands alone:"
    )


def test_a_question_that_stands_alone_is_not_rewritten() -> None:
    assert rewriting(CONVERSATION[:2]) is None
    last = {"role": "user", "content": "Which form does a shipper send for dangerous freight on R5?"}
    assert rewriting([*CONVERSATION[:-1], last]) is None
    assert rewriting([CONVERSATION[0], CONVERSATION[-1]]) is None
    assert rewriting([]) is None


def test_long_histories_are_cut() -> None:
    long = [
        {"role": role, "content": f"{number} " + "x" * 5000} for number in range(20) for role in ("user", "assistant")
    ]
    messages = rewriting([*long, CONVERSATION[-1]])
    assert messages is not None
    assert messages[1]["content"].count("\nAssistant: ") + messages[1]["content"].count("User: ") == TURNS
    assert len(messages[1]["content"]) < (TURNS + 1) * (LONGEST + 50)


@pytest.mark.parametrize(
    ("answer", "question"),
    [
        ("What does a trailer cost for residents of Henn?", "What does a trailer cost for residents of Henn?"),
        (
            '\n "What does the ferry cost for residents of Henn?"\nIt costs',
            "What does the ferry cost for residents of Henn?",
        ),
        ("Question: What does a trailer cost for residents?", "What does a trailer cost for residents?"),
        ("And for residents of Henn?", None),
        ("Five crowns.", None),
        ("A trailer costs five crowns on the ferry.", None),
        ("What is the largest whale in the southern ocean?", None),
        ("What?", None),
        ("", None),
        ("What does a trailer cost " * 40 + "?", None),
    ],
)
def test_only_a_question_about_this_conversation_is_taken(answer: str, question: str | None) -> None:
    assert stand_alone(answer, CONVERSATION) == question
