import pytest

from cluster.errors import BadInput
from retrieval.query import is_follow_up, search_query


def conversation(*turns: str) -> list[dict[str, str]]:
    messages = [{"role": "system", "content": "Answer."}]
    for turn in turns:
        messages += [{"role": "user", "content": turn}, {"role": "assistant", "content": "An answer about pewter."}]
    return messages[:-1]


def test_first_question_stands_alone_however_short() -> None:
    assert search_query(conversation("And it?")) == "And it?"


def test_follow_up_brings_the_turns_it_leans_on_and_no_answers() -> None:
    first = "Through which piece can the fire pump be coupled to the bilge system?"
    assert search_query(
        conversation("Who feeds the ship's cat Bosun?", first, "How long does it take to fit?", "How many people?")
    ) == (f"{first}\nHow long does it take to fit?\nHow many people?")


def test_a_full_question_is_searched_for_alone() -> None:
    last = "Which form does a shipper send for dangerous freight on R5?"
    assert search_query(conversation("What does a lorry cost?", last)) == last


@pytest.mark.parametrize(
    "turn",
    ["And at Tolloway?", "What about the reserve vessel Dunlin in winter weather?", "Which one has priority?",
     "Còn ở Tolloway thì sao?", "Khách mua vé đó qua đại lý Aldmoor được hoàn bao nhiêu?"],
)  # fmt: skip
def test_follow_ups(turn: str) -> None:
    assert is_follow_up(turn)


def test_no_user_message() -> None:
    with pytest.raises(BadInput, match="no user message"):
        search_query([{"role": "system", "content": "x"}])
