"""Shapes of rows: how they are told apart, what they become, and what is said of a row that is wrong."""

import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.config import Shape
from training.data.problems import Problem
from training.data.read import Record
from training.data.rows import Row, Text
from training.data.shapes import FIELDS, OPTIONAL, REQUIRED, detect, ignored, to_row, unknown_shape

ROOT = Path(__file__).parents[4]
USER = {"role": "user", "content": "How much?"}
ANSWER = {"role": "assistant", "content": "5 crowns"}
SYSTEM = {"role": "system", "content": "Be brief."}
QUOTE = {"document": "tariff", "quote": "costs 5 crowns"}


def row(fields: dict[str, Any]) -> Row:
    shape = detect(fields)
    assert shape is not None
    made = to_row(Record("f:1", fields), shape)
    assert isinstance(made, Row), made
    return made


def said(row: Row) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in row.messages]


def problem(fields: dict[str, Any], shape: Shape | None = None) -> str:
    shape = shape or detect(fields)
    assert shape is not None
    made = to_row(Record("f:1", fields), shape)
    assert isinstance(made, Problem), made
    return str(made)


def test_every_shape_of_the_schema_is_known() -> None:
    assert set(REQUIRED) == set(OPTIONAL) == set(get_args(Shape))


@pytest.mark.parametrize(
    ("fields", "shape"),
    [
        (["messages"], "chat"),
        (["conversations", "id"], "chat"),
        (["prompt", "messages"], "chat"),
        (["prompt", "completion"], "prompt"),
        (["instruction", "output"], "instruction"),
        (["instruction", "input", "output", "text"], "instruction"),
        (["text", "url"], "text"),
        (["prompt", "chosen", "rejected"], None),
        ([], None),
    ],
)
def test_the_fields_tell_the_shape(fields: list[str], shape: str | None) -> None:
    assert detect(dict.fromkeys(fields)) == shape


