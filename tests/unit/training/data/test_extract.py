"""Sentences become questions: which pattern asks what, in English and Vietnamese, and what is left out."""

from typing import Any

import pytest

from retrieval.types import Chunk
from training.data.extract import pairs
from training.data.grounded import holds
from training.data.pairs import Pair, asked, distinct, flaw, standing_alone
from training.data.sentences import content, language, sentences


def chunk(text: str, title: str = "Harbour handbook", doc_id: str = "harbour", heading: str = "") -> Chunk:
    return Chunk(f"{doc_id}-{abs(hash(text))}", doc_id, title, heading, text, 0, f"{doc_id}.md")


def one(text: str, **place: str) -> Pair:
    (made,) = pairs([chunk(text, **place)])
    assert flaw(made) is None
    return made


@pytest.mark.parametrize(
    ("sentence", "question", "answer"),
    [
        ("A tent pitch by the lake costs 12.50 francs.", None, None),
        ("K2: a pitch by the lake costs 12.50 euros for each night.", "how much does a pitch by the lake cost for each night?", "12.50 euros"),
        ("The repair of the east wall cost 4,000 euros.", "how much did the repair of the east wall cost?", "4,000 euros"),
        ("The working pressure is 185 bar, and the valve opens at 210 bar.", "what is the working pressure?", "185 bar"),
        ("The boat shed has 12 wide berths on the north side.", "how many wide berths does the boat shed have on the north side?", "12 wide berths"),
        ("The gate on the quay is 2.5 metres wide.", "how wide is the gate on the quay?", "2.5 metres"),
        ("Filters of the pump are changed every 45 days.", "how often are filters of the pump changed?", "every 45 days"),
        ("Lost keys are kept for 60 days in the office.", "for how long are lost keys kept?", "60 days"),
        ("The weekly test is recorded on Form E-28.", "on which form is the weekly test recorded?", "Form E-28"),
        ("AL-31 means that the heading input is lost.", "what does AL-31 mean?", "the heading input is lost"),
        ("The deck closes eight minutes before departure.", "when does the deck close?", "eight minutes before departure"),
        ("A hirer must report any damage within 24 hours.", "within what time must a hirer report any damage?", "24 hours"),
        ("Owner: chief engineer.", 'what is given as "owner"?', "chief engineer"),
        ("At Norhaven the tug stands by from 06:45 in winter.", "what belongs in the gap: At Norhaven the tug stands by from ____ in winter?", "06:45"),
    ],
)  # fmt: skip
def test_english(sentence: str, question: str | None, answer: str | None) -> None:
    made = list(pairs([chunk(sentence, heading="The rules of the harbour and of the quay")]))
    assert [(pair.question, pair.answer) for pair in made] == ([(question, answer)] if question else [])
    assert all(pair.quote == sentence for pair in made)


@pytest.mark.parametrize(
    ("sentence", "question", "answer"),
    [
        ("Cửa nhà chờ mở 70 phút trước giờ tàu chạy.", "cửa nhà chờ mở bao nhiêu phút trước giờ tàu chạy?", "70 phút"),
        ("Thuyền phó ghi giờ đóng mở vào Mẫu V-08.", "thuyền phó ghi giờ đóng mở vào mẫu nào?", "Mẫu V-08"),
        ("Cửa được kéo kín bằng tời tay lúc 23 giờ 41.", "cửa được kéo kín bằng tời tay lúc mấy giờ?", "23 giờ 41"),
        (
            "Tàu rời cảng chính từ ngày 4 tháng 9 năm 2031.",
            "tàu rời cảng chính từ ngày nào?",
            "ngày 4 tháng 9 năm 2031",
        ),
        ("Phụ trách: trưởng cảng.", 'mục "Phụ trách" ghi gì?', "trưởng cảng"),
    ],
)
def test_vietnamese(sentence: str, question: str, answer: str) -> None:
    made = one(sentence, title="Quy trình lên tàu")
    assert (made.question, made.answer, made.language) == (question, answer, "vi")


