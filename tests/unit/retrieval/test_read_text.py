"""Bytes -> text: encodings, what is not seen, front matter."""

from __future__ import annotations

import unicodedata
from datetime import date

import pytest

from retrieval.read.base import Unreadable
from retrieval.read.clean import clean, literal, one_line, table
from retrieval.read.decode import TCVN3, decode
from retrieval.read.markdown import read_markdown, read_text

VIETNAMESE = (
    "Giá vé cho một xe tải lớn là bốn mươi đồng. Hành khách phải có mặt trước giờ khởi hành ba mươi phút, "
    "nếu không sẽ mất chỗ đã đặt."
)
GERMAN = "Die Gebühr für die Überfahrt beträgt vierzig Kronen. Größere Fahrzeuge müssen früher am Kai sein."
RUSSIAN = "Плата за проезд составляет сорок крон. Большие автомобили должны прибыть раньше."
POLISH = (
    "Opłata za przejazd wynosi czterdzieści koron. Większe pojazdy muszą przyjechać wcześniej, gdyż łódź jest mała."
)
JAPANESE = "運賃は四十クローネです。大型車は早めに到着してください。"


def windows_1258(text: str) -> bytes:
    """As Windows writes it: vowels with their hats whole, tones as marks of their own."""
    out = b""
    for letter in text:
        parts = unicodedata.normalize("NFD", letter)
        tones = "".join(mark for mark in parts if mark in "\u0300\u0301\u0303\u0309\u0323")
        base = unicodedata.normalize("NFC", "".join(part for part in parts if part not in tones))
        out += base.encode("cp1258") + tones.encode("cp1258")
    return out


def tcvn3(text: str) -> bytes:
    codes = {letter: code for code, letter in TCVN3.items()}
    return bytes(codes.get(letter) or ord(letter) for letter in text)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_unicode_is_told_with_and_without_a_mark(encoding: str) -> None:
    text = f"The ferry leaves at seven from pier B. {VIETNAMESE[:10]} Tickets are sold until six."
    assert decode(text.encode(encoding)) == (text, "")


@pytest.mark.parametrize(
    ("data", "text", "name"),
    [
        (windows_1258(VIETNAMESE), VIETNAMESE, "windows-1258"),
        (tcvn3(VIETNAMESE), VIETNAMESE, "TCVN3"),
        (GERMAN.encode("cp1252"), GERMAN, "windows-125"),
        (POLISH.encode("cp1250"), POLISH, "windows-1250"),
        (POLISH.encode("iso8859_2"), POLISH, "ISO-8859-2"),
        (RUSSIAN.encode("cp1251"), RUSSIAN, "windows-1251"),
        (RUSSIAN.encode("koi8_r"), RUSSIAN, "KOI8-R"),
        (JAPANESE.encode("cp932"), JAPANESE, "Shift_JIS"),
        (JAPANESE.encode("euc_jp"), JAPANESE, "EUC-JP"),
    ],
)
def test_legacy_encodings_are_told_and_said(data: bytes, text: str, name: str) -> None:
    found, note = decode(data)
    assert found == text == unicodedata.normalize("NFC", found)
    assert note.startswith(f"read as {name}")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ("Gebühr".encode("latin-1"), r"not UTF-8 \(byte 3\).*convert it"),
        (VIETNAMESE.encode()[:60] + b"\xff" + VIETNAMESE.encode()[60:], r"byte 60\), though most of it is"),
        (bytes(range(256)) * 4, "NUL"),
        (b"PK\x03\x04\0\0\0", "NUL"),
        (b"\xff\xfea\0\0\0", "NUL"),
        (b"\xff\xfe\x00\xd8x\0", "UTF-16-LE"),
    ],
)
def test_what_is_not_sure_is_not_read(data: bytes, reason: str) -> None:
    with pytest.raises(Unreadable, match=reason):
        decode(data)


