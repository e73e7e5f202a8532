"""Tables, curves and progress as text."""

from __future__ import annotations

import pytest

from metier.console import curve, progress, table


def test_curve_falls_with_its_values() -> None:
    drawn = curve([8.0, 6.0, 4.0, 2.0, 0.0])
    assert drawn == "█▆▄▂▁"
    assert len(curve([1.0] * 1000, width=48)) <= 48
    assert curve([]) == ""


def test_progress_off_a_terminal_prints_a_line_a_tenth(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("steps") as update:
        for done in range(1, 101):
            update(done, 100, f"loss {1 / done:.2f}")
    lines = [line for line in capsys.readouterr().err.splitlines() if "steps" in line]
    assert len(lines) == 11
    assert "100/100" in lines[-1]


def test_a_table_shows_what_looks_like_markup_as_it_stands(capsys: pytest.CaptureFixture[str]) -> None:
    table(("id", "n"), [("[/bold]", 1), ("[red]x", 2)])
    assert "[/bold]" in capsys.readouterr().out
