"""Rows on disk: what is read, and what a bad row is told."""

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import BadInput, NotFound
from training.data.examples import digest
from training.data.rows import Row, read_rows

GOOD: dict[str, Any] = {
    "id": "t1",
    "messages": [{"role": "user", "content": "How much?"}, {"role": "assistant", "content": "5 crowns"}],
    "evidence": [{"document": "tariff", "quote": "costs 5 crowns"}],
}


def write(tmp_path: Path, *rows: Any, name: str = "rows.jsonl") -> Path:
    file = tmp_path / name
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def test_rows_come_in_the_order_of_the_files(tmp_path: Path) -> None:
    first = write(tmp_path, GOOD, "", GOOD | {"id": "t2"}, name="a.jsonl")
    second = write(tmp_path, GOOD | {"id": "t0"}, name="b.jsonl")
    assert [row.id for row in read_rows([first, second])] == ["t1", "t2", "t0"]


def test_a_row_knows_its_reference_and_its_conversation(tmp_path: Path) -> None:
    (row,) = read_rows([write(tmp_path, GOOD)])
    assert row.conversation == [{"role": "user", "content": "How much?"}]
    assert (row.reference, row.answerable, row.documents) == ("5 crowns", True, ("tariff",))


def test_a_row_with_empty_evidence_is_not_answerable(tmp_path: Path) -> None:
    messages = [GOOD["messages"][0], {"role": "assistant", "content": ""}]
    (row,) = read_rows([write(tmp_path, {"id": "n", "kind": "none", "messages": messages, "evidence": []})])
    assert not row.answerable


@pytest.mark.parametrize("separator", ["\u2028", "\u0085", "\x1c"])
def test_only_a_line_feed_ends_a_row(tmp_path: Path, separator: str) -> None:
    quote = f"costs{separator}5 crowns"
    line = json.dumps(GOOD | {"evidence": [{"document": "tariff", "quote": quote}]}, ensure_ascii=separator < " ")
    (row,) = read_rows([write(tmp_path, line)])
    assert row.evidence[0].quote == quote


def test_carriage_returns_do_not_count(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes((json.dumps(GOOD) + "\r\n" + json.dumps(GOOD | {"id": "t2"}) + "\r\n").encode())
    assert len(read_rows([file])) == 2


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"id": ""}, "id: "),
        ({"extra": 1}, "extra: Extra inputs are not permitted"),
        ({"kind": "three"}, "kind: "),
        ({"messages": GOOD["messages"][:1]}, "messages: "),
        ({"messages": GOOD["messages"][::-1]}, "row: messages must end with a user message"),
        (
            {"messages": [GOOD["messages"][0], {"role": "assistant", "content": " "}]},
            "row: the reference answer is empty",
        ),
        ({"evidence": [{"document": "tariff", "quote": ""}]}, "evidence.0.quote: "),
        ({"messages": [{"role": "robot", "content": ""}, *GOOD["messages"]]}, "messages.0.role: "),
    ],
)
def test_a_bad_row_is_named_by_file_line_and_field(tmp_path: Path, change: dict[str, Any], problem: str) -> None:
    file = write(tmp_path, GOOD, GOOD | {"id": "t2"} | change)
    with pytest.raises(BadInput) as caught:
        read_rows([file])
    assert str(caught.value).startswith(f"{file}:2: {problem}")


def test_a_line_that_is_no_json_is_named(tmp_path: Path) -> None:
    file = write(tmp_path, GOOD, "{oops")
    with pytest.raises(BadInput, match=r"rows\.jsonl:2: row: Invalid JSON"):
        read_rows([file])


def test_an_id_is_used_once_over_all_files(tmp_path: Path) -> None:
    first, second = write(tmp_path, GOOD, name="a.jsonl"), write(tmp_path, GOOD, name="b.jsonl")
    with pytest.raises(BadInput, match=r"b\.jsonl:1: id: 't1' was already used at .*a\.jsonl:1"):
        read_rows([first, second])


def test_all_problems_are_told_but_at_most_ten(tmp_path: Path) -> None:
    file = write(tmp_path, *[GOOD | {"id": ""}] * 12)
    with pytest.raises(BadInput) as caught:
        read_rows([file])
    lines = str(caught.value).splitlines()
    assert len(lines) == 11
    assert lines[-1] == "… and 2 more"


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"gone\.jsonl: no such file; data\.train"):
        read_rows([tmp_path / "gone.jsonl"])


def test_the_digest_follows_content_and_order() -> None:
    one, two = Row(**GOOD), Row(**GOOD | {"id": "t2"})
    assert digest([one, two]) == digest([Row(**GOOD), two])
    assert len({digest([one, two]), digest([two, one]), digest([one])}) == 3


def test_a_file_that_is_not_utf_8_is_named(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes('{"id": "Fähre"}'.encode("latin-1"))
    with pytest.raises(BadInput, match="not UTF-8"):
        read_rows([file])
