"""The cleaned copy: what check then finds no more, what it says it changed, and what is left if it is killed."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.config import Config
from cluster.errors import BadInput
from tests.unit.training.data.test_check import ANSWER, QUESTION, checked, row, write
from training.data import fix
from training.data.fix import CHANGES, clean, mend
from training.data.rows import AnyRow, Row, Text
from training.data.text_quality import REPAIRED

Make = Callable[..., Config]
AWS = "AKIA" + "IOSFODNN7EXAMPLE"


def lines(file: str | Path) -> list[Any]:
    return [json.loads(line) for line in Path(file).read_text(encoding="utf-8").split("\n") if line]


def dirty(tmp_path: Path) -> str:
    return write(
        tmp_path / "rows.jsonl",
        row("clean", "Who may board first?", "Whoever holds a shell card."),
        row("broken", "Is it schÃ¶n\u200b?", unicodedata.normalize("NFD", "Tiền\x07 đây")),
        "{oops",
        row("copy", "who may BOARD first", "Whoever holds a shell card"),
        row("private", f"Is {AWS} a key?", "Ask anna.lee@corvane.co.uk."),
        row("lost", "What is left?", "Nothing.")
        | {"messages": [{"role": "user", "content": "\u200b"}, {"role": "assistant", "content": "No."}]},
    )


def test_the_copy_is_clean_of_all_that_is_repaired(make_config: Make, tmp_path: Path) -> None:
    source = dirty(tmp_path)
    before = Path(source).read_bytes()
    config = make_config()
    fixed = fix.write(checked(config, {"data.train": [source]}), tmp_path / "out", scrub=True)
    copy = fixed.files[source]
    again = checked(config, {"data.train": [copy]}).report
    assert again.findings == []
    assert [each["id"] for each in lines(copy)] == ["clean", "broken", "private"]
    assert lines(copy)[1]["messages"] == [
        {"role": "user", "content": "Is it schön?"},
        {"role": "assistant", "content": "Tiền đây"},
    ]
    assert (fixed.read, fixed.written) == (5, 3)
    assert fixed.changes == {
        "dropped: duplicate": 1,
        "dropped: error": 1,
        "dropped: nothing left": 1,
        "repaired: control characters": 1,
        "repaired: invisible characters": 1,
        "repaired: mojibake": 1,
        "repaired: not NFC": 1,
        "replaced: email address": 1,
        "replaced: AWS Access Key": 1,
    }
    assert Path(source).read_bytes() == before


def test_without_scrub_secrets_stay_and_are_still_told(make_config: Make, tmp_path: Path) -> None:
    source = dirty(tmp_path)
    config = make_config()
    fixed = fix.write(checked(config, {"data.train": [source]}), tmp_path / "out")
    again = checked(config, {"data.train": [fixed.files[source]]}).report
    assert {finding.kind for finding in again.findings} == {"secret: AWS Access Key", "personal data: email address"}


def test_the_diff_has_a_row_a_line_and_keeps_no_secret(make_config: Make, tmp_path: Path) -> None:
    source = dirty(tmp_path)
    fix.write(checked(make_config(), {"data.train": [source]}), tmp_path / "out", scrub=True)
    diff = (tmp_path / "out" / CHANGES).read_text(encoding="utf-8")
    told = diff.splitlines()
    assert told[0].startswith(f"# dropped: {source}:3: row: cannot be read")
    assert told[1:3] == [f"--- {source} (as read)", f"+++ {tmp_path}/out/rows.jsonl"]
    assert [line for line in told if line.startswith("@@")] == [
        "@@ -2 +2 @@",
        "@@ -3 +2,0 @@",
        "@@ -4 +3 @@",
        "@@ -5 +3,0 @@",
    ]
    assert (
        json.loads(next(line for line in told if line.startswith('+{"id":"private"'))[1:])
        == lines(tmp_path / "out/rows.jsonl")[2]
    )
    assert "<SECRET AK… (20 characters)>" in diff
    assert AWS not in diff and "anna.lee" not in diff


def test_clean_rows_are_written_as_they_are(make_config: Make, tmp_path: Path) -> None:
    rows = [
        row("a", "Why?", "No.", kind="single", evidence=[{"document": "d", "quote": "a\u200bq"}], groups=["crew"]),
        row("b", "Where?", "", kind="none", language="vi", evidence=[]),
        row("c", "When?", "Now.")
        | {"messages": [{"role": "user", "content": "When?"}, {"role": "assistant", "content": "Now.", "train": True}]},
    ]
    source = write(tmp_path / "rows.jsonl", *rows)
    found = checked(make_config(), {"data.train": [source]})
    fixed = fix.write(found, tmp_path / "out", scrub=True)
    again = checked(make_config(), {"data.train": [fixed.files[source]]})
    assert [item.row for item in again.rows] == [item.row for item in found.rows]
    assert fixed.changes == {}
    assert (tmp_path / "out" / CHANGES).read_text().count("\n") == 2


def test_every_source_has_a_copy_of_its_own(make_config: Make, tmp_path: Path) -> None:
    for name in ("one", "two", "docs"):
        (tmp_path / name).mkdir()
    first = write(tmp_path / "one" / "rows.jsonl", row("a"))
    second = write(tmp_path / "two" / "rows.jsonl", row("b"), row("c", "Why?", "No."))
    found = checked(make_config(), {"data.train": [first], "data.validation": [second]})
    fixed = fix.write(found, tmp_path / "out")
    assert {Path(file).name for file in fixed.files.values()} == {"rows.jsonl", "rows-2.jsonl"}
    # A copy of a training row is left out of validation.
    assert [each["id"] for each in lines(fixed.files[second])] == ["c"]


def test_raw_texts_become_rows(make_config: Make, tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "tariff.md").write_text("# Tariff\n\nIt is schÃ¶n.\n")
    config = make_config("training.objective=domain")
    fixed = fix.write(checked(config, {"data.train": [str(tmp_path / "docs")]}), tmp_path / "out")
    (text,) = lines(tmp_path / "out" / "docs.jsonl")
    assert (text["text"], text["document"]) == ("# Tariff\n\nIt is schön.\n", "tariff")
    assert checked(config, {"data.train": list(fixed.files.values())}).report.findings == []


def test_a_directory_with_something_in_it_is_refused_unless_forced(make_config: Make, tmp_path: Path) -> None:
    found = checked(make_config(), {"data.train": [write(tmp_path / "rows.jsonl", row("a"))]})
    out = tmp_path / "out"
    out.mkdir()
    fix.write(found, out)  # an empty one is fine
    (out / "note.txt").write_text("mine")
    with pytest.raises(BadInput, match="is not empty; name another directory, or replace it with --force"):
        fix.write(found, out)
    assert (out / "note.txt").read_text() == "mine"
    fix.write(found, out, force=True)
    assert sorted(path.name for path in out.iterdir()) == [CHANGES, "rows.jsonl"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "rows.jsonl"]


@pytest.mark.parametrize("where", [".", "data", "data/rows.jsonl", "data/more/out"])
def test_sources_are_never_overwritten(where: str, make_config: Make, tmp_path: Path) -> None:
    (tmp_path / "data" / "more").mkdir(parents=True)
    write(tmp_path / "data" / "rows.jsonl", row("a"))
    found = checked(make_config(), {"data.train": [str(tmp_path / "data")]})
    with pytest.raises(BadInput, match=r"holds the source .* or lies in it; name another directory"):
        fix.write(found, tmp_path / where, force=True)
    assert lines(tmp_path / "data" / "rows.jsonl")[0]["id"] == "a"


def test_a_failure_in_the_middle_leaves_what_was_there(
    make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = checked(make_config(), {"data.train": [write(tmp_path / "rows.jsonl", row("a"), row("b", "Why?", "No."))]})
    fix.write(found, tmp_path / "out")
    real = mend
    monkeypatch.setattr(fix, "mend", lambda each, scrub: real(each) if each.id == "a" else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fix.write(found, tmp_path / "out", force=True)
    assert [each["id"] for each in lines(tmp_path / "out" / "rows.jsonl")] == ["a", "b"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "rows.jsonl"]


def test_what_a_killed_call_left_is_removed(make_config: Make, tmp_path: Path) -> None:
    found = checked(make_config(), {"data.train": [write(tmp_path / "rows.jsonl", row("a"))]})
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "half.jsonl").write_text("{")
    fix.write(found, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [CHANGES, "rows.jsonl"]
    assert not (tmp_path / ".out.partial").exists()


def test_quotes_are_only_composed() -> None:
    decomposed = unicodedata.normalize("NFD", "Tiền")
    given_row = Row.model_validate(row("a", evidence=[{"document": "d", "quote": f"{decomposed}\u200b schÃ¶n"}]))
    mended = mend(given_row)
    assert isinstance(mended, Row) and mended.evidence
    assert mended.evidence[0].quote == "Tiền\u200b schÃ¶n"


TEXTS = st.text(
    st.one_of(
        st.characters(exclude_categories=["Cs"]),
        st.sampled_from("ÃÂ¡\xa0â€™œ\u0301\u0338\u200b\u200d\r\n\x07\x85\ufffdđệ@.+:/ 4"),
    ),
    min_size=1,
)
PIECES = st.lists(st.one_of(TEXTS, st.sampled_from([AWS, "a.b@c.io", "+44 20 7946 0958", "8.8.8.8", "://a:b@"]))).map(
    "".join
)


@given(PIECES, st.booleans())
def test_cleaning_what_is_clean_changes_nothing(text: str, scrub: bool) -> None:
    once = clean(text, "en", scrub=scrub)
    assert clean(once, "en", scrub=scrub) == once


@given(st.lists(PIECES.filter(str.strip), min_size=1, max_size=3), st.booleans())
def test_mending_what_is_mended_changes_nothing(texts: list[str], scrub: bool) -> None:
    rows: list[AnyRow] = [Text(id="t", text=texts[0])]
    rows.append(Row.model_validate(row("r", texts[0], texts[-1])))
    for each in rows:
        once = mend(each, scrub=scrub)
        if once is not None:
            assert mend(once, scrub=scrub) == once
            assert type(once).model_validate_json(once.model_dump_json(exclude_defaults=True)) == once


def test_all_that_is_called_repaired_is(make_config: Make, tmp_path: Path) -> None:
    source = write(
        tmp_path / "rows.jsonl",
        *(row(str(n), f"{QUESTION} {damage}", ANSWER) for n, damage in enumerate(["Ã¡", "e\u0301", "\x01", "\u2060"])),
    )
    found = checked(make_config(), {"data.train": [source]})
    assert {finding.kind for finding in found.report.findings} >= REPAIRED
    fixed = fix.write(found, tmp_path / "out")
    again = checked(make_config(), {"data.train": [fixed.files[source]]})
    assert not REPAIRED & {finding.kind for finding in again.report.findings}
