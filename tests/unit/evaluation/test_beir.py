"""Reading a folder in BEIR layout, and what is said of one that is broken."""

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import BadInput, NotFound
from evaluation.beir import read_beir

CORPUS = [
    {"_id": "d1", "title": "Ferries", "text": "The ferry leaves at six."},
    {"_id": "d2", "title": "Trạm sạc", "text": ""},
    {"_id": "d3", "text": "No title here."},
    {"_id": "d4", "title": "", "text": ""},
]
QUERIES = [{"_id": "q1", "text": "when does the ferry leave"}, {"_id": "q2", "text": "not judged"}]
QRELS = "query-id\tcorpus-id\tscore\nq1\td1\t2\nq1\td2\t0\n"


def folder(root: Path, corpus: list[Any] = CORPUS, queries: list[Any] = QUERIES, qrels: str = QRELS) -> Path:
    (root / "qrels").mkdir(parents=True)
    (root / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in corpus), encoding="utf-8")
    (root / "queries.jsonl").write_text("".join(json.dumps(row) + "\n\n" for row in queries), encoding="utf-8")
    (root / "qrels" / "test.tsv").write_text(qrels, encoding="utf-8")
    return root


def test_documents_questions_and_judgements(tmp_path: Path) -> None:
    read = read_beir(folder(tmp_path / "ferries"))
    assert read.name == "ferries"
    assert [(d.doc_id, d.title, d.text) for d in read.documents] == [
        ("d1", "Ferries", "The ferry leaves at six."),
        ("d2", "Trạm sạc", "Trạm sạc"),
        ("d3", "", "No title here."),
        ("d4", "", ""),
    ]
    assert read.queries == {"q1": "when does the ferry leave"}
    assert read.judgements == {"q1": {"d1": 2, "d2": 0}}


def test_text_is_composed(tmp_path: Path) -> None:
    decomposed = {"_id": "d1", "title": "", "text": "tra\u0323m"}
    assert read_beir(folder(tmp_path / "a", [decomposed], qrels="q1\td1\t1\n")).documents[0].text == "trạm"


def test_another_split_and_no_line_of_names(tmp_path: Path) -> None:
    root = folder(tmp_path / "a")
    (root / "qrels" / "dev.tsv").write_text("q2\td3\t1\n", encoding="utf-8")
    assert read_beir(root, "dev").queries == {"q2": "not judged"}
    with pytest.raises(NotFound, match=r"qrels.train\.tsv is missing"):
        read_beir(root, "train")


@pytest.mark.parametrize("name", ["corpus.jsonl", "queries.jsonl", "qrels/test.tsv"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    root = folder(tmp_path / "a")
    (root / name).unlink()
    with pytest.raises(NotFound, match=f"{name} is missing; a BEIR folder holds"):
        read_beir(root)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"corpus": [CORPUS[0], {"_id": "d9"}]}, r"corpus\.jsonl:2: 'text' must be a text, not None"),
        ({"corpus": [{"text": "x"}]}, r"corpus\.jsonl:1: '_id' must be a text"),
        ({"corpus": [{"_id": 7, "text": "x"}]}, r"corpus\.jsonl:1: '_id' must be a text that is not empty, not 7"),
        ({"corpus": [CORPUS[0], CORPUS[0]]}, r"corpus\.jsonl:2: document 'd1' stands there twice"),
        ({"corpus": [["d1", "x"]]}, r"corpus\.jsonl:1: a list instead of an object"),
        ({"queries": [QUERIES[0], QUERIES[0]]}, r"queries\.jsonl:3: query 'q1' stands there twice"),
        ({"qrels": "q1\td1\t1\nq1\td7\t1\n"}, r"test\.tsv:2: document 'd7' is not in corpus\.jsonl"),
        ({"qrels": "q8\td1\t1\n"}, r"test\.tsv:1: query 'q8' is not in queries\.jsonl"),
        ({"qrels": "q1 d1 1\n"}, r"test\.tsv:1: 1 columns instead of 3"),
        ({"qrels": "q1\td1\tyes\n"}, r"test\.tsv:1: the score 'yes' is not a whole number"),
        ({"qrels": "q1\td1\t0\n"}, r"names no relevant document"),
    ],
)
def test_a_broken_row_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        read_beir(folder(tmp_path / "a", **change))


def test_what_is_not_json_or_not_utf8(tmp_path: Path) -> None:
    root = folder(tmp_path / "a")
    (root / "corpus.jsonl").write_text('{"_id": "d1", "text": "x"}\n{oops\n', encoding="utf-8")
    with pytest.raises(BadInput, match=r"corpus\.jsonl:2: not valid JSON"):
        read_beir(root)
    (root / "corpus.jsonl").write_bytes('{"_id": "d1", "text": "trạm"}\n'.encode("utf-16"))
    with pytest.raises(BadInput, match=r"corpus\.jsonl cannot be read"):
        read_beir(root)
