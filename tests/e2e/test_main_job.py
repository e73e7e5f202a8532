"""The main job as a user does it: every verb by the command line, each a process of its own, with one YAML file.

The models are tiny, so what is checked is that each step leaves what the next one needs, that exit codes and JSON are
as promised, and that nothing runs afterwards. Whether answers get better is measured on the sample trade.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import trade

QUESTION = "What glass has the elm lamp?"


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[trade.Desk]:
    with trade.desk(trade.write_config(tmp_path)) as made:
        yield made


@pytest.mark.timeout(900)
def test_from_documents_to_a_released_served_and_judged_expert(desk: trade.Desk, tmp_path: Path) -> None:
    checks = desk.ok("check", "--json").json
    assert {entry["check"] for entry in checks} >= {"base model", "embedder", "Milvus", "port", "resources"}
    assert all(entry["ok"] for entry in checks), checks
    fetched = desk.ok("models", "fetch", "--json").json
    assert [Path(entry["directory"], "config.json").is_file() for entry in fetched] == [True, True]

    # Nothing is there yet, and every verb says what comes first.
    assert "metier index" in desk.fails(3, "search", QUESTION)
    assert "metier index" in desk.fails(3, "train")
    assert "no adapter 'lamps'" in desk.fails(3, "release", "create")
    assert "metier up" in desk.fails(5, "ask", QUESTION)

    first = desk.ok("index", "--json").json
    assert (first["version"], first["documents"], first["added"]) == (1, 8, first["chunks"])
    again = desk.ok("index", "--json").json
    assert (again["version"], again["added"], again["embedded"], again["unchanged"]) == (1, 0, 0, first["chunks"])
    found = desk.ok("search", QUESTION, "--json").json
    assert "lamp-elm" in {passage["doc_id"] for passage in found["passages"]}
    assert "lamp-elm" in desk.ok("search", QUESTION).out

    trained = desk.ok("train", "--json")
    assert "training: " in trained.err, "progress goes to stderr"
    assert trained.json["card"]["training"]["loss_last"] < trained.json["card"]["training"]["loss_first"]
    assert "exactly this recipe" in desk.ok("train").err

    made = desk.ok("release", "create", "--promote", "prod", "--json").json
    assert made["aliases"] == ["prod"]
    assert made["release"]["adapter"]["digest"] == trained.json["digest"]

    assert "down" in desk.ok("status").out
    assert "up at " in desk.ok("up", "--detach").err
    status = desk.ok("status", "--json").json
    assert status["server"]["url"].startswith("http://127.0.0.1:")
    assert (status["knowledge"]["version"], status["adapters"], status["prod"]) == (1, 1, made["digest"])
    assert "already up" in desk.ok("up", "--detach").err
    assert "our own server is up" in desk.ok("check").out

    whole = desk.ok("ask", QUESTION, "--json").json
    assert whole["release"] == made["digest"]
    assert "lamp-elm" in {passage["file_id"] for passage in whole["passages"]}
    unstreamed = desk.ok("ask", QUESTION, "--no-stream").out
    assert f"by lamps@{made['digest'][:12]}" in unstreamed
    assert desk.ok("ask", QUESTION, "--stream").out.splitlines()[:-1] == unstreamed.splitlines()[:-1]
    closed = desk.ok("ask", QUESTION, "--json", "--model", "tiny-llama", "--no-rag").json
    assert closed["release"] is None and closed["text"] != whole["text"]
    assert "no release 'lanterns'" in desk.fails(3, "ask", QUESTION, "--model", "lanterns")

    # The index can change while the server is up: both use one Milvus, and a release that follows the head sees it.
    (tmp_path / "documents" / "lamp-ivy.md").write_text("# Lamp ivy\n\nThe ivy lamp has turquoise glass.\n")
    assert desk.ok("index", "--json").json["version"] == 2
    newer = desk.ok("ask", "Which lamp has turquoise glass?", "--json").json
    assert "lamp-ivy" in {passage["file_id"] for passage in newer["passages"]}

    judged = desk.ok("eval", "--json", "--output", str(tmp_path / "answers.jsonl")).json
    assert (judged["release"], judged["questions"]) == (made["digest"], 6)
    assert [arm["arm"] for arm in judged["arms"]] == ["base", "base+RAG", "tuned", "tuned+RAG"]
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 4 * 6

    # An adapter trained elsewhere joins, gets a release, and the alias goes there and back.
    config = trade.load(desk.config)
    files = trade.write_adapter(config, tmp_path / "elsewhere")
    added = desk.ok("adapters", "add", str(files), "--name", "elsewhere", "--json").json
    assert (added["name"], added["version"]) == ("elsewhere", 1)
    assert desk.ok("adapters", "show", "elsewhere").json["digest"] == added["digest"]
    assert {entry["name"] for entry in desk.ok("adapters", "list", "--json").json} == {"lamps", "elsewhere"}
    other = desk.ok("release", "create", "--adapter", "elsewhere", "--json").json
    desk.ok("release", "promote", f"lamps@{other['version']}")
    assert desk.ok("ask", QUESTION, "--json").json["release"] == other["digest"]
    desk.ok("release", "rollback", "lamps")
    assert desk.ok("ask", QUESTION, "--json").json["release"] == made["digest"]
    listed = desk.ok("release", "list", "--json").json
    assert [(entry["digest"], entry["aliases"]) for entry in listed] == [
        (made["digest"], ["prod"]),
        (other["digest"], []),
    ]
    assert desk.ok("release", "show", "lamps@prod").json["digest"] == made["digest"]

    assert "down" in desk.ok("down").err
    assert desk.ok("status", "--json").json["server"] is None
    assert "nothing is up" in desk.ok("down").err
    desk.assert_nothing_left()
