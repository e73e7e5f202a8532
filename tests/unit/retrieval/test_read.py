import unicodedata
from pathlib import Path

import pytest

from cluster.errors import NotFound
from retrieval.read import read


def test_reads_recursively_in_path_order_with_titles(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "fares.MD").write_text("Intro.\n\n# Fares in C# #\n\nText.")
    (tmp_path / "a.txt").write_text("No heading here.")
    (tmp_path / "c.pdf").write_bytes(b"%PDF")
    documents, problems = read(tmp_path)
    assert [(d.doc_id, d.title, d.source) for d in documents] == [
        ("a", "a", "a.txt"),
        ("fares", "Fares in C#", "b/fares.MD"),
    ]
    assert problems == []


def test_text_is_nfc_without_byte_order_mark_and_with_unix_line_ends(tmp_path: Path) -> None:
    decomposed = unicodedata.normalize("NFD", "Hoàn vé")
    (tmp_path / "vé.md").write_bytes(b"\xef\xbb\xbf" + f"# {decomposed}\r\n\r\nMột.\r\n".encode())
    [document] = read(tmp_path)[0]
    assert document.title == "Hoàn vé"
    assert document.text == "# Hoàn vé\n\nMột.\n"
    assert document.doc_id == unicodedata.normalize("NFC", "vé")


def test_bad_files_are_reported_and_the_others_read(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "good.md").write_text("fine")
    (tmp_path / "x" / "good.md").write_text("same name")
    (tmp_path / "latin.md").write_bytes("Gebühr".encode("latin-1"))
    (tmp_path / "empty.md").write_text(" \n")
    (tmp_path / "binary.txt").write_bytes(b"a\0b")
    (tmp_path / "gone.md").symlink_to(tmp_path / "nowhere.md")
    documents, problems = read(tmp_path)
    assert [d.text for d in documents] == ["fine"]
    reasons = {problem.source: problem.reason for problem in problems}
    assert set(reasons) == {"latin.md", "empty.md", "binary.txt", "x/good.md", "gone.md"}
    assert "good.md" in reasons["x/good.md"] and "UTF-8" in reasons["latin.md"]


def test_hidden_files_are_left_out(tmp_path: Path) -> None:
    hidden = tmp_path / "..2026_data"
    hidden.mkdir()
    (hidden / "a.md").write_text("text")
    (tmp_path / "a.md").symlink_to(hidden / "a.md")
    documents, problems = read(tmp_path)
    assert [d.source for d in documents] == ["a.md"] and problems == []


def test_missing_directory_names_the_setting(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"knowledge\.documents"):
        read(tmp_path / "nowhere")
