"""Languages: told where there is enough text, and held against what a row says."""

from __future__ import annotations

import pytest

from training.data.language import agree, identify


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("Every refund claim is written on Form C-12 and names the card or account that paid.", "en"),
        ("Khách nộp yêu cầu hoàn vé đại lý trước giờ tàu chạy thì được hoàn bao nhiêu phần trăm?", "vi"),
        ("Jeder Antrag auf Erstattung wird auf dem Formular gestellt und nennt das Konto.", "de"),
        ("所有退款申请都必须填写在表格上，并注明付款所用的银行卡或账户的名称。", "zh"),
    ],
)
def test_languages_are_told(text: str, code: str) -> None:
    assert identify(text) == code


@pytest.mark.parametrize("text", ["", "18.50 crowns", "33.40 " * 30, "R1 R2 R3 R4", "Form C-12; Form Q-1"])
def test_too_little_text_is_not_judged(text: str) -> None:
    assert identify(text) is None


def test_a_region_says_nothing_about_the_language() -> None:
    assert agree("en", "en-GB")
    assert agree("pt", "pt_BR")
    assert not agree("vi", "en")


def test_languages_that_are_written_alike_are_not_held_against_each_other() -> None:
    assert agree("da", "nb")
    assert not agree("da", "sv")
