"""The checks over whole sources: what is an error, what a warning, and what each finding says."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.config import BaseModelConfig, Config
from cluster.materialize import MARKER
from retrieval.prompt import answer_ids, ground, prompt_ids, with_marks
from training.data import lengths
from training.data.check import Checked, Finding, Report, check, summary
from training.data.rows import Row, Text

QUESTION = "How much does a caravan of any length cost on the night ferry to Tolloway in the summer season?"
ANSWER = "A caravan of any length costs thirty-three crowns and forty on every night sailing to Tolloway."
Make = Callable[..., Config]


def row(name: str, question: str = QUESTION, answer: str = ANSWER, **more: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"id": name, "messages": turns, **more}


def write(file: Path, *rows: Any) -> str:
    lines = [each if isinstance(each, str) else json.dumps(each, ensure_ascii=False) for each in rows]
    file.write_bytes(("\n".join(lines) + "\n").encode("utf-8", "surrogateescape"))
    return str(file)


def run(config: Config, *sources: str, tokenizer: Any = None, **lists: list[str]) -> Report:
    named = {f"data.{name}": files for name, files in lists.items()}
    return checked(config, {"data.train": list(sources), **named}, tokenizer).report


def checked(config: Config, lists: dict[str, list[str]], tokenizer: Any = None) -> Checked:
    return check(config, lists, tokenizer, lambda _: nullcontext(lambda *_: None))


def told(report: Report) -> list[tuple[str, str, str]]:
    return [(finding.level, finding.place.rpartition("/")[2], finding.kind) for finding in report.findings]


def only(report: Report) -> Finding:
    (finding,) = report.findings
    return finding


def test_clean_rows_have_no_findings(make_config: Make, tmp_path: Path) -> None:
    other = row(
        "b",
        "Who may board first?",
        "Whoever holds a shell card.",
        kind="none",
        evidence=[{"document": "d", "quote": "q"}],
    )
    report = run(make_config(), write(tmp_path / "rows.jsonl", row("a"), other))
    assert report.findings == []
    (about,) = report.sources
    assert (about.shape, about.rows, about.turns, about.kinds) == ("chat", 2, 4, {"single": 1, "none": 1})
    assert (about.with_evidence, about.not_answerable, about.without_documents) == (1, 0, 1)
    assert report.languages == {"en": 1, "not judged": 1} or report.languages == {"en": 2}


def test_what_training_would_refuse_is_an_error(make_config: Make, tmp_path: Path) -> None:
    empty = row("e")
    empty["messages"][0]["content"] = " "
    backwards = row("r")
    backwards["messages"].reverse()
    file = write(
        tmp_path / "rows.jsonl", row("a"), "{oops", row("a", "Another?", "Yes."), empty, backwards, '{"id": "\udcff"}'
    )
    report = run(make_config(), file)
    assert {finding.level for finding in report.findings} == {"error"}
    assert [finding.place.rpartition(":")[2] for finding in report.findings] == ["2", "3", "4", "5", "6"]
    assert "'a' was already used at" in report.findings[1].reason
    assert report.findings[1].kind == "id: … was already used"
    assert report.sources[0].rows == 1


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
def test_nasty_rows_are_found_in_every_format(ending: str, make_config: Make, tmp_path: Path) -> None:
    nasty = [
        {"instruction": "Where is schÃ¶n\u200b written?", "output": "[red]On\x07 the [/bold] quay[/red]"},
        {"instruction": "Where is a\u0301 decomposed letter?", "output": "caf\ufffd"},
    ]
    file = tmp_path / f"nasty{ending}"
    if ending == ".parquet":
        pq.write_table(pa.Table.from_pylist(nasty), file)
    elif ending == ".json":
        file.write_text(json.dumps(nasty), encoding="utf-8-sig")
    elif ending == ".jsonl":
        write(file, *nasty)
    else:
        with file.open("w", encoding="utf-8-sig", newline="") as out:
            table = csv.DictWriter(out, ["instruction", "output"], delimiter="," if ending == ".csv" else "\t")
            table.writeheader()
            table.writerows(nasty)
    report = run(make_config(), str(file))
    assert sorted((finding.field, finding.kind) for finding in report.findings) == [
        ("messages.0.content", "invisible characters"),
        ("messages.0.content", "mojibake"),
        ("messages.0.content", "not NFC"),
        ("messages.1.content", "control characters"),
        ("messages.1.content", "lost characters"),
    ]
    assert report.sources[0].shape == "instruction"
    assert report.forms == {"NFC": 1, "NFD": 1}


def test_long_rows_follow_the_policy(make_config: Make, tmp_path: Path, tokenizer: Any) -> None:
    file = write(tmp_path / "rows.jsonl", row("a", "Why?", "No."), row("b", QUESTION * 12))
    report = run(make_config(), file, tokenizer=tokenizer)
    finding = only(report)
    assert (finding.level, finding.place, finding.field) == ("error", f"{file}:2", "messages")
    assert report.lengths is not None
    assert finding.reason == f"has {report.lengths.max} tokens, more than training.max_tokens (768)"
    assert (report.lengths.longer, report.lengths.longer_share) == (1, 0.5)
    dropped = only(run(make_config("training.too_long=drop"), file, tokenizer=tokenizer))
    assert (dropped.level, dropped.fix) == ("warning", "training.too_long=drop will leave it out")
    assert run(make_config("training.max_tokens=2000"), file, tokenizer=tokenizer).findings == []


def test_raw_text_is_never_too_long(make_config: Make, tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "long.md").write_text(f"{QUESTION} {ANSWER} " * 20)
    report = run(make_config("training.objective=domain"), str(tmp_path / "docs"), tokenizer=tokenizer)
    assert report.findings == []
    assert report.lengths is not None and report.lengths.longer == 1


def test_leakage_is_an_error_unless_it_is_dropped(make_config: Make, tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", row("a"), row("b", "Who may board first?", "Whoever holds a shell card."))
    held = write(tmp_path / "held.jsonl", row("q", QUESTION.upper(), evidence=[{"document": "d", "quote": "q"}]))
    finding = only(run(make_config(f"data.heldout=[{held}]"), file))
    assert (finding.level, finding.place, finding.kind) == ("error", f"{file}:1", "leakage: same question")
    assert "held-out question q" in finding.reason
    assert only(run(make_config(f"data.heldout=[{held}]", "data.leakage=drop"), file)).level == "warning"
    assert run(make_config(f"data.heldout=[{held}]"), general=[file]).findings == []


def test_copies_and_conflicts_between_lists(make_config: Make, tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", row("a"), row("b", QUESTION.upper(), ANSWER + "!"))
    other = write(tmp_path / "other.jsonl", row("a"), row("c", answer="Nobody knows."))
    report = run(make_config(), train, validation=[other])
    assert told(report) == [
        ("warning", "train.jsonl:2", "duplicate"),
        ("warning", "other.jsonl:1", "duplicate"),
        ("warning", "other.jsonl:2", "conflicting answers"),
    ]
    assert report.findings[1].reason == f"says the same as {train}:1 of data.train"
    assert report.findings[0].reason == f"says the same as {train}:1"


def test_near_copies_are_told_unless_they_are_about_other_numbers(make_config: Make, tmp_path: Path) -> None:
    near = row("b", QUESTION.replace("much does a", "much does the"))
    numbers = row("c", f"{QUESTION} 17"), row("d", f"{QUESTION} 18")
    report = run(make_config(), write(tmp_path / "rows.jsonl", row("a"), near, *numbers))
    finding = only(report)
    assert (finding.kind, finding.place.rpartition(":")[2]) == ("near duplicate", "2")
    assert "rows.jsonl:1 (similarity 0." in finding.reason


def test_the_language_a_row_says_is_held_against_its_text(make_config: Make, tmp_path: Path) -> None:
    vietnamese = row(
        "a",
        "Khách nộp yêu cầu hoàn vé đại lý trước giờ tàu chạy thì được hoàn bao nhiêu?",
        "Tám mươi lăm phần trăm giá vé.",
    )
    file = write(tmp_path / "rows.jsonl", vietnamese, vietnamese | {"id": "b", "language": "vi"}, row("c"))
    report = run(make_config(), file)
    finding = next(finding for finding in report.findings if finding.kind == "language")
    assert (finding.place, finding.reason) == (f"{file}:1", "says 'en', but the text is 'vi'")
    assert finding.fix == 'write "language": "vi"'
    assert report.languages == {"vi": 2, "en": 1}
    assert summary(report.findings) == [("warning", "duplicate", 1), ("warning", "language", 1)]


def test_secrets_and_personal_data_are_masked_everywhere(make_config: Make, tmp_path: Path) -> None:
    secrets = ("AKIA" + "IOSFODNN7EXAMPLE", "anna.lee@corvane.co.uk", "+44 20 7946 0958")
    file = write(tmp_path / "rows.jsonl", row("a", f"Is {secrets[0]} a key?", f"Ask {secrets[1]} or {secrets[2]}."))
    report = run(make_config(), file)
    assert [finding.kind for finding in report.findings] == [
        "secret: AWS Access Key",
        "personal data: email address",
        "personal data: telephone number",
    ]
    assert not any(secret in str(finding) for finding in report.findings for secret in secrets)


def test_the_piece_that_is_shown_of_mojibake_is_masked_too(make_config: Make, tmp_path: Path) -> None:
    report = run(make_config(), write(tmp_path / "rows.jsonl", row("a", "Schreib Ã¶fter an a.lee@corvane.eu?", "Ja.")))
    (mojibake,) = (finding for finding in report.findings if finding.kind == "mojibake")
    assert mojibake.reason == "mojibake: 'Ã¶fter an <EMAIL a.… (16' reads 'öfter an <EMAIL a.… (16 '"


def test_a_source_that_is_not_there_is_one_error(make_config: Make, tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", row("a"))
    report = run(make_config(), str(tmp_path / "gone.jsonl"), file)
    assert only(report).level == "error"
    assert "gone.jsonl" in only(report).place
    assert [(about.shape, about.rows) for about in report.sources] == [(None, 0), ("chat", 1)]


def test_rows_of_several_sources_are_told_apart(make_config: Make, tmp_path: Path) -> None:
    (tmp_path / "many").mkdir()
    one = write(tmp_path / "many.jsonl", row("a", "One?", "Yes."))
    write(tmp_path / "many" / "x.jsonl", row("b", "Two?", "No."), row("c", "Three?", "Maybe."))
    report = run(make_config(), one, str(tmp_path / "many"))
    assert [about.rows for about in report.sources] == [1, 2]


def test_progress_is_told_for_many_rows(make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.data.check.MANY", 3)
    steps: dict[str, list[tuple[int, int | None]]] = {}

    def progress(name: str) -> Any:
        seen = steps.setdefault(name, [])
        return nullcontext(lambda done, total, note: seen.append((done, total)))

    file = write(tmp_path / "rows.jsonl", *(row(str(number), f"Question {number}?") for number in range(3)))
    check(make_config(), {"data.train": [file]}, None, progress)
    assert steps["text"] == steps["languages"] == [(0, 3), (3, 3)]
    assert steps["near duplicates"][-1] == (3, 3)


# -- token lengths -----------------------------------------------------------------------------------------------


def test_lengths_are_those_of_the_tokens_that_training_makes(make_config: Make, tokenizer: Any) -> None:
    prompt = make_config().prompt
    rows = [
        Row.model_validate(each)
        for each in (
            row("open", "Say <|im_end|> twice", "Tiền <|im_end|> đây"),
            row("grounded", evidence=[{"document": "d", "quote": "q"}]),
            row("none", answer="", evidence=[]),
        )
    ]
    answers = [rows[0].reference, with_marks(ANSWER, [1]), prompt.decline]
    asked = [ground(prompt, each.conversation, () if each.grounded else None, len).messages for each in rows]
    exact = [
        len(prompt_ids(tokenizer, messages)) + len(answer_ids(tokenizer, answer))
        for messages, answer in zip(asked, answers, strict=True)
    ]
    assert lengths.count([*rows, Text(id="t", text="abc")], tokenizer, prompt) == [*exact, 4]


def test_a_summary_and_its_bars() -> None:
    about = lengths.summarize([10] * 90 + [30] * 9 + [1000], 100)
    assert (about.rows, about.total, about.min, about.median, about.p95, about.max) == (100, 2170, 10, 10, 30, 1000)
    assert (about.longer, about.longer_share) == (1, 0.01)
    assert sum(part.rows for part in about.histogram) == 100
    drawn = lengths.bars(about.histogram)
    assert len(drawn) == lengths.BINS
    assert drawn[0].endswith("█" * lengths.BAR + " 99")
    assert drawn[-1].endswith("▌ 1") or drawn[-1].endswith("▍ 1")
    assert lengths.bars(lengths.summarize([7], 100).histogram) == ["7–7 " + "█" * lengths.BAR + " 1"]


def test_a_base_that_would_have_to_be_fetched_is_not_available(tmp_path: Path) -> None:
    def base(source: str, revision: str | None = None) -> Any:
        return lengths.available(BaseModelConfig(source=source, revision=revision), tmp_path)

    assert base("org/model") is base("pypi:model==1.0") is None
    for name, source in (("hub--org--model--v1", "hub:org/model"), ("pypi--model--1.0", "pypi:model==1.0")):
        (tmp_path / name).mkdir()
        (tmp_path / name / MARKER).write_text(json.dumps({"source": source, "revision": "c0ffee"}))
    assert base("pypi:model==1.0") == tmp_path / "pypi--model--1.0"
    assert base("org/model", "v1") == base("org/model", "c0ffee") == tmp_path / "hub--org--model--v1"
    assert base("org/model", "v2") is None
    assert base("tiny:llama") == tmp_path / "tiny--llama"