def test_a_declared_encoding_comes_after_utf8_and_before_guesses() -> None:
    assert decode("Gebühr".encode("latin-1"), "iso-8859-1") == ("Gebühr", "")
    assert decode("Gebühr".encode(), "iso-8859-1") == ("Gebühr", "")
    assert decode("“Gebühr”".encode("cp1252"), "latin1") == ("“Gebühr”", "")
    with pytest.raises(Unreadable):
        decode("Gebühr".encode("latin-1"), "no-such-encoding")
    with pytest.raises(Unreadable):
        decode(b"\xffx", "zip")


def test_what_cannot_be_seen_goes() -> None:
    assert clean("a\u00adb\u200bc\u2060d\ufeffe\x00\x1b\u0085f") == "abcde\nf"
    assert clean("40\u00a0000\u202f€") == "40 000 €"
    assert clean("a\r\nb\rc\u2028d\fe\tf") == "a\nb\nc\nd\ne\tf"
    assert clean("a\u2029b\ud800") == "a\n\nb\ufffd"
    assert clean("क\u200dष 👩\u200d🚒") == "क\u200dष 👩\u200d🚒"
    assert one_line(" a\n b ") == "a b" and len(one_line("x" * 999)) == 300


def test_text_of_other_formats_brings_no_structure_by_chance() -> None:
    assert literal("# 5\n#5\n---\n- x\n```") == "\\# 5\n#5\n\\---\n- x\n\\```"
    assert table([["a", "b|c"], ["", ""], ["d\ne"]]) == "| a | b\\|c |\n|---|---|\n| d e |"
    assert table([[""]]) == table([]) == ""


FRONT = """---
title: Fares of {year}
groups: [crew, office]
valid: 2026-11-01
tags: [fares, 1.5]
empty:
---
# Heading

Text."""


def test_front_matter_is_read_and_not_part_of_the_text() -> None:
    found = read_markdown(FRONT.encode())
    assert found.title == "Fares of {year}"
    assert found.groups == ("crew", "office")
    assert found.metadata == {"valid": date(2026, 11, 1).isoformat(), "tags": ["fares", 1.5]}
    assert found.text == "# Heading\n\nText."
    assert read_text(FRONT.encode()).text == FRONT


def test_a_rule_at_the_beginning_is_no_front_matter() -> None:
    for text in ("---\n\nText: yes\n\n---\n# A", "---\n- item\n---\n", "---\ntitle: no end", "text\n---\na: b\n---\n"):
        assert read_markdown(text.encode()).text == text


@pytest.mark.parametrize(
    ("front", "reason"),
    [
        ("title: [", "not valid YAML"),
        ("a: &x [1]\nb: *x", "aliases"),
        ("a: !!python/object/apply:os.system [x]", "not valid YAML"),
        ("a: " + "[" * 5000, "not valid YAML"),
        ("groups: Crew", "'Crew' is not the name of a group"),
        ("groups: []", "not a list of names"),
        ("groups: {a: b}", "not a list of names"),
    ],
)
def test_front_matter_that_is_wrong_costs_the_file(front: str, reason: str) -> None:
    """A document must not lose its rights because of a slip in the lines that state them."""
    with pytest.raises(Unreadable, match=reason):
        read_markdown(f"---\n{front}\n---\ntext".encode())


def test_a_comment_without_end_is_no_trap() -> None:
    text = "---\n" + "#\n" * 100_000
    assert read_markdown(text.encode()).text == text


def test_groups_may_be_text_or_left_open() -> None:
    assert read_markdown(b"---\ngroups: crew, office\n---\nx").groups == ("crew", "office")
    assert read_markdown(b"---\ngroups:\n---\nx").groups is None


def test_large_attributes_are_left_out_and_said() -> None:
    found = read_markdown(f"---\na: b\nlong: {'x' * 9000}\n---\ntext".encode())
    assert found.metadata == {"a": "b"}
    assert found.notes == ["left out attributes that are too large: long"]
