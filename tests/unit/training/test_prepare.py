"""Rows on disk become examples: put aside, guarded, and grounded only where they ask for it."""

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.config import Config
from cluster.errors import BadInput, ConfigError, NotFound
from cluster.registry import Registry
from cluster.storage import Storage
from training.prepare import load, prepare
from training.run import check_supported, recipe_digest, run_name


def row(name: str, question: str, answer: str = "yes", **facts: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"id": name, "messages": turns, **facts}


@pytest.fixture
def desk(make_config: Any, tmp_path: Path) -> Any:
    def made(*overrides: str, **files: list[dict[str, Any]]) -> Config:
        sets = []
        for name, rows in files.items():
            file = tmp_path / f"{name}.jsonl"
            file.write_text("".join(json.dumps(item) + "\n" for item in rows))
            sets.append(f"data.{name}=[{file}]")
        config: Config = make_config(*sets, *overrides)
        return config

    return made


PLAIN = [row(f"r{number}", f"Is question number {number} about harbour {number * 7}?") for number in range(40)]


def test_rows_without_evidence_need_no_index_and_are_asked_as_without_retrieval(desk: Any, tokenizer: Any) -> None:
    config = desk(train=PLAIN[:2])
    made = prepare(config, Registry(Storage.of(config.storage)), load(config), tokenizer)
    (first, _) = made.examples["train"]
    assert made.knowledge is None and made.dataset.documents == []
    assert [message["role"] for message in first.messages] == ["system", "user"]
    assert first.messages[0]["content"] == config.prompt.system_closed
    assert (first.answer, made.groups) == ("yes", config.knowledge.groups)


def test_rows_with_evidence_need_one(desk: Any, tokenizer: Any) -> None:
    config = desk(train=[row("r", "How much?", "5", evidence=[{"document": "d", "quote": "costs 5"}])])
    with pytest.raises(NotFound, match="is empty or not there; run `metier index`"):
        prepare(config, Registry(Storage.of(config.storage)), load(config), tokenizer)


def test_a_share_is_put_aside_for_validation(desk: Any) -> None:
    rows = load(desk("data.split.validation_share=0.25", train=PLAIN))
    assert len(rows.train) + len(rows.validation) == 40
    assert 4 <= len(rows.validation) <= 16
    assert not {item.id for item in rows.train} & {item.id for item in rows.validation}


def test_files_for_validation_come_before_a_share(desk: Any) -> None:
    rows = load(desk("data.split.validation_share=0.25", train=PLAIN, validation=[row("v", "Else?")]))
    assert (len(rows.train), [item.id for item in rows.validation]) == (40, ["v"])


def test_held_out_questions_do_not_leak(desk: Any) -> None:
    leaked = {"train": PLAIN, "heldout": [row("h", "IS QUESTION NUMBER 3 ABOUT HARBOUR 21", "yes", evidence=[])]}
    leaked["heldout"][0] |= {"kind": "none"}
    with pytest.raises(BadInput, match="r3"):
        load(desk(**leaked))
    assert "r3" not in {item.id for item in load(desk("data.leakage=drop", **leaked)).train}


def test_no_rows_are_named_as_such(desk: Any) -> None:
    with pytest.raises(ConfigError, match=r"data\.train names no rows"):
        load(desk())


def test_who_may_read_the_rows_may_use_what_comes_out(desk: Any, tokenizer: Any) -> None:
    both, one = row("a", "One?", groups=["crew", "office"]), row("b", "Two?", groups=["office"])
    config = desk(train=[both, one])
    assert prepare(config, Registry(Storage.of(config.storage)), load(config), tokenizer).groups == ("office",)


def test_a_recipe_changes_with_what_decides_the_weights(desk: Any, tokenizer: Any, tiny_llama: Path) -> None:
    from cluster.models import base_ref

    def recipe(*overrides: str) -> str:
        config = desk(*overrides, train=PLAIN)
        made = prepare(config, Registry(Storage.of(config.storage)), load(config), tokenizer)
        return recipe_digest(config, base_ref(config.base, tiny_llama), made)

    first = recipe()
    assert recipe("training.max_failures=5", "training.trackers=[tensorboard]", "training.adapter=other") == first
    assert len({first, recipe("training.method=qlora"), recipe("training.seed=3")}) == 3


def test_a_run_is_named_by_its_recipe_or_as_told(desk: Any) -> None:
    assert run_name(desk("training.adapter=corvane"), "abcdef0123456789", False) == "corvane-abcdef012345"
    assert run_name(desk("training.run=monday"), "abcdef0123456789", False) == "monday"
    assert run_name(desk("training.run=monday"), "abcdef0123456789", True).startswith("monday-")


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["base.dtype=float16"], "base.dtype float16 is not trained on the CPU"),
        (["training.liger=true"], "training.liger needs GPUs"),
    ],
)
def test_what_the_workers_cannot_do_is_refused(desk: Any, overrides: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        check_supported(desk(*overrides, train=PLAIN))
    check_supported(desk(*overrides, "training.gpus_per_worker=1", train=PLAIN))
