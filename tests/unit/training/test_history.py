"""One history of a run, whatever happened to its processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.storage import Storage
from training.history import SAVE_EVERY, History, gains, summary


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
    assert [event["step"] for event in whole if event.get("resumed")] == [SAVE_EVERY - 1]


def test_steps_trained_again_in_the_same_process_count_once(tmp_path: Path) -> None:
    history = History(Storage(str(tmp_path)), "run")
    logged(history, 1, 2, 3, 2, 3, 4)
    assert [event["step"] for event in history.events] == [1, 2, 3, 4]


def evaluated(step: int, **losses: float) -> dict[str, Any]:
    return {"step": step, "steps": 9, "seconds": float(step), **losses}


def test_evaluations_stand_beside_their_steps_and_go_with_later_ones(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    history = History(storage, "run")
    history.add(evaluated(0, general_loss=3.0))
    logged(history, 1, 2)
    history.add(evaluated(2, validation_loss=2.0))
    logged(history, 3, 4)
    history.add(evaluated(4, validation_loss=1.5))
    history.add(evaluated(4, general_loss=3.5))
    assert len(history.events) == 8, "an evaluation replaces no step, nor one that measured something else"
    assert len(History(storage, "run").events) == 8, "an evaluation is kept at once"

    logged(history, 3)  # trained again from the checkpoint of step 2
    assert [event["step"] for event in history.events] == [0, 1, 2, 2, 3]
    history.add(evaluated(2, validation_loss=1.9))
    assert [event["validation_loss"] for event in history.events if "validation_loss" in event] == [1.9]
    assert [event["step"] for event in history.events] == [0, 1, 2, 2, 3]


def test_an_evaluation_of_a_new_worker_group_does_not_turn_its_clock_back(tmp_path: Path) -> None:
    history = History(Storage(str(tmp_path)), "run")
    logged(history, 1, 2, 3)
    history.add({"step": 2, "seconds": 0.5, "validation_loss": 1.0})  # went on from step 2, before its first step
    history.add({"step": 3, "loss": 1.0, "seconds": 0.75})
    assert [event["seconds"] for event in history.events] == [1.0, 2.0, 2.5, 3.25]


EVENTS = st.lists(
    st.tuples(st.integers(1, 6), st.sampled_from(["loss", "validation_loss", "general_loss"]), st.floats(0.1, 9)),
    max_size=30,
)


@given(EVENTS)
def test_events_are_in_order_of_steps_and_each_measure_is_there_once(tmp_path_factory: Any, events: Any) -> None:
    history = History(Storage(str(tmp_path_factory.mktemp("store"))), "run")
    for step, kind, seconds in events:
        history.add({"step": step, kind: 1.0, "seconds": seconds})
    steps = [event["step"] for event in history.events]
    assert steps == sorted(steps)
    measured = [(event["step"], key) for event in history.events for key in event if key.endswith("loss")]
    assert len(measured) == len(set(measured))
    if events and events[-1][1] == "loss":
        assert history.events[-1]["step"] == events[-1][0]


def test_a_summary_says_where_a_run_ended() -> None:
    events = [{"step": n, "loss": 10.0 - n % 7, "seconds": n, "tokens_per_s": 5.0} for n in range(1, 21)]
    events[5:5] = [{"step": 5, "validation_loss": 4.0}, {"step": 5, "general_loss": 3.0}]
    events.append({"step": 20, "validation_loss": 4.5})
    assert summary(events) == {
        "steps": 20,
        "seconds": 20,
        "tokens_per_s": 5.0,
        "loss_first": 9.0,
        "loss_last": 4.5,
        "loss_best": 4.0,
        "validation_first": 4.0,
        "validation_last": 4.5,
        "validation_best": 4.0,
        "general_first": 3.0,
        "general_last": 3.0,
        "general_best": 3.0,
    }
    assert summary([]) == {}


def seen(step: int, **losses: float) -> dict[str, Any]:
    return {"step": step, **losses}


@pytest.mark.parametrize(
    ("events", "found"),
    [
        ([], {}),
        ([seen(0, validation_loss=3.0)], {}),
        (
            [seen(0, general_loss=2.0), seen(1, loss=1.0), seen(4, general_loss=2.2), seen(8, general_loss=2.5)],
            {"best_step": 8, "general_before": 2.0, "general_after": 2.5},
        ),
        (
            [
                *(seen(step, validation_loss=loss) for step, loss in ((0, 1.0), (4, 1.5), (8, 1.7))),
                *(seen(step, general_loss=loss) for step, loss in ((0, 2.0), (4, 2.2), (8, 2.5))),
            ],
            {
                "best_step": 4,
                "validation_before": 1.0,
                "validation_after": 1.5,
                "general_before": 2.0,
                "general_after": 2.2,
            },
        ),
    ],
    ids=["nothing", "untrained", "the last weights", "the best weights, not the base"],
)
def test_what_came_out_stands_beside_the_base(events: list[dict[str, Any]], found: dict[str, float]) -> None:
    assert gains(events) == found