ASKED = [("user", "How much?"), ("assistant", "5 crowns")]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"messages": [USER, ANSWER]}, ASKED),
        ({"messages": [SYSTEM, USER, ANSWER]}, [("system", "Be brief."), *ASKED]),
        ({"messages": [USER, ANSWER, USER, ANSWER], "system": "Be brief."}, [("system", "Be brief."), *ASKED, *ASKED]),
        ({"messages": json.dumps([USER, ANSWER]), "system": "", "evidence": None}, ASKED),
        (
            {"conversations": [{"from": "human", "value": "How much?"}, {"from": "gpt", "value": "5 crowns"}]},
            ASKED,
        ),
        ({"prompt": "How much?", "completion": "5 crowns"}, ASKED),
        ({"prompt": [SYSTEM, USER], "completion": [ANSWER]}, [("system", "Be brief."), *ASKED]),
        ({"prompt": "How much?", "completion": "5 crowns", "system": "Be brief."}, [("system", "Be brief."), *ASKED]),
        ({"instruction": "How much?", "input": "", "output": "5 crowns"}, ASKED),
        (
            {"instruction": "Add.", "input": "2 and 3", "output": "5", "history": [["How much?", "5 crowns"]]},
            [*ASKED, ("user", "Add.\n\n2 and 3"), ("assistant", "5")],
        ),
    ],
)
def test_every_shape_becomes_the_one_form(fields: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    made = row(fields)
    assert said(made) == expected
    assert [message.train for message in made.messages] == [None] * len(expected)


def test_what_a_row_says_of_itself_is_kept() -> None:
    about = {"id": 7, "kind": "single", "language": "vi", "evidence": [QUOTE], "groups": ["crew"]}
    cells = about | {"evidence": json.dumps([QUOTE]), "groups": '["crew"]'}
    for fields in (about, cells):
        made = row({"prompt": "How much?", "completion": "5 crowns"} | fields)
        assert (made.id, made.language, made.documents, made.groups) == ("7", "vi", ("tariff",), ("crew",))


def test_no_evidence_allows_an_empty_answer() -> None:
    empty = ANSWER | {"content": ""}
    assert not row({"messages": [USER, empty], "evidence": []}).answerable
    assert not row({"instruction": "How much?", "output": "", "evidence": "[]"}).answerable
    assert problem({"messages": [USER, empty]}).startswith("f:1: messages.1.content: is empty; ")
    assert problem({"messages": [USER, empty, USER, ANSWER], "evidence": []}).startswith("f:1: messages.1.content: ")


def test_flags_say_which_answers_are_learned() -> None:
    flagged = row({"messages": [USER, ANSWER | {"train": False}, USER, ANSWER | {"train": True}]})
    assert [message.train for message in flagged.messages] == [None, False, None, True]
    asked = row({"prompt": [USER, ANSWER, USER], "completion": [ANSWER, USER, ANSWER | {"train": False}]})
    assert [message.train for message in asked.messages] == [None, False, None, True, None, False]


def test_raw_text() -> None:
    made = to_row(Record("f:1", {"text": " One.\n", "document": "a", "title": "x"}), "text")
    assert isinstance(made, Text)
    assert (made.text, made.documents, len(made.id)) == (" One.\n", ("a",), 16)
    assert problem({"text": "\n"}) == "f:1: text: is empty; write some text, or take the row out"
    assert problem({"text": 3}) == "f:1: text: is a number; write it as a string"


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"messages": []}, "messages: is empty; write a question and its answer"),
        ({"messages": None}, "messages: is null; write a list, in a cell as JSON"),
        ({"messages": "hello"}, "messages: is a string; write a list, in a cell as JSON"),
        ({"messages": ["hello", ANSWER]}, "messages.0: is a string; write a message: "),
        ({"messages": [ANSWER]}, "messages.0.role: the conversation begins with the assistant; begin it with the user"),
        ({"messages": [USER]}, "messages.0.role: the conversation ends with the user; end it with the assistant's answer"),
        ({"messages": [SYSTEM]}, "messages.0.role: the conversation ends with the system; "),
        ({"messages": [USER, USER, ANSWER]}, "messages.1.role: two turns of the user in a row; join them, or write"),
        ({"messages": [USER, ANSWER, ANSWER]}, "messages.2.role: two turns of the assistant in a row; "),
        ({"messages": [USER, SYSTEM, ANSWER]}, "messages.1.role: a system message stands behind the first place; "),
        ({"messages": [USER | {"content": " "}, ANSWER]}, "messages.0.content: is empty; write what was said"),
        ({"messages": [{"role": "user"}, ANSWER]}, "messages.0.content: is null; write it as a string"),
        ({"messages": [{"content": "?"}, ANSWER]}, "messages.0.role: is missing; use user, assistant or system"),
        ({"messages": [USER | {"role": "robot"}]}, "messages.0.role: 'robot' is not known; use user, assistant or"),
        ({"messages": [USER | {"role": ["user"]}]}, "messages.0.role: ['user'] is not known; "),
        (
            {"messages": [USER, {"role": "tool", "content": "{}"}, ANSWER]},
            "messages.1.role: 'tool' is the turn of a tool, which rows cannot hold; take the row out",
        ),
        (
            {"messages": [USER, ANSWER | {"tool_calls": [{"id": "1"}]}]},
            "messages.1.tool_calls: calls a tool, which rows cannot hold; take the row out",
        ),
        (
            {"messages": [USER | {"content": [{"type": "text", "text": "?"}]}, ANSWER]},
            "messages.0.content: is a list; write it as a string; only text can be learned",
        ),
        ({"messages": [USER, ANSWER | {"train": 1}]}, "messages.1.train: is a number; write true or false"),
        ({"messages": [USER | {"train": True}, ANSWER]}, "messages.0.train: is true on a message of the user; only"),
        ({"messages": [USER, ANSWER | {"train": False}]}, "messages: train is false on every answer, so nothing is"),
        ({"messages": [SYSTEM, USER, ANSWER], "system": "x"}, "system: is given beside a system message; keep one"),
        ({"conversations": [{"from": "gpt", "value": "Hi"}]}, "conversations.0.from: the conversation begins with"),
        (
            {"conversations": [{"from": "human", "value": ""}, {"from": "gpt", "value": "Hi"}]},
            "conversations.0.value: is empty; ",
        ),
        ({"prompt": "", "completion": "5"}, "prompt: is empty; "),
        ({"prompt": "How much?", "completion": None}, "completion: is null; write it as a string"),
        ({"prompt": [USER, ANSWER], "completion": "5"}, "completion: two turns of the assistant in a row; "),
        ({"prompt": [USER, USER], "completion": "5"}, "prompt.1.role: two turns of the user in a row; "),
        ({"instruction": "Add.", "input": 3, "output": "5"}, "input: is a number; write it as a string"),
        ({"instruction": "Add.", "output": ["5"]}, "output: is a list; write it as a string"),
        ({"instruction": "Add.", "output": "5", "history": [["a"]]}, "history.0: is not a pair; write [question, answer]"),
        ({"instruction": "Add.", "output": "5", "history": [["a", ""]]}, "history.0.1: is empty; "),
        ({"messages": [USER, ANSWER], "evidence": "[{"}, "evidence: is not JSON ("),
        ({"messages": [USER, ANSWER], "evidence": [{"document": "d"}]}, "evidence.0.quote: field required; docs/data.md"),
        ({"messages": [USER, ANSWER], "kind": "qa"}, "kind: input should be 'single', 'two', 'none' or 'multi'; "),
        (
            {"messages": [USER, ANSWER], "evidance": []},
            "evidance: is not a field of chat rows, but nearly evidence; write evidence, or leave the field out with "
            "data.columns={evidance: ''}",
        ),
    ],
)  # fmt: skip
def test_a_bad_row_is_told_what_and_where(fields: dict[str, Any], sentence: str) -> None:
    assert problem(fields).startswith(f"f:1: {sentence}")