@pytest.mark.parametrize(
    "sentence",
    [
        "It closes 25 minutes before departure.",  # which?
        "This costs 5 euros in the summer months.",
        "The pump runs.",
        "| fee | 5 euros |",
        "Cửa này chỉ được mở trong 5 phút mỗi ngày.",
        "Los billetes cuestan 5 euros cada viaje normal.",
    ],
)
def test_what_cannot_be_asked_honestly_is_left_out(sentence: str) -> None:
    assert not list(pairs([chunk(sentence)]))


def test_sentences_are_pieces_of_the_text() -> None:
    text = "Open from 7.30 a.m. daily. The fee, e.g. for St. Mary Quay, is due.\nSee No. 4 for more.\n\n- first item\n- second\n\n```\ncode. Here.\n```\n| a | b. |"
    made = sentences(text)
    assert made == [
        "Open from 7.30 a.m. daily.",
        "The fee, e.g. for St. Mary Quay, is due.",
        "See No. 4 for more.",
        "first item",
        "second",
    ]
    assert all(holds(text, sentence) for sentence in made)


def test_languages_and_stems() -> None:
    assert language("The boat is in the harbour of the town.") == "en"
    assert language("Khách đi bộ tập trung tại nhà chờ.") == "vi"
    assert language("Los billetes cuestan cinco euros") is None
    assert content("When does the gate close?") == content("The gates closed.") == content("gate closes")


def test_a_question_that_two_chunks_could_answer_is_asked_with_its_document() -> None:
    here = chunk("The oil filter of pump P-7 is changed every 45 days.", title="Pumps", doc_id="pumps")
    twin = chunk("The oil filter of pump P-7 was changed in May.", title="Log", doc_id="log")
    (pair,) = standing_alone(list(pairs([here])), [here])
    assert pair.alone
    assert asked(pair, set()) == "How often is the oil filter of pump P-7 changed?"
    (pair,) = standing_alone(list(pairs([here])), [here, twin])
    assert not pair.alone
    assert asked(pair, set()) == 'According to "Pumps", how often is the oil filter of pump P-7 changed?'


def test_a_question_with_two_answers_in_one_document_is_dropped() -> None:
    twice = [chunk("The guard zone is 2 miles."), chunk("The guard zone is 3 miles.")]
    assert distinct(pairs(twice)) == []
    assert len(distinct(pairs(twice[:1]))) == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"question": "Tell me how wide the gate is."}, "not a question"),
        ({"question": "How wide?"}, "question too short or too long"),
        ({"question": "How wide is the gate in the passage?"}, "question points at the passage"),
        ({"answer": " "}, "answer empty or too long"),
        ({"quote": "The gate is 9 metres wide."}, "quote is not in the passage"),
        ({"answer": "3.5 metres"}, "answer is not in the quote"),
        ({"answer": "very narrow indeed"}, "answer is not in the quote"),
        ({"question": "Is the gate 2.5 metres wide?"}, "question gives the answer away"),
    ],
)
def test_flaws(change: dict[str, str], reason: str) -> None:
    text = "The gate is 2.5 metres wide. It is locked."
    good: dict[str, Any] = {
        "question": "How wide is the gate?",
        "answer": "2.5 metres",
        "quote": "The gate is 2.5 metres wide.",
    }
    assert flaw(Pair(**good, chunk=chunk(text), language="en")) is None
    assert flaw(Pair(**good | change, chunk=chunk(text), language="en")) == reason


def test_a_question_that_is_a_long_piece_of_the_quote_is_a_copy() -> None:
    quote = "The harbour master may close the north gate of the inner basin at any time for 6 hours."
    question = f"{quote[:-12]}for how long?"
    assert flaw(Pair(question, "6 hours", quote, chunk(quote), "en")) == "question copies the quote"
