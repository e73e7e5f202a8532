"""Listing a directory and reading it: what is taken, in which order, and that nothing bad stops the rest."""

from __future__ import annotations

import os
import pickle
import unicodedata
import uuid
from pathlib import Path
from typing import Any

import fsspec
import pytest

from cluster.config import KnowledgeConfig
from cluster.errors import BadInput, NotFound
from retrieval.read import Problem, Source, read, read_source, sources
from retrieval.types import Document


def reading(directory: Path | str, **settings: Any) -> tuple[list[Document], dict[str, str]]:
    """The documents, and source -> reason of what was skipped."""
    documents, problems = read(KnowledgeConfig(documents=str(directory), **settings))
    return documents, {problem.source: problem.reason for problem in problems if problem.kind == "skipped"}


def listed(directory: Path, **settings: Any) -> list[str]:
    return [source.path for source in sources(KnowledgeConfig(documents=str(directory), **settings))[0]]


def test_reads_recursively_in_path_order_with_titles(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "fares.MD").write_text("Intro.\n\n```\n# a comment\n```\n\n# Fares in C# #\n\nText.")
    (tmp_path / "a.txt").write_text("No heading here.")
    (tmp_path / "c.xlsx").write_bytes(b"PK")
    documents, problems = reading(tmp_path)
    assert [(d.doc_id, d.title, d.source) for d in documents] == [
        ("a", "a", "a.txt"),
        ("fares", "Fares in C#", "b/fares.MD"),
    ]
    assert problems == {}


def test_text_is_nfc_without_byte_order_mark_and_with_unix_line_ends(tmp_path: Path) -> None:
    decomposed = unicodedata.normalize("NFD", "Hoàn vé")
    (tmp_path / unicodedata.normalize("NFD", "vé.md")).write_bytes(
        b"\xef\xbb\xbf" + f"# {decomposed}\r\n\r\nMột.\r\n".encode()
    )
    [document] = reading(tmp_path)[0]
    assert document.title == "Hoàn vé"
    assert document.text == "# Hoàn vé\n\nMột.\n"
    assert document.doc_id == unicodedata.normalize("NFC", "vé")
    assert document.source == unicodedata.normalize("NFC", "vé.md")


def test_bad_files_are_reported_and_the_others_read(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "good.md").write_text("fine")
    (tmp_path / "x" / "good.md").write_text("same name")
    (tmp_path / "latin.md").write_bytes("Gebühr".encode("latin-1"))
    (tmp_path / "empty.md").write_text(" \n")
    (tmp_path / "zero.pdf").touch()
    (tmp_path / "binary.txt").write_bytes(b"a\0b")
    (tmp_path / "gone.md").symlink_to(tmp_path / "nowhere.md")
    os.mkfifo(tmp_path / "pipe.md")
    documents, problems = reading(tmp_path)
    assert [d.text for d in documents] == ["fine"]
    assert set(problems) == {"latin.md", "empty.md", "zero.pdf", "binary.txt", "x/good.md", "gone.md", "pipe.md"}
    assert "good.md" in problems["x/good.md"] and "document_ids" in problems["x/good.md"]
    assert "convert it to UTF-8" in problems["latin.md"]
    assert problems["empty.md"] == problems["zero.pdf"] == "empty"


def test_paths_as_ids_keep_trees_in_which_names_repeat(tmp_path: Path) -> None:
    for place in ("north", "south"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "fares.md").write_text(place)
    documents, problems = reading(tmp_path, document_ids="path")
    assert [(d.doc_id, d.title) for d in documents] == [("north/fares.md", "fares"), ("south/fares.md", "fares")]
    assert problems == {}


def test_hidden_files_are_left_out(tmp_path: Path) -> None:
    hidden = tmp_path / "..2026_data"
    hidden.mkdir()
    (hidden / "a.md").write_text("text")
    (tmp_path / "a.md").symlink_to(hidden / "a.md")
    documents, problems = reading(tmp_path)
    assert [d.source for d in documents] == ["a.md"] and problems == {}


def test_links_in_a_circle_end(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "up").symlink_to(tmp_path)
    (tmp_path / "below" / "a.md").write_text("text")
    (tmp_path / "loop.md").symlink_to(tmp_path / "loop.md")
    documents, problems = reading(tmp_path)
    assert [d.source for d in documents] == ["below/a.md"]
    assert set(problems) == {"loop.md"}


def test_a_huge_file_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "huge.md").open("wb") as file:
        file.truncate(500_000_000)
    (tmp_path / "small.md").write_text("text")
    opened: list[str] = []
    real = Path.open
    monkeypatch.setattr(Path, "open", lambda self, *a, **k: opened.append(self.name) or real(self, *a, **k))
    documents, problems = reading(tmp_path)
    assert opened == ["small.md"] and len(documents) == 1
    assert problems == {
        "huge.md": "holds 500 MB, over knowledge.max_file_mb (100); split it or raise the limit",
    }


