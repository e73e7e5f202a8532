"""Rows built from a real index go through training's own grounding on that index."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.config import Config
from cluster.errors import BadInput, NotFound
from metier.data_build import build
from retrieval.types import Chunk
from tests import trade
from training.data.grounded import ground_rows, holds
from training.data.live import Live, open_live
from training.data.rows import Row, read_rows


@pytest.fixture(scope="module")
def lamps(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Config]]:
    directory = tmp_path_factory.mktemp("lamps")
    config = trade.configure(directory)
    trade.index(config)
    yield directory, config
    trade.assert_no_children()


def templates(directory: Path) -> Path:
    file = directory / "t.yaml"
    file.write_text(
        "templates:\n"
        "  - {pattern: 'The (?P<subject>\\w+ lamp) has (?P<glass>\\w+) glass', "
        "question: 'Which colour is the glass of {subject}?', answer: '{glass}'}\n"
        "  - {pattern: 'of the (?P<subject>\\w+ lamp) burns (?P<long>\\w+ hours)', "
        "question: 'For what time does {subject} burn on one filling?', answer: '{long}'}\n"
    )
    return file


def built(directory: Path, *options: str) -> tuple[dict[str, object], list[Row]]:
    import typer

    app = typer.Typer()
    app.command()(build)
    output = directory / "rows.jsonl"
    arguments = ["-c", str(directory / "metier.yaml"), "-o", str(output), "--force", "--json", *options]
    ran = CliRunner().invoke(app, arguments, catch_exceptions=False, standalone_mode=False)
    if ran.exception:
        raise ran.exception
    return json.loads(ran.stdout), read_rows([output])


def test_built_rows_ground_on_the_index_they_came_from(lamps: tuple[Path, Config]) -> None:
    directory, config = lamps
    report, rows = built(
        directory, "--builder", "template", "--templates", str(templates(directory)), "--findable", "--none", "0"
    )
    assert report["documents_avoided"] == 2
    assert not {"lamp-alder", "lamp-birch"} & {document for row in rows for document in row.documents}
    kinds = {row.kind for row in rows}
    assert {"single", "two", "multi"} <= kinds
    assert sum(row.kind == "single" for row in rows) == 12
    with open_live(config, trade.registry(config)) as live:
        chunks = by_document(live)
        for share in (0.0, 0.5):
            examples = list(
                ground_rows(
                    rows,
                    config.prompt,
                    retrieve=live.retrieve,
                    chunks_of=lambda document: chunks[document],
                    count_tokens=lambda text: len(text.split()),
                    top_k=config.retrieval.top_k,
                    no_gold_share=share,
                    seed=5,
                )
            )
            declined = 0
            for row, example in zip(rows, examples, strict=True):
                gold = {
                    chunk.chunk_id
                    for item in row.evidence or ()
                    for chunk in chunks[item.document]
                    if holds(chunk.text, item.quote)
                }
                if example.answer == config.prompt.decline:
                    declined += 1
                    assert not gold & set(example.chunks)
                else:
                    assert gold & set(example.chunks)
                    assert example.answer.startswith(row.reference)
            assert declined == 0 if share == 0 else 0 < declined < len(rows)


def by_document(live: Live) -> dict[str, list[Chunk]]:
    chunks: dict[str, list[Chunk]] = defaultdict(list)
    for chunk in live.chunks:
        chunks[chunk.doc_id].append(chunk)
    return chunks


def test_an_output_that_is_there_is_not_replaced_unasked(lamps: tuple[Path, Config]) -> None:
    directory, _ = lamps
    output = directory / "mine.jsonl"
    output.write_text("mine")
    with pytest.raises(BadInput, match="is already there; add --force to replace it"):
        build(output=output, config=directory / "metier.yaml")
    assert output.read_text() == "mine"


def test_a_reader_without_rights_builds_nothing(lamps: tuple[Path, Config]) -> None:
    directory, _ = lamps
    with pytest.raises(NotFound, match="holds nothing that tenant 'default' and groups nobody may read"):
        built(directory, "--set", "knowledge.groups=[nobody]")
    with pytest.raises(NotFound, match="knowledge 'other' is empty or not there; run `metier index`"):
        built(directory, "--set", "knowledge.name=other")
