"""What is put aside: whole groups, the same ones every time, and never too few; and the two files of the verb."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from cluster.config import DataConfig, SplitConfig
from cluster.errors import BadInput
from metier.__main__ import main
from training.data.load import load_rows
from training.data.rows import AnyRow, Evidence, Message, Row, Text, read_rows
from training.data.split import Split, group_keys, split

ROOT = Path(__file__).parents[4]
TRADE = ROOT / "examples/corvane/metier.yaml"


def about(number: int, *documents: str, question: str | None = None) -> Row:
    """A row about `documents`, or one without any."""
    messages = (
        Message(role="user", content=question or f"Question {number}?"),
        Message(role="assistant", content="5 crowns"),
    )
    evidence = tuple(Evidence(document=document, quote="q") for document in documents)
    return Row(id=f"r{number}", messages=messages, evidence=evidence or None)


def config(share: float = 0.25, train: int = 1, validation: int = 1, seed: int = 17) -> SplitConfig:
    return SplitConfig(validation_share=share, minimum_train=train, minimum_validation=validation, seed=seed)


def ids(rows: list[AnyRow]) -> set[str]:
    return {row.id for row in rows}


rows_of_any_kind = st.lists(
    st.one_of(
        st.lists(st.sampled_from("abcdefgh"), max_size=2, unique=True).map(tuple),
        st.sampled_from(["one?", "ONE", "two?"]),
    ),
    min_size=2,
    max_size=40,
).map(
    lambda specs: [
        about(number, question=spec) if isinstance(spec, str) else about(number, *spec)
        for number, spec in enumerate(specs)
    ]
)


@given(rows_of_any_kind, st.integers(0, 5), st.randoms())
def test_nothing_is_on_both_sides_and_the_order_does_not_count(
    rows: list[AnyRow], seed: int, chance: random.Random
) -> None:
    def parted(rows: list[AnyRow]) -> Split | str:
        try:
            return split(rows, config(seed=seed))
        except BadInput as error:
            return str(error)

    parts = parted(rows)
    shuffled = rows[:]
    chance.shuffle(shuffled)
    again = parted(shuffled)
    if isinstance(parts, str):
        assert isinstance(again, str)
        return
    assert isinstance(again, Split)
    assert ids(parts.train) | ids(parts.validation) == ids(rows)
    assert not set(group_keys(parts.train)) & set(group_keys(parts.validation))
    documents = [{name for row in side for name in row.documents} for side in (parts.train, parts.validation)]
    assert not documents[0] & documents[1]
    assert ids(parts.validation) == ids(again.validation)
    assert parts.train == [row for row in rows if row.id in ids(parts.train)]


def test_a_row_about_two_documents_ties_both() -> None:
    rows = [about(1, "a"), about(2, "b"), about(3, "b", "a"), about(4, "c")]
    keys = group_keys(rows)
    assert (len(set(keys)), keys[0], keys[1]) == (2, keys[2], keys[2])


def test_variants_of_one_conversation_stay_together() -> None:
    rows = [about(1, question="How much?"), about(2, question="how  MUCH"), about(3, question="How far?")]
    texts = [Text(id="a", text="One."), Text(id="b", text="one"), Text(id="c", text="One.", document="d")]
    assert [len(set(group_keys(part))) for part in (rows, texts)] == [2, 2]


def test_the_share_is_kept_with_and_without_documents() -> None:
    rows = [*(about(n, f"d{n // 5}") for n in range(100)), *(about(n) for n in range(100, 140))]
    parts = split(rows, config(0.2))
    with_documents = [row for row in parts.validation if row.documents]
    assert (len(parts.validation), len(with_documents)) == (28, 20)


def test_the_seed_decides_what_is_put_aside() -> None:
    rows = [about(n, f"d{n}") for n in range(40)]
    assert len({frozenset(ids(split(rows, config(seed=seed)).validation)) for seed in range(5)}) == 5


def test_a_group_that_is_a_little_too_large_is_better_than_none() -> None:
    rows = [about(n, f"d{n // 6}") for n in range(60)]
    assert len(split(rows, config(1 / 15)).validation) == 6


def test_no_share_puts_nothing_aside() -> None:
    rows: list[AnyRow] = [about(1), about(2)]
    assert split(rows, SplitConfig()) == Split(rows, [])


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            config(0.1, validation=5),
            "data.split: with validation_share 0.1 of 40 rows, 4 rows would be put aside, fewer than minimum_validation "
            "(5); raise validation_share or lower minimum_validation",
        ),
        (
            config(0.5, train=21),
            "data.split: with validation_share 0.5 of 40 rows, 20 rows would be left, fewer than minimum_train (21); "
            "lower validation_share or minimum_train",
        ),
    ],
)
def test_too_few_on_a_side(settings: SplitConfig, sentence: str) -> None:
    with pytest.raises(BadInput) as caught:
        split([about(n, f"d{n}") for n in range(40)], settings)
    assert str(caught.value) == sentence


def test_one_group_of_nearly_all_rows_is_told() -> None:
    chain = [about(n, f"d{n:02}", f"d{n + 1:02}") for n in range(30)]
    with pytest.raises(BadInput) as caught:
        split(chain, config(0.1))
    assert str(caught.value).endswith(
        "; 30 of them hang together over 31 documents (d00, d01, d02, …) and stay together, so take out rows that name "
        "two documents, or name files in data.validation"
    )
    with pytest.raises(BadInput, match="30 of them begin with the same user message and stay together"):
        split([about(n, question="Hello!") for n in range(30)], config(0.1))


def metier(monkeypatch: pytest.MonkeyPatch, *argv: object) -> int:
    """Exit code of ``metier data split ARGV``."""
    monkeypatch.setattr("sys.argv", ["metier", "data", "split", *map(str, argv)])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


@pytest.fixture
def trade(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(ROOT)
    return tmp_path / "out"


def test_the_verb_writes_two_files_of_the_one_form(
    trade: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert metier(monkeypatch, "-c", TRADE, "-o", trade, "--share", 0.2, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    files = [trade / "train.jsonl", trade / "validation.jsonl"]
    train, validation = (read_rows([file]) for file in files)
    assert [part["rows"] for part in told["files"]] == [len(train), len(validation)]
    assert 40 <= len(validation) <= 60
    given = read_rows([ROOT / "examples/corvane/train.jsonl"])
    assert sorted([*train, *validation], key=lambda row: row.id) == given
    assert {row.kind for row in validation} >= {"single", "none"}
    assert sorted(path.name for path in trade.iterdir()) == ["train.jsonl", "validation.jsonl"]


def test_the_verb_replaces_files_only_when_it_is_told_to(
    trade: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trade.mkdir()
    (trade / "validation.jsonl").write_text("mine")
    assert metier(monkeypatch, "-c", TRADE, "-o", trade) == 2
    assert (
        "validation.jsonl: already there; choose another --output, or replace with --force" in capsys.readouterr().err
    )
    assert [path.name for path in trade.iterdir()] == ["validation.jsonl"]
    assert metier(monkeypatch, "-c", TRADE, "-o", trade, "--force") == 0
    first = (trade / "validation.jsonl").read_text()
    assert "mine" not in first and "validation.jsonl" in capsys.readouterr().out
    assert metier(monkeypatch, "-c", TRADE, "-o", trade, "--force", "--seed", 5) == 0
    assert (trade / "validation.jsonl").read_text() != first


def test_the_verb_splits_raw_text_and_says_what_it_leaves_out(
    trade: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": f"Text {n}.", "url": "x"}) + "\n" for n in range(40)))
    file = tmp_path / "metier.yaml"
    settings = {"data": {"train": [str(source)]}, "training": {"objective": "domain"}}
    file.write_text(yaml.safe_dump(settings))
    assert metier(monkeypatch, "-c", file, "-o", trade) == 0
    assert "texts.jsonl: left out url" in capsys.readouterr().err.replace("\n", "")
    read = load_rows(DataConfig(), [str(trade / "train.jsonl"), str(trade / "validation.jsonl")], "domain").rows
    assert ids(read) == ids(load_rows(DataConfig(), [str(source)], "domain").rows)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--share", "0"), "--share 0: use a share above 0 and at most 0.5"),
        (("--set", "data.train=[]"), "data.train names no rows; list the files to split"),
        (("--set", "data.split.minimum_train=300"), "fewer than minimum_train (300)"),
    ],
)
def test_the_verb_refuses(
    trade: Path,
    options: tuple[str, ...],
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert metier(monkeypatch, "-c", TRADE, "-o", trade, *options) == 2
    assert sentence in capsys.readouterr().err
    assert not trade.exists()
