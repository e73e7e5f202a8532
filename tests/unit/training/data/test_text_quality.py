"""Damage to text: what is seen, what is repaired, and what must be left alone."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.data.rows import Row, Text
from training.data.text_quality import REPAIRED, contents, flaws, form, repair

VIETNAMESE = "Khách nộp yêu cầu hoàn vé đại lý trước giờ tàu chạy 36 giờ."


def kinds(text: str) -> list[str]:
    return [flaw.kind for flaw in flaws(text)]


@pytest.mark.parametrize(
    ("broken", "kind", "mended"),
    [
        ("schÃ¶n", "mojibake", "schön"),
        ("voilÃ\xa0 le travail", "mojibake", "voilà le travail"),
        (VIETNAMESE.encode().decode("latin-1"), "mojibake", VIETNAMESE),
        ("donâ€™t", "mojibake", "don’t"),
        (unicodedata.normalize("NFD", VIETNAMESE), "not NFC", VIETNAMESE),
        ("a\x07b", "control characters", "ab"),
        ("one\x0btwo", "control characters", "one two"),
        ("one\r\ntwo\rthree", "control characters", "one\ntwo\nthree"),
        ("a\u200bb\ufeff", "invisible characters", "ab"),
        ("a\u202eb", "invisible characters", "ab"),
        ("hi\U000e0041\U000e0042", "invisible characters", "hi"),
    ],
)
def test_damage_is_named_and_repaired(broken: str, kind: str, mended: str) -> None:
    assert kind in kinds(broken)
    assert repair(broken) == mended
    assert flaws(mended) == []


@pytest.mark.parametrize(
    "text",
    [
        VIETNAMESE,
        "Tabs\tand\nlines",
        "می‌خواهم",  # a zero-width non-joiner that Persian needs
        "👩‍👩‍👧 and 🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",
        "שלום\u200f!",
        "Çà et là, “quoted” – ½ £5 naïve",
        "ÄÖÜ",
        "中文、日本語、한국어",
    ],
)
def test_what_is_right_is_left_alone(text: str) -> None:
    assert flaws(text) == []
    assert repair(text) == text


def test_a_flaw_shows_what_it_reads_when_repaired() -> None:
    (flaw,) = flaws("It is schÃ¶n here")
    assert flaw.detail == "'Ã¶n here' reads 'ön here'"
    (flaw,) = flaws("a\x00\x00\x07b")
    assert flaw.detail == "U+0000 ×2, U+0007 ×1"


def test_lost_characters_are_told_but_cannot_be_repaired() -> None:
    assert kinds("caf\ufffd") == ["lost characters"]
    assert "lost characters" not in REPAIRED
    assert repair("caf\ufffd") == "caf\ufffd"


def test_forms() -> None:
    composed, decomposed = "\u1ec1", "e\u0302\u0300"
    assert [form(text) for text in ("abc", composed, decomposed, composed + decomposed)] == [
        "either",
        "NFC",
        "NFD",
        "mixed",
    ]


def test_contents_name_their_fields() -> None:
    messages = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
    assert list(contents(Row.model_validate({"id": "1", "messages": messages}))) == [
        ("messages.0.content", "a"),
        ("messages.1.content", "b"),
    ]
    assert list(contents(Text(id="1", text="c"))) == [("text", "c")]


DIRTY = st.text(
    st.one_of(
        st.characters(exclude_categories=["Cs"]),
        st.sampled_from("ÃÂ¡\xa0â€™œ\u0301\u0323\u200b\u200d\r\n\x07\x85\ufffd\U000e0041\U0001f3f4đệ"),
    )
)


@given(DIRTY)
def test_repair_leaves_nothing_to_repair(text: str) -> None:
    mended = repair(text)
    assert repair(mended) == mended
    assert not REPAIRED & set(kinds(mended))