def test_a_named_shape_says_what_is_missing() -> None:
    assert problem({"prompt": "How much?"}, "prompt") == (
        "f:1: completion: is missing from a prompt row, which has prompt; "
        "write it, or say with data.columns which field it is"
    )


def test_an_unknown_shape_lists_what_is_there_and_what_is_known() -> None:
    assert str(unknown_shape(Record("f:1", {"question": "?", "answer": "!"}))) == (
        "f:1: row: has the fields question, answer, which are no known shape: chat (messages); prompt (prompt, "
        "completion); instruction (instruction, output); text (text); say what they mean with "
        "data.columns={their_name: our_name}, or name the shape with data.shape"
    )


def test_the_guide_shows_every_shape() -> None:
    blocks = re.findall(r"```jsonl\n(.*?)```", (ROOT / "docs/data.md").read_text(encoding="utf-8"), re.DOTALL)
    shown = [json.loads(line) for block in blocks for line in block.splitlines()]
    made = [to_row(Record("docs/data.md", fields), shape) for fields in shown if (shape := detect(fields))]
    assert {detect(fields) for fields in shown} == set(get_args(Shape))
    assert [row for row in made if isinstance(row, Problem)] == []


def test_other_fields_are_left_out_and_listed() -> None:
    fields = {"messages": [USER, ANSWER], "score": 1, "prompt_id": "x"}
    assert said(row(fields)) == ASKED
    assert ignored(list(fields), "chat") == ("score", "prompt_id")


@given(
    st.fixed_dictionaries(
        {},
        optional={
            name: st.recursive(
                st.none() | st.booleans() | st.integers() | st.text(max_size=4),
                lambda inner: (
                    st.lists(inner, max_size=3)
                    | st.dictionaries(st.sampled_from(["role", "content", "from", "value", "train"]), inner)
                ),
                max_leaves=6,
            )
            for name in FIELDS
        },
    ),
    st.sampled_from(get_args(Shape)),
)
def test_whatever_stands_in_a_record_it_is_a_row_or_a_problem(fields: dict[str, Any], shape: Shape) -> None:
    made = to_row(Record("f:1", fields), shape)
    if isinstance(made, Problem):
        assert made.place == "f:1" and made.field and made.reason and made.fix
    else:
        assert made == to_row(Record("f:2", fields), shape)