def test_a_file_that_grew_after_it_was_listed_is_not_read_whole(tmp_path: Path) -> None:
    knowledge = KnowledgeConfig(documents=str(tmp_path), max_file_mb=0.001)
    (tmp_path / "log.txt").write_text("short")
    [source], _ = sources(knowledge)
    (tmp_path / "log.txt").write_text("long " * 1000)
    documents, [problem] = read_source(source, knowledge)
    assert documents == [] and "max_file_mb" in problem.reason


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_what_may_not_be_read_is_reported(tmp_path: Path) -> None:
    (tmp_path / "secret.md").write_text("text")
    (tmp_path / "secret.md").chmod(0)
    (tmp_path / "closed").mkdir(0)
    _, problems = reading(tmp_path)
    assert problems.keys() == {"secret.md", "closed"}
    (tmp_path / "closed").chmod(0o700)


def test_a_file_that_is_gone_when_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("text")
    knowledge = KnowledgeConfig(documents=str(tmp_path))
    [source], _ = sources(knowledge)
    (tmp_path / "a.md").unlink()
    assert read_source(source, knowledge) == ([], [Problem("a.md", "cannot be read: No such file or directory")])


def test_include_and_exclude(tmp_path: Path) -> None:
    for name in ("a.md", "b.pdf", "handbook/c.md", "handbook/d.pdf", "handbook/old/e.pdf", "drafts/f.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert listed(tmp_path, include=["*.pdf"]) == ["b.pdf", "handbook/d.pdf", "handbook/old/e.pdf"]
    assert listed(tmp_path, include=["handbook/*.pdf"]) == ["handbook/d.pdf"]
    assert listed(tmp_path, include=["handbook/**/*.pdf"]) == ["handbook/d.pdf", "handbook/old/e.pdf"]
    assert listed(tmp_path, include=["handbook/"], exclude=["old"]) == ["handbook/c.md", "handbook/d.pdf"]
    assert listed(tmp_path, exclude=["drafts", "handbook", "?.pdf"]) == ["a.md"]


def test_a_kind_that_nobody_reads_is_said_only_if_it_was_asked_for(tmp_path: Path) -> None:
    (tmp_path / "slides.pptx").write_bytes(b"x")
    (tmp_path / "a.md").write_text("x")
    assert reading(tmp_path)[1] == {}
    found, [problem] = sources(KnowledgeConfig(documents=str(tmp_path), include=["*.pptx"]))
    assert found == [] and problem.source == "slides.pptx" and ".docx" in problem.reason


def test_missing_directory_names_the_setting(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"knowledge\.documents"):
        reading(tmp_path / "nowhere")
    with pytest.raises(NotFound, match=r"knowledge\.documents"):
        read(KnowledgeConfig())


def test_the_stamp_changes_with_the_content(tmp_path: Path) -> None:
    knowledge = KnowledgeConfig(documents=str(tmp_path))
    (tmp_path / "a.md").write_text("one")
    [before], _ = sources(knowledge)
    assert sources(knowledge)[0] == [before] == [pickle.loads(pickle.dumps(before))]  # noqa: S301
    (tmp_path / "a.md").write_text("two")
    os.utime(tmp_path / "a.md", ns=(0, 1))
    [after], _ = sources(knowledge)
    assert after.stamp != before.stamp and after.size == before.size == 3


def test_a_parser_that_fails_in_its_own_way_costs_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RecursionError("too deep")

    monkeypatch.setattr("retrieval.read.html.LexborHTMLParser", fail)
    (tmp_path / "a.html").write_text("<p>x")
    (tmp_path / "b.md").write_text("fine")
    documents, problems = reading(tmp_path)
    assert [d.doc_id for d in documents] == ["b"]
    assert problems == {"a.html": "cannot be read (RecursionError: too deep)"}


@pytest.fixture
def bucket() -> str:
    return f"memory://bucket-{uuid.uuid4().hex}/docs"


def test_a_url_is_read_like_a_directory(bucket: str) -> None:
    fs = fsspec.filesystem("memory")
    for name, text in {"b/fares.md": "# Fares\n\nForty.", "a.txt": "text", ".hidden.md": "no", "c.bin": "no"}.items():
        fs.pipe_file(f"{bucket}/{name}", text.encode())
    documents, problems = reading(bucket)
    assert [(d.doc_id, d.title, d.source) for d in documents] == [("a", "a", "a.txt"), ("fares", "Fares", "b/fares.md")]
    assert problems == {}
    [source, _], _ = sources(KnowledgeConfig(documents=bucket))
    assert source == Source("a.txt", bucket.replace("//", "///") + "/a.txt", 4, source.stamp) and source.stamp


def test_a_url_with_nothing_below_it_or_of_no_known_kind(bucket: str) -> None:
    with pytest.raises(NotFound, match="nothing is there"):
        reading(bucket)
    with pytest.raises(BadInput, match="cannot be opened"):
        reading("nosuch://bucket/x")
