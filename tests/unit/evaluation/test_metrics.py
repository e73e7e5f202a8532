"""How an answer is scored."""

import pytest

from evaluation.metrics import citation_hit, exact_match, normalize, token_f1


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("18.50 crowns [2]", "18.50 crowns"),
        ("The Ferry.", "ferry"),
        ("18,50 crowns", "18.50 crowns"),
        ("  a   lead\n", "lead"),
        ("Gi\u00e1 v\u00e9", "Gia\u0301 ve\u0301"),
        ("STRASSE", "straße"),
    ],
)
def test_case_marks_articles_and_punctuation_do_not_count(answer: str, reference: str) -> None:
    assert exact_match(answer, reference) == 1.0


@pytest.mark.parametrize(("answer", "reference"), [("18.50", "1850"), ("22:40", "22:04"), ("no", "yes"), ("vé", "ve")])
def test_other_words_and_numbers_count(answer: str, reference: str) -> None:
    assert exact_match(answer, reference) == 0.0


def test_the_point_inside_a_number_stays_and_the_one_after_goes() -> None:
    assert normalize("It costs 18.50.") == "it costs 18.50"


def test_articles_inside_words_stay() -> None:
    assert normalize("Another theory and an apple") == "another theory and apple"


def test_token_f1_is_the_harmonic_mean() -> None:
    assert token_f1("one two three four", "one two") == pytest.approx(2 * 0.5 * 1.0 / 1.5)
    assert token_f1("one two", "one two three four") == token_f1("one two three four", "one two")


def test_token_f1_counts_repeated_words_once_each() -> None:
    assert token_f1("one one one", "one") == pytest.approx(0.5)


def test_token_f1_of_nothing() -> None:
    assert token_f1("", "one") == token_f1("two", "one") == 0.0
    assert token_f1("", "the.") == 1.0


@pytest.mark.parametrize(
    ("cited", "gold", "hit"),
    [
        (["a"], ["a"], 1.0),
        (["a"], ["a", "b"], 0.5),
        (["a", "b"], ["b", "a"], 1.0),
        (["a", "c"], ["a"], 0.0),
        ([], ["a"], 0.0),
        (["a"], [], 0.0),
    ],
)
def test_a_citation_hits_gold_and_nothing_else(cited: list[str], gold: list[str], hit: float) -> None:
    assert citation_hit(cited, gold) == hit
