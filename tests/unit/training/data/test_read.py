"""Files of every kind: which records they hold, where each stands, and what is said of what cannot be read."""

import csv
import json
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.config import DataConfig
from cluster.errors import BadInput, ConfigError, NotFound
from training.data.load import load_rows, scan
from training.data.problems import Problem
from training.data.read import Record, records
from training.data.rows import Row, Text, read_rows

ROWS = [{"prompt": "How much?", "completion": "5 crowns"}, {"prompt": 'Wie viel,\n"heute"?', "completion": "6 crowns"}]
CHAT = {"messages": [{"role": "user", "content": "How much?"}, {"role": "assistant", "content": "5 crowns"}]}
ROOT = Path(__file__).parents[4]


def write(file: Path, rows: Sequence[Any]) -> Path:
    """`rows` in the format of the ending."""
    match file.suffix:
        case ".parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), file)
        case ".json":
            file.write_text(json.dumps(rows), encoding="utf-8")
        case ".csv" | ".tsv":
            with file.open("w", newline="", encoding="utf-8") as out:
                table = csv.DictWriter(out, list(rows[0]), delimiter="\t" if file.suffix == ".tsv" else ",")
                table.writeheader()
                table.writerows(rows)
        case _:
            file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return file


def problems(source: Path | str) -> list[str]:
    return [str(record) for record in records(str(source)) if isinstance(record, Problem)]


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".parquet", ".csv", ".tsv"])
def test_every_format_gives_the_same_rows(tmp_path: Path, ending: str) -> None:
    file = write(tmp_path / f"rows{ending}", ROWS)
    found = list(records(str(file)))
    separator = ":" if ending == ".jsonl" else ":row "
    assert found == [Record(f"{file}{separator}{number}", row) for number, row in enumerate(ROWS, 1)]


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv"])
def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path: Path, ending: str) -> None:
    file = write(tmp_path / f"rows{ending}", ROWS)
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert [record.fields for record in records(str(file)) if isinstance(record, Record)] == ROWS


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085", "\x1c", "\r"])
def test_only_a_line_feed_ends_a_record(tmp_path: Path, separator: str) -> None:
    file = tmp_path / "rows.jsonl"
    line = json.dumps({"text": f"one{separator}two"}, ensure_ascii=separator < " ")
    file.write_bytes(f"{line}\r\n\r\n{line}".encode())
    assert list(records(str(file))) == [Record(f"{file}:{n}", {"text": f"one{separator}two"}) for n in (1, 3)]


