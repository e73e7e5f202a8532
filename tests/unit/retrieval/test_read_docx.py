"""Word documents: structure, what revisions leave, and archives that are broken or bombs."""

from __future__ import annotations

from typing import Any

import pytest
from docx.document import Document

from retrieval.read.base import Unreadable
from retrieval.read.docx import read_docx
from tests.unit.retrieval.samples import docx, with_part

MAIN = "word/document.xml"


def handbook(document: Document) -> None:
    document.core_properties.title = ""
    document.sections[0].header.paragraphs[0].text = "Corvane Ferries"
    document.add_heading("Fare manual", 0)
    document.add_heading("Trailers", 1)
    document.add_paragraph("The fee is\u00a040 crowns.").add_run("\tPaid\non board.")
    document.add_paragraph("papers", style="List Bullet")
    document.add_paragraph("a key", style="List Number")
    document.add_paragraph("# 5 is a berth")
    table = document.add_table(rows=3, cols=2)
    for row, cells in enumerate((("Kind", "Price"), ("Car", "40"), ("", "30"))):
        for column, text in enumerate(cells):
            table.cell(row, column).text = text
    table.cell(1, 0).merge(table.cell(2, 0))
    house = document.styles.add_style("House", 1)
    house.base_style = document.styles["Heading 2"]
    document.add_paragraph("Exceptions", style="House")
    document.add_table(rows=1, cols=1).cell(0, 0).text = "framed"


def reading(data: bytes) -> Any:
    return read_docx(data, 100_000_000)


def test_structure_becomes_markdown() -> None:
    found = reading(docx(handbook))
    assert found.text == (
        "# Fare manual\n\n# Trailers\n\nThe fee is 40 crowns. Paid\non board.\n\n- papers\n- a key\n\n\\# 5 is a berth\n\n"
        "| Kind | Price |\n|---|---|\n| Car | 40 |\n| Car | 30 |\n\n## Exceptions\n\nframed\n"
    )
    assert found.title == "Fare manual"


def test_the_title_of_the_properties_comes_first() -> None:
    def write(document: Document) -> None:
        document.core_properties.title = "Fares 2026"
        document.add_heading("Other", 1)

    assert reading(docx(write)).title == "Fares 2026"


def test_insertions_links_and_controls_are_text_and_deletions_are_not() -> None:
    data = docx(lambda document: document.add_paragraph("MARK"))
    run = b"<w:r><w:t>%s</w:t></w:r>"
    parts = (
        run % b"kept, "
        + b"<w:ins>%s</w:ins>" % (run % b"inserted, ")
        + b"<w:moveFrom>%s</w:moveFrom>" % (run % b"moved away, ")
        + b"<w:del><w:r><w:delText>deleted</w:delText></w:r></w:del>"
        + b"<w:hyperlink>%s</w:hyperlink>" % (run % b"linked, ")
        + b"<w:sdt><w:sdtContent>%s</w:sdtContent></w:sdt>" % (run % b"chosen")
    )
    block = b"<w:sdt><w:sdtContent><w:p>%s</w:p></w:sdtContent></w:sdt>" % (run % b"a block")
    changed = with_part(
        data, MAIN, lambda xml: xml.replace(run % b"MARK", parts).replace(b"<w:sectPr", block + b"<w:sectPr", 1)
    )
    assert reading(changed).text == "kept, inserted, linked, chosen\n\na block\n"


def swollen(megabytes: int) -> bytes:
    return with_part(docx(handbook), MAIN, lambda xml: xml + b" " * (megabytes * 1_000_000))


def lying() -> bytes:
    """A bomb whose directory declares a thousand bytes."""
    data = bytearray(swollen(150))
    entry = data.rindex(b"PK\x01\x02", 0, data.rindex(MAIN.encode()))
    data[entry + 24 : entry + 28] = (1000).to_bytes(4, "little")
    return bytes(data)


def entities(xml: bytes) -> bytes:
    layers = b'<!ENTITY a0 "ha">' + b"".join(b'<!ENTITY a%d "%s">' % (n, b"&a%d;" % (n - 1) * 10) for n in range(1, 10))
    start = xml.index(b"<w:document")
    return xml[:start] + b"<!DOCTYPE x [" + layers + b"]>" + xml[start:].replace(b"# 5", b"&a9;")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (swollen(150), "unpacks to more than 100 MB"),
        (swollen(50), "more than 200 times its size"),
        (lying(), "broken"),
        (with_part(docx(handbook), MAIN, entities), "document type"),
        (with_part(docx(handbook), MAIN, lambda xml: xml.replace(b"<w:body>", b"<w:body>" + b"<w:sdt>" * 5000)), "Excessive depth"),
        (with_part(docx(handbook), MAIN, lambda xml: xml[:200]), "not a Word document"),
        (docx(handbook)[:3000], "broken"),
        (b"PK\x03\x04", "broken"),
        (bytes.fromhex("d0cf11e0a1b11ae1") + bytes(600), "encrypted or old Word file"),
    ],
    ids=["bomb", "ratio", "lying bomb", "entities", "deep", "cut XML", "cut off", "junk", "old"],
)  # fmt: skip
def test_what_cannot_be_read_says_why(data: bytes, reason: str) -> None:
    with pytest.raises(Unreadable, match=reason):
        reading(data)


def test_an_archive_of_very_many_parts_is_refused() -> None:
    import io
    import zipfile

    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        for number in range(10_001):
            archive.writestr(str(number), b"")
    with pytest.raises(Unreadable, match="10,001 parts"):
        reading(target.getvalue())
