"""What :mod:`evaluation.retrieval` measured, as a PNG file: a panel a test collection, a bar a mode, with intervals."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from cluster.errors import BadInput
from evaluation.retrieval import Evaluated
from evaluation.statistics import mean_interval

SHOWN = ("nDCG@10", "RR@10", "AP", "R@10", "R@100")
RESAMPLES = 1000
"""Of the bootstrap; enough for what can be seen."""
PANEL = (7.5, 3.6)
"""Inches; 110 pixels each."""


def retrieval_plot(evaluated: Mapping[str, Evaluated], path: Path) -> None:
    """Write means and 95 % bootstrap intervals of the measures of :data:`SHOWN` to the PNG file `path`.

    Args:
        evaluated: name of a test collection -> its modes.

    Raises:
        BadInput: matplotlib is not installed, or `path` cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise BadInput(
            "plots need matplotlib, which is not installed; install it with `pip install matplotlib`"
        ) from None
    figure = Figure(figsize=(PANEL[0], PANEL[1] * len(evaluated)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    for row, (name, result) in enumerate(evaluated.items(), start=1):
        axes = figure.add_subplot(len(evaluated), 1, row)
        width = 0.8 / len(result.modes)
        for number, (mode, measured) in enumerate(result.modes.items()):
            shown = [one for one in SHOWN if one in measured.values]
            means = [mean_interval(list(measured.values[one].values()), resamples=RESAMPLES) for one in shown]
            axes.bar(
                [place + (number - (len(result.modes) - 1) / 2) * width for place in range(len(shown))],
                [one.mean for one in means],
                width,
                yerr=[[one.mean - one.low for one in means], [one.high - one.mean for one in means]],
                capsize=2,
                label=mode,
            )
            axes.set_xticks(range(len(shown)), shown)
        axes.set_ylim(0, 1)
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
        axes.set_title(f"{name}: {result.queries} queries, {result.documents} documents", fontsize=10)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", fontsize=8, ncols=len(result.modes))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png")
    except OSError as error:
        raise BadInput(f"{path} cannot be written ({error.strerror}); name another file") from error
