"""``metier search`` on a real milvus-lite: what it prints, why, for whom, and how it ends on bad input."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.config import load
from metier.__main__ import main
from retrieval.embedded import serve
from retrieval.store import Store
from tests import harbour

Search = Callable[..., int]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A configuration whose knowledge has two versions, with its Milvus running."""
    directory = tmp_path_factory.mktemp("search")
    settings = {
        "storage": {"url": str(directory / "store")},
        "store": {"data_dir": str(directory / "milvus")},
        "embedder": {"source": "tiny:bert"},
        "knowledge": {"name": "harbour"},
        "retrieval": {"min_score": -1},
    }
    path = directory / "metier.yaml"
    path.write_text(yaml.safe_dump(settings))
    config = load(path)
    with serve(config.store) as uri:
        store = Store(config.store, uri)
        harbour.fill(config, store)
        yield path
        store.close()


@pytest.fixture
def search(file: Path, monkeypatch: pytest.MonkeyPatch) -> Search:
    """Exit code of ``metier search ARGV``."""

    def run(*argv: object) -> int:
        monkeypatch.setattr("sys.argv", ["metier", "search", "-c", str(file), *map(str, argv)])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0)

    return run


@pytest.fixture
def found(search: Search, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """What ``metier search --json ARGV`` prints."""

    def run(*argv: object) -> Any:
        assert search("--json", *argv) == 0
        return json.loads(capsys.readouterr().out)

    return run


def texts(result: Any) -> list[str]:
    return [passage["text"] for passage in result["passages"]]


def test_passages_are_shown_with_their_scores(search: Search, capsys: pytest.CaptureFixture[str]) -> None:
    assert search("What does a bicycle cost?") == 0
    out = capsys.readouterr().out
    assert "A bicycle costs 5 crowns." in out
    assert "Fares  fares.md p. 2  (" in out
    assert "dense 0." in out and "bm25 " in out


def test_options_go_before_the_configuration(found: Callable[..., Any]) -> None:
    assert len(texts(found("dog", "--top-k", 5))) == 5
    assert len(texts(found("dog", "--top-k", 30))) == 6
    words = found("bicycle crowns", "--mode", "bm25")
    assert texts(words) == ["A bicycle costs 5 crowns.", "A dog costs 3 crowns on the ferry."]
    assert set(words["passages"][0]["scores"]) == {"bm25"}
    assert texts(found("tram sac", "--mode", "bm25")) == harbour.DOCUMENTS["charging"]
    assert texts(found("dog", "--mode", "bm25", "--where", "doc_id = rules")) == []
    assert texts(found("the dog", "--mode", "bm25", "--where", "year >= 2021 and title != Fares")) == [
        harbour.DOCUMENTS["rules"][1]
    ]


def test_versions_and_rights_are_those_asked_for(found: Callable[..., Any]) -> None:
    guide = ("guide", "--mode", "bm25")
    assert texts(found(*guide)) == ["A guide dog travels free of charge."]
    assert found(*guide)["version"] == 2
    assert texts(found(*guide, "--version", 1)) == []
    watch = ("watch", "--mode", "bm25")
    assert texts(found(*watch)) == []
    assert texts(found(*watch, "--group", "crew", "--group", "x")) == harbour.DOCUMENTS["crew"]
    assert texts(found(*watch, "--group", "crew", "--tenant", "other")) == []


def test_explain_says_why(search: Search, capsys: pytest.CaptureFixture[str]) -> None:
    assert search("What does a dog cost on the ferry?", "--explain", "--top-k", 2) == 0
    out, err = capsys.readouterr()
    assert "knowledge 'harbour' v2, hybrid, fused by score: vectors 0." in err
    assert "candidates: 6 by vectors" in err
    assert "reaches retrieval.min_score = -1" in err
    assert "embed " in err and "search " in err
    assert "words: rank 1, BM25 " in out
    assert "(a, dog, on, the, ferry)" in out
    assert "fused: rank 1" in out
    assert "Left out:" in out


def test_explain_as_json_holds_ranks_words_and_what_was_left_out(found: Callable[..., Any]) -> None:
    told = found("guide dog ferry", "--explain", "--top-k", 1)
    assert told["queries"] == ["guide dog ferry"]
    assert 0 < told["dense_weight"] < 1
    assert told["declined"] is False
    [why] = told["why"]
    assert set(why["ranks"]) == {"dense", "bm25", "fused"}
    assert why["ranks"]["fused"] == 1
    assert {"guide", "dog"} <= set(why["words"])
    assert len(told["left_out"]) == 3
    by_rank = found("guide dog", "--explain", "--set", "retrieval.fusion=rrf")
    assert by_rank["dense_weight"] is None


def test_what_is_under_the_floor_is_said(search: Search, capsys: pytest.CaptureFixture[str]) -> None:
    assert search("dog", "--explain", "--set", "retrieval.min_score=1") == 0
    out, err = capsys.readouterr()
    assert "under retrieval.min_score = 1" in err
    assert "nothing reaches retrieval.min_score (1)" in err
    assert "Left out:" in out
    assert "dog" in out.lower()


def test_compare_lays_the_modes_side_by_side(
    search: Search, found: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert search("dog on the ferry", "--compare", "--set", "retrieval.min_score=0.999") == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[0].split() == ["dense", "bm25", "hybrid"]
    assert all(len(line) <= 100 for line in lines)
    assert "bm25: " in out and "declined" in out
    assert "[1] Fares  fares.md p. 2: A dog costs 3 crowns on the ferry." in out
    both = found("dog on the ferry", "--compare")
    assert list(both) == ["dense", "bm25", "hybrid"]
    assert texts(both["bm25"])[0] == harbour.DOCUMENTS["fares"][0]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("",), "the question is empty"),
        (("  ",), "the question is empty"),
        (("dog", "--top-k", "0"), "'--top-k': Input should be greater than or equal to 1"),
        (("dog", "--top-k", "-1"), "'--top-k': Input should be greater than or equal to 1"),
        (("dog", "--top-k", "1000000"), "'--top-k': Input should be less than or equal to 50"),
        (("dog", "--set", "retrieval.top_k=0"), "retrieval.top_k: input should be greater than or equal to 1, not 0"),
        (("dog", "--set", "retrieval.candidates=1000000"), "retrieval.candidates: input should be less than or equal"),
        (("dog", "--where", "year >="), "the filter 'year >=' at column 8"),
        (("dog", "--set", "retrieval.rerank=5"), "reranker.source"),
    ],
)
def test_bad_input_is_one_sentence(
    search: Search, capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], said: str
) -> None:
    assert search(*argv) == 2
    err = capsys.readouterr().err
    assert said in " ".join(err.split())
    assert "Traceback" not in err


def test_a_question_that_is_cut_is_said_to_be(search: Search, capsys: pytest.CaptureFixture[str]) -> None:
    assert search("dog " * 25_000, "--explain") == 0
    err = capsys.readouterr().err
    assert "cut: the embedder is given the first 8,192 characters" in err
    assert "cut: words are those of the first 256" in err


def test_what_is_not_there_is_named(search: Search, capsys: pytest.CaptureFixture[str]) -> None:
    assert search("dog", "--version", 9) == 3
    assert "no version 9" in capsys.readouterr().err
    assert search("dog", "--knowledge", "elsewhere") == 3
    assert "'elsewhere' is empty or not there" in capsys.readouterr().err
