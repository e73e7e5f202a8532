"""PDF pages: paragraphs, headings, running lines, and files that are none, closed, scanned or bombs."""

from __future__ import annotations

import pytest

from retrieval.read.base import Extract, Unreadable
from retrieval.read.pdf import read_pdf
from tests.unit.retrieval.samples import Line, bomb_pdf, encrypted_pdf, image_pdf, page, pdf

BODY = [
    "The ferry leaves at seven. Tickets are sold at the har-",
    "bour office until six. A car pays forty crowns and a well-",
    "known trailer twenty, a well-known one.",
]


def reading(data: bytes, boilerplate: bool = True) -> Extract:
    return read_pdf(data, boilerplate, 10_000_000)


def handbook(pages: int) -> bytes:
    def one(number: int) -> list[Line]:
        return page(
            [
                Line("Corvane Ferries, Handbook", 8, y=815),
                Line(f"Fares, part {number},", 18),
                Line("and surcharges", 18),
                *BODY,
                Line("Exceptions", 13),
                "• Coaches",
                "• Bicycles",
                Line("A new paragraph", y=300),
                Line("of two lines.", y=286),
                Line("# 5 is a berth", y=200),
                Line(f"Page {number} of {pages}", 8, y=30),
            ]
        )

    return pdf([one(number) for number in range(1, pages + 1)])


def test_a_page_has_headings_paragraphs_and_whole_words() -> None:
    found = reading(handbook(1), boilerplate=False)
    assert found.text.split("\n\n") == [
        "Corvane Ferries, Handbook",
        "# Fares, part 1, and surcharges",
        "The ferry leaves at seven. Tickets are sold at the harbour office until six."
        " A car pays forty crowns and a well-known trailer twenty, a well-known one.",
        "## Exceptions",
        "- Coaches\n- Bicycles",
        "A new paragraph\nof two lines.",
        "\\# 5 is a berth",
        "Page 1 of 1",
    ]
    assert found.title == "Fares, part 1, and surcharges"


def test_running_lines_go_and_are_said() -> None:
    found = reading(handbook(5))
    assert "Handbook" not in found.text and "Page" not in found.text and "well-known" in found.text
    assert found.notes == ["left out 10 lines that repeat on most pages (such as 'Corvane Ferries, Handbook')"]
    assert "Page 4 of 5" in reading(handbook(5), boilerplate=False).text
    assert "Page 2 of 2" in reading(handbook(2)).text


def test_lines_of_the_text_that_repeat_stay() -> None:
    forms = [page(["Name:", "Berth:", "Signature:", f"guest {n} of many"]) for n in range(6)]
    assert reading(pdf(forms)).text.count("Signature:") == 6


def test_pages_are_offsets_into_the_text() -> None:
    found = reading(pdf([page(["one."]), [], page(["two and"]), page(["three"])]))
    assert found.text == "one.\n\ntwo and\nthree"
    assert found.pages == (0, 4, 6, 14)
    assert [found.text[start:].split()[0] for start in (found.pages[0], found.pages[2], found.pages[3])] == [
        "one.",
        "two",
        "three",
    ]
    assert found.notes == ["pages without text: 2; run OCR on it if they are scans"]


def test_the_title_that_a_file_states_counts_unless_a_program_made_it_up() -> None:
    pages = [page([Line("Fares", 18), *BODY])]
    assert reading(pdf(pages, title="Handbook of fares")).title == "Handbook of fares"
    for made_up in ("untitled", "Microsoft Word - x", "fares_final.docx", "-"):
        assert reading(pdf(pages, title=made_up)).title == "Fares"


def test_text_in_one_size_has_no_headings() -> None:
    assert "#" not in reading(pdf([page(BODY)])).text
    large = [Line(text, 18) for text in BODY]
    assert "#" not in reading(pdf([page([*BODY, *large])])).text


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (image_pdf(), "holds no text, only pictures; run OCR"),
        (pdf([]), "holds no page"),
        (encrypted_pdf([page(BODY)], "secret"), "encrypted; save it without a password"),
        (b"%PDF-1.7 nothing", "not a PDF that can be read"),
        (handbook(3)[:900], "not a PDF that can be read"),
        (bomb_pdf(100), "cannot be read"),
        (bomb_pdf(12), "unpack to more than 10 MB"),
    ],
    ids=["scan", "no pages", "encrypted", "junk", "cut off", "bomb", "small bomb"],
)
def test_what_cannot_be_read_says_why(data: bytes, reason: str) -> None:
    with pytest.raises(Unreadable, match=reason):
        reading(data)


def test_a_file_that_is_encrypted_for_nobody_is_read() -> None:
    assert "harbour" in reading(encrypted_pdf([page(BODY)], "")).text


def test_one_broken_page_costs_that_page() -> None:
    pages = [page(["first page"]), page(["second page"]), page(["third page"])]
    data = pdf(pages)
    start = data.index(b"stream\n", data.index(b"stream\n", data.index(b"endstream")) + 1)
    broken = data[: start + 8] + b"\xff" * 6 + data[start + 14 :]
    found = reading(broken)
    assert "first page" in found.text and "third page" in found.text and "second" not in found.text
    assert any("2" in note for note in found.notes)
