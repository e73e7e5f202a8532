import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrieval.words import fold, matches, searchable, shorten, words


@pytest.mark.parametrize(
    ("word", "plain"),
    [("trạm", "tram"), ("Đường", "Duong"), ("ưỡn", "uon"), ("café", "cafe"), ("für", "fur"), ("Łódź", "Lodz"),
     ("smørrebrød", "smorrebrod"), ("Αθήνα", "Αθηνα"), ("ёлка", "елка"), ("йод", "йод"), ("हिन्दी", "हिन्दी"), ("が", "が"),
     ("한국", "한국"), ("word2", "word2")],
)  # fmt: skip
def test_diacritics_go_and_other_letters_stay(word: str, plain: str) -> None:
    assert fold(word) == plain


def test_the_indexed_text_holds_the_plain_words_as_often() -> None:
    assert searchable("Trạm sạc, trạm A", True) == "Trạm sạc, trạm A\nTram sac tram"
    assert searchable("Trạm sạc", False) == "Trạm sạc"
    assert searchable("Tram A", True) == "Tram A"
    assert searchable("йод", True) == "йод"


@given(st.text(max_size=60))
def test_what_is_typed_plain_or_exactly_is_found(text: str) -> None:
    text = unicodedata.normalize("NFC", text)
    indexed = set(words(searchable(text, True)))
    assert set(words(text)) <= indexed
    assert {fold(word).lower() for word in words(text)} - set(words(text)) <= {word.lower() for word in indexed}
    assert matches(text, text) == list(dict.fromkeys(words(text)))


def test_matches_are_exact_or_typed_plain() -> None:
    text = "Trạm sạc ở Hòa Bình"
    assert matches("TRẠM nào ở hoa binh", text) == ["trạm", "ở", "hoa", "binh"]
    assert matches("trám", text) == []


def test_a_query_is_cut_at_a_word() -> None:
    assert shorten("one  two, three four", 3) == "one  two, three"
    assert shorten("one two three", 3) == "one two three"
    assert shorten("...", 3) == "..."
