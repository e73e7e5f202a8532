"""Writes the files that readers are tried on: small PDFs by hand, DOCX by python-docx."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Line:
    """One line of a page, from the lower left corner, in points."""

    text: str
    size: float = 11
    x: float = 72
    y: float = 0


def page(lines: Iterable[str | Line], *, top: float = 760, leading: float = 14) -> list[Line]:
    """Lines one below the other; plain text in 11 points."""
    placed: list[Line] = []
    for line in lines:
        line = Line(line) if isinstance(line, str) else line
        top -= max(leading, line.size * 1.3)
        placed.append(Line(line.text, line.size, line.x, line.y or top))
    return placed


def pdf(pages: Sequence[Sequence[Line]], *, title: str = "", compress: bool = True) -> bytes:
    """A PDF in Helvetica (WinAnsi letters only)."""
    contents = [b"\n".join(map(_show, lines)) for lines in pages]
    return _pdf([_stream(content, compress) for content in contents], title)


def image_pdf() -> bytes:
    """A scanned page: one picture and no text."""
    return _pdf([_stream(b"q 500 0 0 700 50 50 cm BI /W 1 /H 1 /CS /G /BPC 8 ID \x80 EI Q", False)], "")


def bomb_pdf(megabytes: int) -> bytes:
    """A page whose content unpacks to so many megabytes of spaces."""
    packer = zlib.compressobj(9)
    packed = b"".join(packer.compress(b" " * 1_000_000) for _ in range(megabytes)) + packer.flush()
    return _pdf([b"<< /Filter /FlateDecode /Length %d >>\nstream\n%s\nendstream" % (len(packed), packed)], "")


def encrypted_pdf(pages: Sequence[Sequence[Line]], password: str) -> bytes:
    """The same under a user password."""
    from pypdf import PdfReader, PdfWriter

    writer = PdfWriter(clone_from=PdfReader(io.BytesIO(pdf(pages))))
    writer.encrypt(password, algorithm="RC4-128")
    target = io.BytesIO()
    writer.write(target)
    return target.getvalue()


def _show(line: Line) -> bytes:
    text = line.text.encode("cp1252").replace(b"\\", b"\\\\").replace(b"(", b"\\(").replace(b")", b"\\)")
    return b"BT /F1 %g Tf 1 0 0 1 %g %g Tm (%s) Tj ET" % (line.size, line.x, line.y, text)


def _stream(content: bytes, compress: bool) -> bytes:
    if not compress:
        return b"<< /Length %d >>\nstream\n%s\nendstream" % (len(content), content)
    packed = zlib.compress(content)
    return b"<< /Filter /FlateDecode /Length %d >>\nstream\n%s\nendstream" % (len(packed), packed)


def _pdf(streams: Sequence[bytes], title: str) -> bytes:
    kids = b" ".join(b"%d 0 R" % (5 + 2 * number) for number in range(len(streams)))
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [%s] /Count %d >>" % (kids, len(streams)),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding >>",
        b"<< /Title (%s) >>" % title.encode("latin-1"),
    ]
    for number, stream in enumerate(streams):
        objects.append(
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 595 842] /Resources << /Font << /F1 3 0 R >> >>"
            b" /Contents %d 0 R >>" % (6 + 2 * number)
        )
        objects.append(stream)
    file = io.BytesIO()
    file.write(b"%PDF-1.7\n")
    places = []
    for number, body in enumerate(objects, 1):
        places.append(file.tell())
        file.write(b"%d 0 obj\n%s\nendobj\n" % (number, body))
    start = file.tell()
    file.write(b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1))
    file.writelines(b"%010d 00000 n \n" % place for place in places)
    trailer = b"trailer\n<< /Size %d /Root 1 0 R /Info 4 0 R >>\nstartxref\n%d\n%%%%EOF\n"
    file.write(trailer % (len(objects) + 1, start))
    return file.getvalue()


def docx(write: Callable[[Any], None]) -> bytes:
    """A Word document that `write` puts content into."""
    from docx import Document

    document = Document()
    write(document)
    target = io.BytesIO()
    document.save(target)
    return target.getvalue()


def with_part(archive: bytes, name: str, change: Callable[[bytes], bytes]) -> bytes:
    """`archive` with one of its parts changed."""
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as new:
        for part in old.namelist():
            new.writestr(part, change(old.read(part)) if part == name else old.read(part))
    return target.getvalue()