@given(st.lists(st.dictionaries(st.text(), st.text()), max_size=5))
def test_whatever_json_lines_hold_comes_back(rows: list[dict[str, str]]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        file = write(Path(directory) / "rows.jsonl", rows)
        assert [record.fields for record in records(str(file)) if isinstance(record, Record)] == rows


def test_json_may_be_one_object_a_line_but_not_one_object(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_text("\n" + "".join(json.dumps(row) + "\n" for row in ROWS))
    assert len([record for record in records(str(file)) if isinstance(record, Record)]) == 2
    file.write_text(json.dumps({"data": ROWS}, indent=1))
    assert problems(file) == [f"{file}: file: holds one dict; write a list of objects, or one object a line"]


def test_bad_lines_hide_no_good_ones(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{oops\n{"text": "good"}\n[1]\n{"text": "F\xe4hre"}\n{"text": "\\ud800"}\n{"text": "too"}\n')
    assert [r.fields["text"] for r in records(str(file)) if isinstance(r, Record)] == ["good", "too"]
    one, three, four, five = problems(file)
    assert one.startswith(f"{file}:1: row: cannot be read (key must be a string")
    assert three == f"{file}:3: row: is a list, not an object; write one {{…}} for each row"
    assert four.endswith("UTF-8 breaks off at byte 11); write it again as UTF-8, for example with iconv")
    assert five.startswith(f"{file}:5: row: cannot be read (") and five.endswith("; mend the JSON")


def test_bad_rows_of_a_table(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_bytes(b'prompt,completion\none\ntwo,2\nF\xe4hre,3\n"four"x,4\n"five\nlines",5\n')
    good = [record for record in records(str(file)) if isinstance(record, Record)]
    assert [(record.place, record.fields["prompt"]) for record in good] == [
        (f"{file}:row 2", "two"),
        (f"{file}:row 5", "five\nlines"),
    ]
    short, latin, quoted = problems(file)
    assert short.startswith(f"{file}:row 1: row: has 1 cells where the header has 2; put cells that hold")
    assert latin == f"{file}:row 3: row: is not UTF-8; write it again as UTF-8, for example with iconv"
    assert quoted.startswith(f"{file}:row 4: row: cannot be read (") and quoted.endswith(
        "; mend its quotes and line ends"
    )


def test_a_header_that_names_a_column_twice(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("text,text\na,b\n")
    assert problems(file) == [f"{file}: text: names two columns of the header; give every column a name of its own"]


def test_a_cell_may_hold_a_whole_document(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.csv", [{"text": "word " * 100_000}])
    (record,) = records(str(file))
    assert isinstance(record, Record)
    assert len(record.fields["text"]) == 500_000


def test_a_file_that_is_no_parquet(tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    file.write_bytes(b"no")
    (said,) = problems(file)
    assert said.startswith(f"{file}: file: cannot be read as Parquet (")


def test_a_directory_is_read_in_the_order_of_names_without_what_is_hidden(tmp_path: Path) -> None:
    for name in ("b/two.jsonl", "a.jsonl", ".cache/three.jsonl", "b/.four.jsonl", "five.txt", "six.xlsx"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, [{"text": name}])
    places = [record.place for record in records(f"{tmp_path}/")]
    assert places == [f"{tmp_path}/a.jsonl:1", f"{tmp_path}/b/two.jsonl:1", f"{tmp_path}/five.txt"]
    assert [record.place for record in records(str(tmp_path), documents=False)] == places[:2]


def test_a_document_is_one_text_and_knows_its_name(tmp_path: Path) -> None:
    file = tmp_path / "Fa\u0308hre.md"
    file.write_bytes("\ufeff# Title\r\n\r\nText.\n".encode())
    assert list(records(str(file))) == [Record(str(file), {"text": "# Title\n\nText.\n", "document": "F\u00e4hre"})]
    file.write_bytes(b"\xff\xfe")
    assert problems(file)[0].startswith(f"{file}: file: is not UTF-8 (byte 0)")


def test_columns_get_our_names(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", [{"q": "How much?", "a": "5", "group": "x"}, {"q": "?", "prompt": "?"}])
    first, second = records(str(file), {"q": "prompt", "a": "completion", "group": ""})
    assert first == Record(f"{file}:1", {"prompt": "How much?", "completion": "5"})
    assert str(second).startswith(f"{file}:2: prompt: data.columns leaves two fields of the name 'prompt'; rename only")


def test_what_is_not_there_or_of_no_known_kind(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"gone\.jsonl: no such file or directory; mend the name"):
        list(records(f"{tmp_path}/gone.jsonl"))
    with pytest.raises(BadInput, match=r"holds no rows; put files there that end in \.jsonl, \.json"):
        list(records(str(tmp_path)))
    with pytest.raises(BadInput, match=r"rows\.xlsx: not a known kind of file; use one of \.jsonl"):
        list(records(str(write(tmp_path / "rows.xlsx", ROWS))))


# -- rows --------------------------------------------------------------------------------------------------------


def test_the_sample_trade_is_read_as_before() -> None:
    file = str(ROOT / "examples/corvane/train.jsonl")
    loaded = load_rows(DataConfig(), [file], "sft")
    assert loaded.rows == read_rows([file])
    assert (loaded.shapes, loaded.ignored) == ({file: "chat"}, {})


def test_sources_of_different_shapes_and_formats_become_one_list(tmp_path: Path) -> None:
    sources = [
        str(write(tmp_path / "a.jsonl", [CHAT | {"id": "a", "score": 3}])),
        str(write(tmp_path / "b.parquet", ROWS)),
        str(write(tmp_path / "c.csv", [{"instruction": "Say it.", "input": "", "output": "It."}])),
    ]
    loaded = load_rows(DataConfig(), sources, "sft")
    assert list(loaded.shapes.values()) == ["chat", "prompt", "instruction"]
    assert loaded.ignored == {sources[0]: ("score",)}
    assert [row.reference for row in loaded.rows if isinstance(row, Row)] == ["5 crowns", "5 crowns", "6 crowns", "It."]


def test_rows_without_an_id_get_the_same_one_everywhere(tmp_path: Path) -> None:
    one = load_rows(DataConfig(), [str(write(tmp_path / "a.jsonl", [CHAT, CHAT]))], "sft").rows
    two = load_rows(DataConfig(), [str(write(tmp_path / "b.parquet", [ROWS[1], ROWS[0]]))], "sft").rows
    assert re.fullmatch("[0-9a-f]{16}", one[0].id)
    assert [one[1].id, two[1].id] == [f"{one[0].id}-2", one[0].id]
    assert two[0].id != two[1].id


def test_an_id_is_used_once_over_all_sources(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", [CHAT | {"id": "t1"}])
    second = write(tmp_path / "b.jsonl", [CHAT | {"id": "t0"}, CHAT | {"id": "t1"}])
    with pytest.raises(BadInput) as caught:
        load_rows(DataConfig(), [str(first), str(second)], "sft")
    assert str(caught.value) == (f"{second}:2: id: 't1' was already used at {first}:1; give every row an id of its own")


def test_ten_problems_are_told_and_the_rest_counted(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", [CHAT, *[{"messages": []}] * 12])
    with pytest.raises(BadInput) as caught:
        load_rows(DataConfig(), [str(file)], "sft")
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{file}:2: messages: is empty; write a question and its answer"
    assert lines[10:] == ["… and 2 more; `metier data check --all` lists all of them"]
    found = scan(DataConfig(), [str(file)], "sft")
    assert ([place for place, _ in found.rows], len(found.problems)) == ([f"{file}:1"], 12)


def test_a_scan_tells_of_missing_sources_and_goes_on(tmp_path: Path) -> None:
    gone, there = f"{tmp_path}/gone.jsonl", str(write(tmp_path / "rows.jsonl", [CHAT]))
    found = scan(DataConfig(), [gone, there], "sft")
    assert [str(problem) for problem in found.problems] == [
        f"{gone}: source: no such file or directory; mend the name where the configuration lists its data"
    ]
    assert len(found.rows) == 1
    with pytest.raises(NotFound):
        load_rows(DataConfig(), [there, gone], "sft")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
def test_an_empty_source(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.write_bytes(b"\n")
    with pytest.raises(BadInput, match=r"rows\.\w+: source: holds no rows; put rows there or leave it out"):
        load_rows(DataConfig(), [str(file)], "sft")


def test_one_shape_in_one_source(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", [CHAT, ROWS[0], {"question": "?"}])
    mixed, unknown = scan(DataConfig(), [str(file)], "sft").problems
    assert str(mixed) == (
        f"{file}:2: row: is of shape prompt, but the rows before it of shape chat; "
        "keep rows of one shape in one source, or set data.shape"
    )
    assert (unknown.place, unknown.field) == (f"{file}:3", "row")


def test_the_objective_decides_which_rows_are_taken(tmp_path: Path) -> None:
    chat, text = write(tmp_path / "chat.jsonl", [CHAT] * 3), write(tmp_path / "a.md", [{}])
    loaded = load_rows(DataConfig(), [str(tmp_path / "a.md")], "domain").rows
    assert isinstance(loaded[0], Text) and loaded[0].documents == ("a",)
    with pytest.raises(BadInput) as caught:
        load_rows(DataConfig(), [str(text)], "sft")
    assert str(caught.value) == (
        f"{text}: text: is raw text, which holds no answers to learn under training.objective=sft; "
        "set training.objective=domain, or give conversations"
    )
    with pytest.raises(BadInput) as caught:
        load_rows(DataConfig(), [str(chat)], "domain")
    assert str(caught.value) == (
        f"{chat}:1: row: is of shape chat, a conversation, where training.objective=domain learns raw text; "
        "set training.objective=sft, or give rows with text"
    )


def test_a_column_must_become_something_known(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", [{"q": "How much?", "completion": "5"}])
    with pytest.raises(
        ConfigError, match=r"data\.columns: 'promt', which 'q' is to be called, is no field of a row; did"
    ):
        scan(DataConfig(columns={"q": "promt"}), [str(file)], "sft")
    assert load_rows(DataConfig(columns={"q": "prompt"}), [str(file)], "sft").shapes == {str(file): "prompt"}
