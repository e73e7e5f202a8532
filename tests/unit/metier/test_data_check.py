"""``metier data check``: what it prints, what it writes and how it ends."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from metier.__main__ import main

ROOT = Path(__file__).parents[3]
Check = Callable[..., int]
SECRETS = ("AKIA" + "IOSFODNN7EXAMPLE", "anna.lee@corvane.co.uk")


def row(name: str, question: str, answer: str) -> str:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"id": name, "messages": turns}, ensure_ascii=False)


def write(file: Path, *lines: str) -> Path:
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Check:
    """Exit code of ``metier data check ARGV`` with a base that is not on this machine, in a directory of its own."""
    monkeypatch.chdir(tmp_path)

    def run(*argv: object, base: str = "nobody/nothing") -> int:
        own = ["--set", f"base.source={base}", "--set", f"models_cache={tmp_path}/models"]
        monkeypatch.setattr("sys.argv", ["metier", "data", "check", *map(str, argv), *own])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0)

    return run


def test_clean_rows_end_with_0(check: Check, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "rows.jsonl", row("a", "Why?", "No."), row("b", "Where?", "On the quay."))
    assert check("rows.jsonl") == 0
    assert capsys.readouterr().out.splitlines() == [
        "data.train  rows.jsonl: chat, 2 rows, 4 turns",
        "  single 2; 0 with evidence, 0 not answerable, 2 without documents",
        "Languages: not judged in 2 rows",
        "Unicode forms: no difference in 2 rows",
        "Tokens: not counted: the base 'nobody/nothing' is not on this machine; `metier models fetch` fetches it",
        "No errors and no warnings in 2 rows.",
    ]


def test_errors_end_with_2_and_come_first(check: Check, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "rows.jsonl", row("a", "Is it schÃ¶n?", "[/red] No."), row("a", "Where?", "There."), "{oops")
    assert check("rows.jsonl") == 2
    out = capsys.readouterr().out
    assert "2 errors, 1 warning" in out
    assert out.index("already used") < out.index("reads 'ön?'")


def test_warnings_end_with_0_and_nothing_sensitive_is_printed(
    check: Check, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "rows.jsonl", row("a", f"Is {SECRETS[0]} a key?", f"Ask {SECRETS[1]}."))
    assert check("rows.jsonl") == 0
    assert check("rows.jsonl", "--json", "--fix", "clean", "--scrub") == 0
    shown = capsys.readouterr()
    assert "AK… (20 characters)" in shown.out
    assert not any(secret in text for secret in SECRETS for text in shown)
    assert not any(secret in file.read_text() for secret in SECRETS for file in (tmp_path / "clean").iterdir())


def test_only_the_first_twenty_are_shown_without_all(
    check: Check, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "rows.jsonl", *(row(str(number), f"Question {number}\u200b?", "No.") for number in range(25)))
    assert check("rows.jsonl") == 0
    short = capsys.readouterr().out
    assert short.count("rows.jsonl:") == 20 + 1  # and once for the source
    assert "… and 5 more; --all shows them" in short
    assert check("rows.jsonl", "--all") == 0
    assert capsys.readouterr().out.count("rows.jsonl:") == 25 + 1


def test_what_looks_like_markup_is_shown_as_it_is(
    check: Check, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "[/bold][red]x[1]\u001b[2J"
    write(tmp_path / "rows.jsonl", row(name, "Why?", "No."), row(name, "Where?", "There."))
    assert check("rows.jsonl") == 2
    out = "".join(capsys.readouterr().out.split())
    assert "'[/bold][red]x[1]·[2J'" in out


def test_json_is_the_whole_report(check: Check, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "rows.jsonl", row("a", "Why?", "No."), row("b", "why", "no"), "{oops")
    assert check("rows.jsonl", "--json", "--fix", "clean", base="tiny:llama") == 2
    said = json.loads(capsys.readouterr().out)
    assert [finding["kind"] for finding in said["report"]["findings"]] == ["cannot be read", "duplicate"]
    assert said["report"]["lengths"]["rows"] == 2
    assert said["report"]["lengths_note"] == "passages come on top"
    assert said["fixed"]["changes"] == {"dropped: duplicate": 1, "dropped: error": 1}
    assert set(said["report"]["seconds"]) >= {"read", "token lengths", "near duplicates"}


def test_lengths_are_drawn(check: Check, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "rows.jsonl", *(row(str(n), f"Why{' and why' * n}?", "No.") for n in range(20)))
    assert check("rows.jsonl", "--plot", "lengths.png", base="tiny:llama") == 0
    out = capsys.readouterr().out
    assert "passages come on top" in out
    assert "longer than training.max_tokens (768)" in out
    assert "Token lengths are drawn in lengths.png." in out
    assert "█" in out
    assert max(map(len, (line for line in out.splitlines() if "█" in line))) <= 80
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")


def test_no_picture_without_lengths(check: Check, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "rows.jsonl", row("a", "Why?", "No."))
    assert check("rows.jsonl", "--plot", "lengths.png") == 0
    assert "--plot lengths.png: not drawn, since there are no token lengths" in capsys.readouterr().err
    assert not (tmp_path / "lengths.png").exists()


def test_a_copy_is_written_beside_its_diff(check: Check, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "rows.jsonl", row("a", "Is it schÃ¶n?", "Yes."), row("b", "is it schön", "yes"))
    assert check("rows.jsonl", "--fix", "clean") == 0
    out = capsys.readouterr().out
    assert "rows.jsonl -> clean/rows.jsonl" in out
    assert "1 of 2 rows written; what changed is in clean/changes.diff" in out
    assert check("clean/rows.jsonl") == 0
    assert "No errors and no warnings in 1 row." in capsys.readouterr().out
    assert check("rows.jsonl", "--fix", "clean") == 2
    assert "error: --fix clean: is not empty" in capsys.readouterr().err
    assert check("rows.jsonl", "--fix", "clean", "--force") == 0


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ([], "data.train: names no rows; name files there, or after the command: metier data check rows.jsonl"),
        (["rows.jsonl", "--scrub"], "--scrub and --force go with --fix; name the directory"),
        (["rows.jsonl", "--plot", "x.txt"], "--plot x.txt: use a name that ends in .png, .svg, .pdf"),
    ],
)
def test_what_makes_no_sense_is_refused(
    argv: list[str], sentence: str, check: Check, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "rows.jsonl", row("a", "Why?", "No."))
    assert check(*argv) == 2
    assert f"error: {sentence}" in capsys.readouterr().err


def test_the_sample_trade_is_clean(
    check: Check, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    assert check("--config", "examples/corvane/metier.yaml") == 0
    assert "No errors and no warnings in" in capsys.readouterr().out
