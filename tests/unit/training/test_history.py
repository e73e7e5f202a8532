"""One history of a run, whatever happened to its processes."""

from __future__ import annotations

from pathlib import Path

from cluster.storage import Storage
from training.history import SAVE_EVERY, History


def logged(history: History, *steps: int) -> None:
    for second, step in enumerate(steps, 1):
        history.add({"step": step, "loss": 10.0 - step, "seconds": float(second)})


def test_a_new_process_goes_on_where_the_checkpoint_was(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    first = History(storage, "run")
    logged(first, *range(1, SAVE_EVERY + 4))  # killed here: what was not saved is lost

    second = History(storage, "run")
    assert [event["step"] for event in second.events] == list(range(1, SAVE_EVERY + 1))
    logged(second, SAVE_EVERY - 1, SAVE_EVERY, SAVE_EVERY + 1)
    second.save()

    whole = History(storage, "run").events
    assert [event["step"] for event in whole] == list(range(1, SAVE_EVERY + 2))
    assert [event["seconds"] for event in whole] == sorted(event["seconds"] for event in whole)
    assert whole[-1]["seconds"] == (SAVE_EVERY - 2) + 3


def test_steps_trained_again_in_the_same_process_count_once(tmp_path: Path) -> None:
    history = History(Storage(str(tmp_path)), "run")
    logged(history, 1, 2, 3, 2, 3, 4)
    assert [event["step"] for event in history.events] == [1, 2, 3, 4]
