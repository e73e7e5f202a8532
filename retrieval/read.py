"""Files -> :class:`Document`: ``.md`` and ``.txt`` below a directory, as Unicode NFC text with ``\\n`` line ends.

A file that cannot be used is reported as a :class:`Problem` and skipped; one bad file never stops an ingest.
Hidden files and directories (a leading dot: ``.git``, the ``..data`` of a Kubernetes ConfigMap) are not looked at.
Not covered: other formats, front matter, and symbolic links to directories, which are not followed.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import NotFound
from retrieval.types import Document

SUFFIXES = (".md", ".txt")
TITLE = re.compile(r"^#[ \t]+(\S.*?)(?:[ \t]+#+)?[ \t]*$", re.MULTILINE)


@dataclass(frozen=True)
class Problem:
    """A file that was skipped, and why."""

    source: str
    """Path relative to the directory that was read."""
    reason: str


def read(directory: str | Path) -> tuple[list[Document], list[Problem]]:
    """All documents below `directory` in the order of their relative paths, and the files that were skipped.

    The title is the first ``# `` heading, else the file name without its ending. Of two files with the same name
    the first in that order is kept.

    Raises:
        NotFound: there is no such directory.
    """
    root = Path(directory)
    if not root.is_dir():
        raise NotFound(f"{root}: no such directory; set knowledge.documents to where the documents are")
    documents: dict[str, Document] = {}
    problems: list[Problem] = []
    for path in _files(root):
        source = _nfc(path.relative_to(root).as_posix())
        doc_id = _nfc(path.stem)
        text, reason = _text(path)
        if not reason and doc_id in documents:
            reason = f"its name is taken by {documents[doc_id].source}; rename one of them"
        if reason:
            problems.append(Problem(source, reason))
            continue
        heading = TITLE.search(text)
        title = heading.group(1) if heading else doc_id
        documents[doc_id] = Document(doc_id=doc_id, title=title, text=text, source=source)
    return list(documents.values()), problems


def _files(root: Path) -> list[Path]:
    # A link that leads nowhere is not a file, and yet somebody meant a document by it.
    found = (
        path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES and (path.is_file() or path.is_symlink())
    )
    visible = (path for path in found if not any(part.startswith(".") for part in path.relative_to(root).parts))
    return sorted(visible, key=lambda path: path.relative_to(root).as_posix())


def _text(path: Path) -> tuple[str, str]:
    """The text of a file and ``""``, or ``""`` and the reason why there is none."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        return "", f"not UTF-8 (byte {error.start}); convert it"
    except OSError as error:
        return "", f"cannot be read: {error.strerror}"
    if "\0" in text:
        return "", "not a text file (it holds NUL bytes)"
    if not text.strip():
        return "", "empty"
    return _nfc(text), ""


def _nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)
