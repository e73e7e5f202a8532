"""Documents from a real S3 server (moto's, on loopback, in a process of its own)."""

from __future__ import annotations

from typing import Any

import fsspec
import pyarrow
import pyarrow.parquet
import pytest

from cluster.config import KnowledgeConfig
from cluster.errors import NotFound, Unavailable
from retrieval.read import read, read_source, sources
from tests.unit.retrieval.samples import page, pdf


def test_documents_of_every_kind_come_from_a_bucket(s3: dict[str, Any]) -> None:
    fs = fsspec.filesystem("s3", **s3)
    fs.mkdir("documents")
    fs.pipe_file("documents/trade/a.md", b"# Fares\n\nForty.")
    fs.pipe_file("documents/trade/sub/b é.pdf", pdf([page(["The ferry leaves at seven."])]))
    fs.pipe_file("documents/trade/.hidden/c.md", b"no")
    fs.pipe_file("documents/trade/large.txt", b"x" * 200_000)
    fs.pipe_file("documents/other/d.md", b"no")
    with fs.open("documents/trade/e.parquet", "wb") as file:
        pyarrow.parquet.write_table(pyarrow.table({"id": ["e1"], "text": ["a row"]}), file)
    knowledge = KnowledgeConfig(documents="s3://documents/trade", max_file_mb=0.1)
    documents, [problem] = read(knowledge, s3)
    assert [(d.doc_id, d.source, d.text) for d in documents] == [
        ("a", "a.md", "# Fares\n\nForty."),
        ("e1", "e.parquet", "a row"),
        ("b é", "sub/b é.pdf", "The ferry leaves at seven."),
    ]
    assert problem.source == "large.txt" and "max_file_mb" in problem.reason

    before = {source.path: source.stamp for source in sources(knowledge, s3)[0]}
    fs.pipe_file("documents/trade/a.md", b"# Fares\n\nFifty.")
    after = {source.path: source.stamp for source in sources(knowledge, s3)[0]}
    assert {path for path in before if before[path] != after[path]} == {"a.md"}


def test_a_bucket_that_is_not_there_and_an_object_that_is_gone(s3: dict[str, Any]) -> None:
    with pytest.raises(NotFound, match="s3://nobody-made-this/x"):
        read(KnowledgeConfig(documents="s3://nobody-made-this/x"), s3)
    fs = fsspec.filesystem("s3", **s3)
    fs.mkdir("fleeting")
    fs.pipe_file("fleeting/a.md", b"text")
    knowledge = KnowledgeConfig(documents="s3://fleeting")
    [source], _ = sources(knowledge, s3)
    fs.rm("fleeting/a.md")
    documents, [problem] = read_source(source, knowledge, s3)
    assert documents == [] and problem.reason.startswith("cannot be read")


def test_a_store_that_does_not_answer_is_no_bad_file(s3: dict[str, Any]) -> None:
    """Otherwise every document of it would be taken for deleted."""
    fs = fsspec.filesystem("s3", **s3)
    fs.mkdir("silent")
    fs.pipe_file("silent/a.md", b"text")
    knowledge = KnowledgeConfig(documents="s3://silent")
    [source], _ = sources(knowledge, s3)
    nowhere = s3 | {"endpoint_url": "http://127.0.0.1:9", "config_kwargs": {"retries": {"max_attempts": 0}}}
    with pytest.raises(Unavailable, match=r"s3://silent/a\.md cannot be read"):
        read_source(source, knowledge, nowhere)
    with pytest.raises(Unavailable, match="s3://silent cannot be listed"):
        sources(knowledge, nowhere)
