"""A test collection in the layout of BEIR (Thakur et al., 2021): documents, queries, and which answer which.

    corpus.jsonl      {"_id": "d1", "title": "optional", "text": "…"}
    queries.jsonl     {"_id": "q1", "text": "…"}
    qrels/test.tsv    query-id <tab> corpus-id <tab> score, with one line of column names above

Everything is read into memory. A document without any words is kept, as the collections have some; nobody finds it.
Not covered: downloading, and queries without any relevant document, which are left
out, as the measures are not defined for them.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import BadInput, NotFound
from retrieval.types import Document


@dataclass(frozen=True)
class JudgedCollection:
    """What a folder holds."""

    name: str
    """Of the folder."""
    documents: tuple[Document, ...]
    queries: dict[str, str]
    """Query id -> text; those that have a relevant document."""
    judgements: dict[str, dict[str, int]]
    """Query id -> document id -> grade; above 0 is relevant."""


def read_beir(directory: Path, split: str = "test") -> JudgedCollection:
    """Read the folder `directory` and its ``qrels/{split}.tsv``.

    Raises:
        NotFound: a file is missing.
        BadInput: a row is not what the layout asks for, an id stands twice, or a judgement names one that is not there.
    """
    corpus, queries, qrels = (
        directory / "corpus.jsonl",
        directory / "queries.jsonl",
        directory / "qrels" / f"{split}.tsv",
    )
    documents: dict[str, Document] = {}
    for where, row in _rows(corpus):
        key = _field(row, "_id", where)
        if key in documents:
            raise BadInput(f"{where}: document '{key}' stands there twice; give each an _id of its own")
        title = unicodedata.normalize("NFC", str(row.get("title") or ""))
        text = unicodedata.normalize("NFC", _field(row, "text", where, empty=True))
        documents[key] = Document(key, title, text if text.strip() else title, source=key)
    asked: dict[str, str] = {}
    for where, row in _rows(queries):
        key = _field(row, "_id", where)
        if key in asked:
            raise BadInput(f"{where}: query '{key}' stands there twice; give each an _id of its own")
        asked[key] = _field(row, "text", where)
    judgements: dict[str, dict[str, int]] = {}
    for where, query, document, grade in _judgements(qrels):
        if query not in asked:
            raise BadInput(f"{where}: query '{query}' is not in {queries.name}; the files do not belong together")
        if document not in documents:
            raise BadInput(f"{where}: document '{document}' is not in {corpus.name}; the files do not belong together")
        judgements.setdefault(query, {})[document] = grade
    judged = {query: grades for query, grades in judgements.items() if max(grades.values()) > 0}
    if not judged:
        raise BadInput(
            f"{qrels} names no relevant document, so there is nothing to measure; its scores must be above 0"
        )
    return JudgedCollection(directory.resolve().name, tuple(documents.values()), {q: asked[q] for q in judged}, judged)


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(``file:line``, object) of every line that is not empty."""
    for where, line in _lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise BadInput(f"{where}: not valid JSON ({error}); write one object a line") from None
        if not isinstance(row, dict):
            raise BadInput(f"{where}: a {type(row).__name__} instead of an object; write one object a line")
        yield where, row


def _judgements(path: Path) -> Iterator[tuple[str, str, str, int]]:
    """(``file:line``, query, document, grade) of every line but the column names."""
    for number, (where, line) in enumerate(_lines(path)):
        parts = line.rstrip("\r\n").split("\t")
        if not line.strip() or (number == 0 and parts[-1].strip() == "score"):
            continue
        if len(parts) != 3:
            raise BadInput(f"{where}: {len(parts)} columns instead of 3; write query-id, corpus-id and score with tabs")
        try:
            grade = int(parts[2])
        except ValueError:
            raise BadInput(f"{where}: the score {parts[2]!r} is not a whole number") from None
        yield where, parts[0], parts[1], grade


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                yield f"{path}:{number}", line
    except FileNotFoundError:
        raise NotFound(
            f"{path} is missing; a BEIR folder holds corpus.jsonl, queries.jsonl and qrels/<split>.tsv"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} cannot be read ({error})") from None


def _field(row: dict[str, Any], name: str, where: str, *, empty: bool = False) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not (value.strip() or empty):
        raise BadInput(f"{where}: '{name}' must be a text{'' if empty else ' that is not empty'}, not {value!r}")
    return value
