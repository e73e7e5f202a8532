"""When a run stops early and which weights it keeps."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.config import EarlyStoppingConfig
from training.callbacks import VALIDATION, KeepBest, best_step, rounds_without_improvement, validations


class Weights:
    """Stands for the trainer: what it would save is the step it is at."""

    def __init__(self) -> None:
        self.step = 0

    def save_model(self, directory: str) -> None:
        Path(directory).mkdir(parents=True)
        Path(directory, "step").write_text(str(self.step))


def walk(losses: list[float], scratch: Path, **settings: Any) -> tuple[KeepBest, Any, int]:
    """Validate after every step until told to stop; returns the steps done."""
    keep, weights = KeepBest(EarlyStoppingConfig(**settings), str(scratch)), Weights()
    keep.trainer = weights
    state = SimpleNamespace(log_history=[{"step": 0, VALIDATION: 0.1}], global_step=0)
    control = SimpleNamespace(should_training_stop=False)
    keep.on_evaluate(None, state, control, {VALIDATION: 0.1})
    for step, loss in enumerate(losses, 1):
        state.global_step = weights.step = step
        state.log_history += [{"step": step, "loss": loss}, {"step": step, VALIDATION: loss}]
        keep.on_evaluate(None, state, control, {VALIDATION: loss})
        keep.on_evaluate(None, state, control, {"eval_general_loss": 0.0})
        if control.should_training_stop:
            return keep, state, step
    return keep, state, len(losses)


def test_the_best_weights_are_kept_and_the_untrained_ones_are_no_candidate(tmp_path: Path) -> None:
    keep, state, _ = walk([3.0, 1.0, 2.0], tmp_path)
    assert (keep.directory / "step").read_text() == "2"
    assert keep.is_behind(state)


def test_weights_that_end_at_their_best_are_not_behind(tmp_path: Path) -> None:
    keep, state, _ = walk([3.0, 2.0, 1.0], tmp_path)
    assert not keep.is_behind(state)


@pytest.mark.parametrize(
    ("losses", "settings", "stops"),
    [
        ([3.0, 2.0, 2.5, 2.4, 2.3], {"patience": 2}, 4),
        ([3.0, 2.0, 2.5, 1.9, 2.3], {"patience": 2}, 5),
        ([3.0, 2.95, 2.90, 2.85], {"patience": 2, "min_improvement": 0.1}, 3),
        ([3.0, 3.1, 3.2, 3.3], {}, 4),
    ],
    ids=["patience is over", "an improvement renews it", "too small an improvement does not", "without patience"],
)
def test_training_stops_when_patience_is_over(
    losses: list[float], settings: dict[str, Any], stops: int, tmp_path: Path
) -> None:
    assert walk(losses, tmp_path, **settings)[2] == stops


def test_a_run_that_goes_on_knows_what_it_saw(tmp_path: Path) -> None:
    """Only the log is left of a killed worker; a new one stops where the old one would have."""
    _, state, _ = walk([3.0, 2.0, 2.5], tmp_path / "first", patience=2)
    fresh = KeepBest(EarlyStoppingConfig(patience=2), str(tmp_path / "second"))
    fresh.trainer = Weights()
    control = SimpleNamespace(should_training_stop=False)
    state.global_step = 4
    state.log_history.append({"step": 4, VALIDATION: 2.4})
    fresh.on_evaluate(None, state, control, {VALIDATION: 2.4})
    assert control.should_training_stop
    assert best_step(validations(state.log_history)) == 2


def test_no_validation_is_no_best() -> None:
    assert best_step([]) == 0
    assert rounds_without_improvement([], 0.0) == 0
