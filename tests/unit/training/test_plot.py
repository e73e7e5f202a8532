"""Loss curves are pictures of what was logged: other numbers, another picture."""

from __future__ import annotations

import struct
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import BadInput
from training.plot import compare_plot, loss_plot, smooth


def events(slope: float = 0.1, **more: Any) -> list[dict[str, Any]]:
    steps = [{"step": n, "loss": 4 - slope * n + n % 3 / 10, "learning_rate": 1e-3 / n, **more} for n in range(1, 31)]
    return [*steps, {"step": 10, "validation_loss": 3.0}, {"step": 20, "validation_loss": 2.5}]


def pixels(file: Path) -> bytes:
    """The file without what matplotlib says of itself in it; it must be a PNG of a readable size."""
    data = file.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", data[16:24])
    assert width >= 600 and height >= 400
    return data[data.index(b"IDAT") :]


def drawn(directory: Path, logged: list[dict[str, Any]]) -> bytes:
    file = directory / "loss.png"
    loss_plot(logged, file)
    return pixels(file)


def test_every_kind_of_event_moves_the_picture(tmp_path: Path) -> None:
    plain = drawn(tmp_path, events())
    assert drawn(tmp_path, events()) == plain
    others = {
        "loss": events(0.05),
        "validation": [event for event in events() if "validation_loss" not in event],
        "general": [*events(), {"step": 30, "general_loss": 3.3}],
        "learning rate": [{k: v for k, v in event.items() if k != "learning_rate"} for event in events()],
        "resume": [event | ({"resumed": True} if event["step"] == 12 else {}) for event in events()],
    }
    pictures = {name: drawn(tmp_path, logged) for name, logged in others.items()}
    assert all(picture != plain for picture in pictures.values())
    assert len(set(pictures.values())) == len(pictures)


def test_a_run_that_logged_nothing_has_a_picture_too(tmp_path: Path) -> None:
    assert drawn(tmp_path, []) != drawn(tmp_path, events())


def test_runs_side_by_side(tmp_path: Path) -> None:
    one, two = tmp_path / "one.png", tmp_path / "new" / "two.png"
    compare_plot({"lamps-a": events()}, one)
    compare_plot({"lamps-a": events(), "lamps-b": events(0.05)}, two)
    assert pixels(one) != pixels(two)


def test_smoothing_follows_the_level_and_not_the_noise() -> None:
    noisy = [3.0 + (-1) ** n for n in range(400)]
    smoothed = smooth(noisy)
    assert smoothed[0] == noisy[0], "no bias towards zero"
    assert max(abs(value - 3.0) for value in smoothed[100:]) < 0.1
    assert smooth([5.0] * 50) == pytest.approx([5.0] * 50)


def test_what_cannot_be_drawn_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match=r"cannot be written .*name another file"):
        loss_plot(events(), tmp_path / "file" / "loss.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(BadInput, match="plots need matplotlib"):
        loss_plot(events(), tmp_path / "loss.png")
