"""``metier data check``: what is wrong with training rows, told before any GPU is taken, and a cleaned copy of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.config import Config
from cluster.errors import BadInput, MetierError
from metier.console import print_json, progress, say, table
from metier.options import ConfigOption, JsonOption, SetOption, open_config

if TYPE_CHECKING:
    from training.data.check import Checked, Finding, Report
    from training.data.fix import Fixed

SHOWN = 20
"""Findings shown without ``--all``."""
UNMARKED = "no difference"
PICTURES = (".png", ".svg", ".pdf")


def check(
    paths: Annotated[
        list[str] | None,
        typer.Argument(metavar="[ROWS]...", help="Files, directories or hub: data sets to check instead."),
    ] = None,
    config: ConfigOption = None,
    set_: SetOption = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw the token lengths into this file (.png).")] = None,
    fix: Annotated[
        Path | None, typer.Option("--fix", help="Write a cleaned copy and its diff to this directory.")
    ] = None,
    scrub: Annotated[
        bool, typer.Option("--scrub", help="With --fix: replace secrets and personal data by <EMAIL> and the like.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="With --fix: replace a directory that is not empty.")] = False,
    all_: Annotated[bool, typer.Option("--all", help=f"Show every finding, not the first {SHOWN}.")] = False,
    json: JsonOption = False,
) -> None:
    """Check the rows of data.train, data.validation and data.general, and say what to do about each problem.

    Ends with 2 if training would refuse a row, with 0 if there are only warnings.
    """
    settings = open_config(config, set_)
    lists = _lists(settings, paths or [])
    if plot is not None and plot.suffix.lower() not in PICTURES:
        raise BadInput(f"--plot {plot}: use a name that ends in {', '.join(PICTURES)}")
    if (scrub or force) and fix is None:
        raise BadInput("--scrub and --force go with --fix; name the directory of the cleaned copy with --fix DIR")
    from training.data.check import check as run

    tokenizer, note = _tokenizer(settings)
    checked = run(settings, lists, tokenizer, progress)
    report = checked.report
    report.lengths_note = note
    drawn = plot if plot is not None and _plot(checked, plot) else None
    fixed = _fix(checked, fix, scrub=scrub, force=force) if fix is not None else None
    if json:
        print_json({"report": report, "plot": drawn and str(drawn), "fixed": fixed})
    else:
        _show(report, every=all_)
        if drawn:
            typer.echo(f"Token lengths are drawn in {drawn}.")
        if fixed:
            _show_fixed(fixed, settings)
    if report.errors:
        raise typer.Exit(BadInput.exit_code)


def _lists(config: Config, paths: Sequence[str]) -> dict[str, Sequence[str]]:
    if paths:
        return {"data.train": paths}
    data = config.data
    named = {"data.train": data.train, "data.validation": data.validation, "data.general": data.general}
    lists: dict[str, Sequence[str]] = {name: sources for name, sources in named.items() if sources}
    if not lists:
        raise BadInput(
            "data.train: names no rows; name files there, or after the command: metier data check rows.jsonl",
            param="data.train",
        )
    return lists


def _tokenizer(config: Config) -> tuple[Any | None, str]:
    """The tokenizer of the base if it is on this machine, and what to say about lengths."""
    from cluster.models import load_tokenizer
    from training.data.lengths import available

    try:
        directory = available(config.base, config.models_cache)
        if directory is None:
            return None, (
                f"not counted: the base '{config.base.source}' is not on this machine; `metier models fetch` fetches it"
            )
        return load_tokenizer(directory, config.base.trust_remote_code), "passages come on top"
    except MetierError as error:
        return None, f"not counted: {error.message}"


def _plot(checked: Checked, file: Path) -> bool:
    if not checked.token_counts:
        say(f"--plot {file}: not drawn, since there are no token lengths")
        return False
    from training.data.lengths import plot

    assert checked.report.lengths
    plot(checked.token_counts, checked.report.lengths.limit, file)
    return True


def _fix(checked: Checked, directory: Path, *, scrub: bool, force: bool) -> Fixed:
    from training.data.fix import write

    return write(checked, directory, scrub=scrub, force=force)


# -- what is shown -----------------------------------------------------------------------------------------------


def _show(report: Report, *, every: bool) -> None:
    from training.data.check import summary
    from training.data.lengths import bars

    _show_sources(report)
    _show_shares("Languages", report.languages, "not judged")
    _show_shares(
        "Unicode forms", {UNMARKED if form == "either" else form: n for form, n in report.forms.items()}, UNMARKED
    )
    if report.lengths:
        about = report.lengths
        typer.echo(
            f"Tokens: min {about.min}, median {about.median}, p95 {about.p95}, max {about.max}, {about.total:,} in all "
            f"({report.lengths_note}); {about.longer_share:.1%} of the rows are longer than training.max_tokens ({about.limit})"
        )
        typer.echo("\n".join(bars(about.histogram)))
    else:
        typer.echo(f"Tokens: {report.lengths_note}")
    if not report.findings:
        rows = sum(source.rows for source in report.sources)
        typer.echo(f"No errors and no warnings in {_counted(rows, 'row')}.")
        return
    typer.echo("")
    table(("", "kind", "findings"), [(level, _cell(kind), n) for level, kind, n in summary(report.findings)])
    typer.echo("")
    errors = report.errors
    ordered = [*errors, *(finding for finding in report.findings if finding.level == "warning")]
    shown = ordered if every else ordered[:SHOWN]
    table(("", "place", "field", "reason", "fix"), [_finding(finding) for finding in shown])
    if len(ordered) > len(shown):
        typer.echo(f"… and {len(ordered) - len(shown)} more; --all shows them")
    typer.echo(f"{_counted(len(errors), 'error')}, {_counted(len(ordered) - len(errors), 'warning')}")


def _show_sources(report: Report) -> None:
    for about in report.sources:
        shape = about.shape or "no known shape"
        counts = [shape, _counted(about.rows, "row"), *([_counted(about.turns, "turn")] if about.turns else [])]
        typer.echo(f"{about.list}  {_short(about.source)}: {', '.join(counts)}")
        if about.kinds:
            kinds = ", ".join(f"{kind} {n}" for kind, n in about.kinds.items())
            evidence = f"{about.with_evidence} with evidence, {about.not_answerable} not answerable"
            typer.echo(f"  {kinds}; {evidence}, {about.without_documents} without documents")
        if about.ignored:
            typer.echo(f"  fields left out: {', '.join(about.ignored)}")


def _show_shares(what: str, counts: dict[str, int], rest: str) -> None:
    """One line of percentages; `rest` is what counts for none of them."""
    judged = {name: n for name, n in counts.items() if name != rest}
    total = sum(judged.values())
    shares = ", ".join(f"{name} {n / total:.1%}" for name, n in sorted(judged.items(), key=lambda item: -item[1]))
    if rows := counts.get(rest, 0):
        shares = ", ".join(filter(None, [shares, f"{rest} in {_counted(rows, 'row')}"]))
    if shares:
        typer.echo(f"{what}: {shares}")


def _show_fixed(fixed: Fixed, config: Config) -> None:
    table(("change", "count"), [(_cell(kind), n) for kind, n in fixed.changes.items()] or [("none", 0)])
    for source, file in fixed.files.items():
        typer.echo(f"{_short(source)} -> {file}")
    typer.echo(f"{fixed.written} of {_counted(fixed.read, 'row')} written; what changed is in {fixed.diff}")
    if config.data.shape != "auto":
        typer.echo("The copies are of shape chat or text: use them with data.shape=auto.")


def _finding(finding: Finding) -> tuple[str, str, str, str, str]:
    return finding.level, _cell(_short(finding.place)), _cell(finding.field), _cell(finding.reason), finding.fix


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _short(place: str) -> str:
    """`place` from the working directory, where it lies below it."""
    return place.removeprefix(f"{Path.cwd()}/")


def _cell(text: str) -> str:
    """`text` without what moves the cursor."""
    return "".join(character if character.isprintable() else "·" for character in text)
