"""Files -> :class:`Document`: Markdown, text, HTML, PDF, DOCX, and rows of JSONL, CSV and Parquet.

:func:`sources` lists what is there, :func:`read_source` reads one file, in any process, and :func:`read` does both for
small jobs. One bad file or row never stops the others: it becomes a :class:`Problem` that names the fix. Text is
cleaned (``retrieval.read.clean``), its encoding told (``decode``); structure becomes Markdown, so that chunking sees it.

Not covered: OCR, other formats, archives, and parsers that a file keeps busy for minutes (there is no time limit).
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any

from cluster.config import KnowledgeConfig
from cluster.errors import MetierError
from retrieval.read.base import Extract, Problem, Source, Unreadable
from retrieval.read.html import read_html
from retrieval.read.markdown import read_markdown, read_text
from retrieval.read.places import MB, contents, sources, suffix
from retrieval.read.rows import ENDINGS, LONGEST_ID, read_rows
from retrieval.types import Document

__all__ = ["Problem", "Source", "read", "read_source", "sources", "unique"]


def read(knowledge: KnowledgeConfig, options: Mapping[str, Any] = {}) -> tuple[list[Document], list[Problem]]:
    """All documents of ``knowledge.documents`` in order of path, and what was skipped or left out.

    Raises:
        NotFound, BadInput, Unavailable: as :func:`sources`.
    """
    found, problems = sources(knowledge, options)
    documents: list[Document] = []
    for source in found:
        some, bad = read_source(source, knowledge, options)
        documents += some
        problems += bad
    documents, taken = unique(documents)
    return documents, problems + taken


def read_source(
    source: Source, knowledge: KnowledgeConfig, options: Mapping[str, Any] = {}
) -> tuple[list[Document], list[Problem]]:
    """The documents in one file: one, or one a row. A file that cannot be used is a Problem, never an error.

    Raises:
        Unavailable: the object store does not answer.
    """
    name = unicodedata.normalize("NFC", PurePosixPath(source.path).stem)
    try:
        data = contents(source, knowledge, options)
        if not data.strip():
            raise Unreadable("empty")
        if suffix(source.path) in ENDINGS:
            return read_rows(data, source, knowledge, source.path if knowledge.document_ids == "path" else name)
        extract = FILES[suffix(source.path)](data, knowledge)
        doc_id = source.path if knowledge.document_ids == "path" else name
        if not extract.text.strip():
            raise Unreadable("; ".join(["holds no text", *extract.notes]))
        if len(doc_id.encode()) > LONGEST_ID:
            raise Unreadable(f"its name is longer than {LONGEST_ID} bytes; shorten it")
    except Unreadable as error:
        return [], [Problem(source.path, str(error))]
    except MetierError:
        raise
    except Exception as error:  # parsers raise whatever comes on broken files, and one file must not stop an ingest
        reason = " ".join(str(error).split())[:200]
        return [], [Problem(source.path, f"cannot be read ({type(error).__name__}: {reason})")]
    document = Document(
        doc_id=doc_id,
        title=extract.title or name,
        text=extract.text,
        source=source.path,
        metadata=extract.metadata,
        groups=extract.groups,
        pages=extract.pages,
    )
    return [document], [Problem(source.path, note, "note") for note in extract.notes]


def unique(documents: Iterable[Document]) -> tuple[list[Document], list[Problem]]:
    """`documents` without those whose id another one before them has, and these as problems."""
    first: dict[str, Document] = {}
    problems: list[Problem] = []
    for document in documents:
        other = first.setdefault(document.doc_id, document)
        if other is not document:
            reason = f"its id '{document.doc_id}' is taken by {other.source}; rename one of them, or set knowledge.document_ids=path"
            problems.append(Problem(document.source, reason))
    return list(first.values()), problems


def _pdf(data: bytes, knowledge: KnowledgeConfig) -> Extract:
    from retrieval.read.pdf import read_pdf

    return read_pdf(data, knowledge.boilerplate, int(knowledge.max_file_mb * MB))


def _docx(data: bytes, knowledge: KnowledgeConfig) -> Extract:
    from retrieval.read.docx import read_docx

    return read_docx(data, int(knowledge.max_file_mb * MB))


FILES: dict[str, Callable[[bytes, KnowledgeConfig], Extract]] = {
    ".md": lambda data, _: read_markdown(data),
    ".markdown": lambda data, _: read_markdown(data),
    ".txt": lambda data, _: read_text(data),
    ".html": lambda data, knowledge: read_html(data, knowledge.boilerplate),
    ".htm": lambda data, knowledge: read_html(data, knowledge.boilerplate),
    ".pdf": _pdf,
    ".docx": _docx,
}
"""Ending -> reader. Those of PDF and DOCX are imported when the first such file is read."""
