"""Loss curves as PNG files: one run with its validations and learning rate, or several runs side by side.

Not covered: anything interactive; ``training.trackers`` sends the same events to tools that are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.errors import BadInput

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Event = dict[str, Any]
SPAN = 20
"""Steps that the smoothed curve averages over, at most; a tenth of a run that is shorter than ten times that."""
SIZE = (9.0, 5.0)
"""Inches; 110 pixels each."""


def loss_plot(events: Sequence[Event], path: Path) -> None:
    """Write the curves of one run to the PNG file `path`.

    Training loss (as logged and smoothed), validation and general loss, learning rate on an axis of its own, and a
    line where a lost worker group went on.

    Args:
        events: what :class:`training.history.History` holds.

    Raises:
        BadInput: matplotlib is not installed, or `path` cannot be written.
    """
    figure = _figure()
    axes = figure.subplots()
    steps, losses = _series(events, "loss")
    axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=1, label="training loss")
    axes.plot(steps, smooth(losses), color="tab:blue", linewidth=2, label="training loss, smoothed")
    for kind, colour, marker in (("validation", "tab:orange", "o"), ("general", "tab:green", "s")):
        at, values = _series(events, f"{kind}_loss")
        if values:
            axes.plot(at, values, color=colour, marker=marker, markersize=5, linewidth=1, label=f"{kind} loss")
    for number, event in enumerate(event for event in events if event.get("resumed")):
        label = None if number else "went on from a checkpoint"
        axes.axvline(event["step"], color="tab:red", linestyle=":", linewidth=1, label=label)
    handles, labels = axes.get_legend_handles_labels()
    at, rates = _series(events, "learning_rate")
    if rates:
        right = axes.twinx()
        right.plot(at, rates, color="tab:gray", linestyle="--", linewidth=1, label="learning rate")
        right.set_ylabel("learning rate")
        right.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        right.set_ylim(bottom=0)
        more, names = right.get_legend_handles_labels()
        handles, labels = handles + more, labels + names
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.3)
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    _write(figure, path)


def compare_plot(runs: Mapping[str, Sequence[Event]], path: Path) -> None:
    """Write the smoothed training losses and the validation losses of several runs, by name, to the PNG file `path`.

    Raises:
        BadInput: matplotlib is not installed, or `path` cannot be written.
    """
    figure = _figure()
    axes = figure.subplots()
    for number, (name, events) in enumerate(runs.items()):
        colour = f"C{number}"
        steps, losses = _series(events, "loss")
        axes.plot(steps, losses, color=colour, alpha=0.2, linewidth=1)
        axes.plot(steps, smooth(losses), color=colour, linewidth=2, label=name)
        at, values = _series(events, "validation_loss")
        if values:
            axes.plot(at, values, color=colour, marker="o", markersize=5, linestyle=":", label=f"{name}, validation")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss, smoothed")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2)
    _write(figure, path)


def smooth(values: Sequence[float]) -> list[float]:
    """Exponential moving average without the bias towards the first value (Kingma and Ba, 2015, section 3)."""
    span = max(1, min(SPAN, len(values) // 10))
    decay = 1 - 2 / (span + 1)
    smoothed, mean, weight = [], 0.0, 0.0
    for value in values:
        mean = decay * mean + (1 - decay) * value
        weight = decay * weight + (1 - decay)
        smoothed.append(mean / weight)
    return smoothed


def _series(events: Sequence[Event], key: str) -> tuple[list[int], list[float]]:
    """The steps at which `key` was logged, and its values."""
    logged = [event for event in events if key in event]
    return [int(event["step"]) for event in logged], [float(event[key]) for event in logged]


def _figure() -> Figure:
    """An empty figure that draws by Agg, whatever windows matplotlib could open here."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise BadInput(
            "plots need matplotlib, which is not installed; install it with `pip install matplotlib`"
        ) from None
    figure = Figure(figsize=SIZE, dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _write(figure: Figure, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png")
    except OSError as error:
        raise BadInput(f"{path} cannot be written ({error.strerror}); name another file") from error
