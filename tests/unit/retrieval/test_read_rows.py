"""Rows of JSONL, CSV and Parquet: a document each, and one bad row costs itself only."""

from __future__ import annotations

import json
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from cluster.config import KnowledgeConfig
from retrieval.read import Problem, read
from retrieval.types import Document


def reading(directory: Path, name: str, data: bytes | str, **settings: Any) -> tuple[list[Document], list[Problem]]:
    (directory / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    return read(KnowledgeConfig(documents=str(directory), **settings))


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_beir_corpora_work_as_they_are(tmp_path: Path) -> None:
    rows = [
        {
            "_id": "4983",
            "title": "Microstructure",
            "text": "Alterations of it.",
            "metadata": {"url": "x", "pages": [1]},
        },
        {"_id": "5836", "title": "", "text": "Induction.", "metadata": {}},
        {"_id": "7912", "title": "Title alone", "text": "", "metadata": {}},
    ]
    documents, problems = reading(tmp_path, "corpus.jsonl", lines(*rows))
    assert documents == [
        Document("4983", "Microstructure", "Alterations of it.", "corpus.jsonl", {"url": "x", "pages": [1]}),
        Document("5836", "", "Induction.", "corpus.jsonl"),
        Document("7912", "Title alone", "Title alone", "corpus.jsonl"),
    ]
    assert problems == []


def test_columns_are_mapped_and_the_others_are_attributes(tmp_path: Path) -> None:
    row = {
        "question": "How much?",
        "answer": "Forty.",
        "nr": 7,
        "who": ["crew"],
        "link": "https://x",
        "year": 2026,
        "text": "no",
    }
    columns = {"question": "text", "answer": "text", "nr": "id", "who": "groups", "link": "source"}
    [document], problems = reading(tmp_path, "faq.jsonl", lines(row), columns=columns)
    assert document == Document(
        "7", "", "How much?\n\nForty.", "https://x", {"year": 2026, "text": "no"}, groups=("crew",)
    )
    assert problems == []


def test_a_bad_row_costs_itself_only(tmp_path: Path) -> None:
    text = (
        lines({"id": "a", "text": "one"})
        + '{"id": \n\n[1]\n'
        + lines({"id": "b", "body": 5}, {"id": "c"}, {"id": "d", "text": " "}, {"id": "e", "text": "x", "groups": [1]})
        + "[" * 5000
        + "\n"
        + lines({"id": "a", "text": "again"}, {"id": "f", "text": "two"}, {"id": "g" * 2000, "text": "x"})
    )
    documents, problems = reading(tmp_path, "x.jsonl", text)
    assert [(d.doc_id, d.text) for d in documents] == [("a", "one"), ("f", "two")]
    reasons = {problem.source: problem.reason for problem in problems}
    assert reasons.keys() == {f"x.jsonl:row {n}" for n in (2, 4, 5, 6, 7, 8, 9, 12)} | {"x.jsonl"}
    assert "not JSON" in reasons["x.jsonl:row 2"] and "not JSON" in reasons["x.jsonl:row 9"]
    assert "knowledge.columns={body: text}" in reasons["x.jsonl:row 6"]
    assert "groups" in reasons["x.jsonl:row 8"] and "longer than" in reasons["x.jsonl:row 12"]
    assert "'a' is taken" in reasons["x.jsonl"]


def test_rows_without_the_groups_that_were_promised_are_not_open_to_all(tmp_path: Path) -> None:
    text = lines(
        {"id": "a", "text": "x", "who": "crew"},
        {"id": "b", "text": "x", "whom": "crew"},
        {"id": "c", "text": "x", "who": None},
    )
    documents, [problem] = reading(tmp_path, "x.jsonl", text, columns={"who": "groups"})
    assert [(d.doc_id, d.groups) for d in documents] == [("a", ("crew",)), ("c", None)]
    assert problem.source == "x.jsonl:row 2" and "column of groups" in problem.reason


def test_very_many_bad_rows_are_counted(tmp_path: Path) -> None:
    documents, problems = reading(tmp_path, "x.jsonl", lines({"text": "one"}) + "nonsense\n" * 1000)
    assert len(documents) == 1 and len(problems) == 21
    assert problems[-1].reason.startswith("980 more rows")


def test_rows_without_ids_are_named_by_what_they_say(tmp_path: Path) -> None:
    first, _ = reading(tmp_path, "x.csv", "text\none\ntwo\none\n")
    second, [problem] = reading(tmp_path, "x.csv", "text\nzero\none\ntwo\none\n")
    assert {d.doc_id for d in first} < {d.doc_id for d in second}
    assert all(d.doc_id.startswith("x:") for d in second) and len(second) == 3
    assert "is taken" in problem.reason
    assert reading(tmp_path, "x.csv", "text\none\n", document_ids="path")[0][0].doc_id.startswith("x.csv:")


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_csv(tmp_path: Path, separator: str) -> None:
    rows = [
        ["ID", "Text", "Price", "groups"],
        ["a", '"first\nline; and, ""more"""', "4", '"crew,office"'],
        ["b", "two", "", ""],
    ]
    text = "\ufeff" + "\r\n".join(separator.join(row) for row in rows)
    documents, problems = reading(tmp_path, "x.csv", text)
    assert documents == [
        Document("a", "", 'first\nline; and, "more"', "x.csv", {"Price": "4"}, groups=("crew", "office")),
        Document("b", "", "two", "x.csv"),
    ]
    assert problems == []


def test_csv_that_is_wrong(tmp_path: Path) -> None:
    documents, problems = reading(tmp_path, "x.csv", 'id,text\na,one\nb\nc,two,three\nd,four\ne,"open\n')
    assert [d.doc_id for d in documents] == ["a", "d"]
    assert [problem.source for problem in problems] == ["x.csv:row 3", "x.csv:row 4", "x.csv:row 6"]
    for text, reason in (
        ("id,price\na,4\n", "no column of text among 'id', 'price'"),
        ("text,text\na,b\n", "two columns"),
        ("text\n", "empty"),
        ('id,"text" x\na,b\n', "header cannot be read"),
    ):
        documents, [problem] = reading(tmp_path, "x.csv", text)
        assert documents == [] and reason in problem.reason


def test_a_huge_field_is_one_document(tmp_path: Path) -> None:
    documents, problems = reading(tmp_path, "x.csv", f'id,text\na,"{"word " * 1_000_000}"\nb,two\n')
    assert [len(d.text) for d in documents] == [5_000_000, 3] and problems == []


def test_legacy_encodings_of_rows(tmp_path: Path) -> None:
    text = "Die Gebühr für die Überfahrt beträgt vierzig Kronen. Größere Fahrzeuge müssen früher am Kai sein."
    [document], [note] = reading(tmp_path, "x.csv", f"text\n{text}\n".encode("cp1252"))
    assert document.text == text
    assert note.kind == "note" and "read as windows-125" in note.reason


def test_parquet(tmp_path: Path) -> None:
    rows = [
        {"id": n, "text": f"row {n}", "day": date(2026, 1, 1), "cost": Decimal("1.50"), "raw": b"x", "rate": float("nan"), "v": [0.5] * 9000}
        for n in range(300)
    ]  # fmt: skip
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    documents, [note] = read(KnowledgeConfig(documents=str(tmp_path)))
    assert len(documents) == 300
    assert documents[299] == Document("299", "", "row 299", "x.parquet", {"day": "2026-01-01", "cost": "1.50"})
    assert note == Problem("x.parquet", "left out columns that are too large for attributes: v", "note")


def test_what_is_no_parquet_or_holds_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nothing PAR1")
    pyarrow.parquet.write_table(pyarrow.table({"price": [1]}), tmp_path / "b.parquet")
    documents, problems = read(KnowledgeConfig(documents=str(tmp_path)))
    assert documents == []
    assert "cannot be read as Parquet" in problems[0].reason and "no column of text" in problems[1].reason


def test_rows_that_unpack_without_end_are_given_up(tmp_path: Path) -> None:
    table = pyarrow.table({"text": pyarrow.array(["word " * 20_000] * 2000).dictionary_encode()})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    assert (tmp_path / "x.parquet").stat().st_size < 1_000_000
    documents, [problem] = read(KnowledgeConfig(documents=str(tmp_path)))
    assert documents == [] and "unpack to more than" in problem.reason
