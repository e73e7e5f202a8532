"""Everything shipped as an example: configurations load, and the sample trade is what docs/data.md says of it."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from cluster.config import KnowledgeConfig, load
from retrieval.read import read
from training.data.grounded import holds
from training.data.rows import Row, read_rows

ROOT = Path(__file__).parents[2]
TRADE = ROOT / "examples/corvane"
CONFIGS = sorted([*ROOT.glob("examples/**/metier*.yaml"), *ROOT.glob("k8s/chart/files/*.yaml")])


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: str(file.relative_to(ROOT)))
def test_configurations_load(file: Path) -> None:
    assert load(file).name


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    documents, problems = read(KnowledgeConfig(documents=str(TRADE / "documents")))
    assert not problems
    return {document.doc_id: document.text for document in documents}


@pytest.fixture(scope="module")
def rows() -> dict[str, list[Row]]:
    return {name: read_rows([TRADE / f"{name}.jsonl"]) for name in ("train", "heldout", "heldout.vi")}


def test_documents(texts: dict[str, str]) -> None:
    assert len(texts) >= 40
    assert sum(name.startswith("vi-") for name in texts) >= 4
    for name, text in texts.items():
        assert 150 <= len(text.split()) <= 600, name
    linked = re.findall(r"\(((?:policy|tariff|procedure|equipment|incident)-[a-z0-9-]+)\)", " ".join(texts.values()))
    assert len(linked) >= len(texts)
    assert set(linked) <= set(texts), "a document refers to one that is not there"


def test_rows_are_as_many_and_as_mixed_as_they_should_be(rows: dict[str, list[Row]]) -> None:
    assert len(rows["train"]) >= 240
    kinds = Counter(row.kind for row in rows["heldout"])
    assert sum(kinds.values()) >= 80
    assert min(kinds["none"], kinds["two"], kinds["multi"]) >= 12
    assert all(row.language == "vi" for row in rows["heldout.vi"])


def test_every_quote_stands_in_its_document(rows: dict[str, list[Row]], texts: dict[str, str]) -> None:
    for row in (row for part in rows.values() for row in part):
        for evidence in row.evidence:
            assert holds(texts[evidence.document], evidence.quote), row.id
        assert (row.kind == "none") == (not row.evidence), row.id
        assert row.kind != "two" or len(row.documents) == 2, row.id
        assert len(row.reference.split()) <= 12, row.id


def test_nothing_held_out_is_trained_on(rows: dict[str, list[Row]]) -> None:
    trained = {document for row in rows["train"] for document in row.documents}
    judged = {document for part in ("heldout", "heldout.vi") for row in rows[part] for document in row.documents}
    assert not trained & judged
    questions = {row.messages[-2].content.casefold() for row in rows["train"] if row.kind != "multi"}
    assert not questions & {row.messages[-2].content.casefold() for row in rows["heldout"] if row.kind != "multi"}
