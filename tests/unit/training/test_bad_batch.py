"""A loss that is not a number ends the run, with its batch kept and its rows named."""

import json
from typing import Any

import pytest
import torch

from cluster.errors import Diverged
from cluster.storage import Storage
from training import bad_batch
from training.data.encode import Encoding
from training.trainer import CpuTrainer

SEQUENCES = {"a": [5, 6, 7], "b": [8, 9], "c": [15, 6, 7]}
ENCODING = Encoding(
    [{"input_ids": ids, "completion_mask": [1] * len(ids)} for ids in SEQUENCES.values()], list(SEQUENCES)
)


@pytest.mark.parametrize(
    ("rows", "names"),
    [([[5, 6, 7], [8, 9, 2]], ["a", "b"]), ([[8, 9, 15, 6, 7]], ["b", "c"])],
    ids=["padded", "packed"],
)
def test_the_batch_is_kept_and_its_rows_named(rows: list[list[int]], names: list[str], make_config: Any) -> None:
    storage = Storage("memory://bad-batch")
    with pytest.raises(Diverged, match=rf"the loss of step 7 is nan; the batch \(rows {', '.join(names)}\) is in"):
        bad_batch.stop(float("nan"), {"input_ids": torch.tensor(rows)}, storage, "run", 7, 1, ENCODING, make_config())
    kept = json.loads(storage.read("runs/run/bad-batch-7.json"))
    assert (kept["step"], kept["rank"], kept["loss"], kept["rows"]) == (7, 1, "nan", names)
    assert kept["input_ids"] == rows


def test_the_trainer_stops_before_anything_learns_from_such_a_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = CpuTrainer.__new__(CpuTrainer)
    stopped: list[float] = []
    trainer.on_bad_loss = lambda loss, inputs: stopped.append(loss)
    losses = iter([1.0, float("inf"), float("nan"), float("nan")])
    monkeypatch.setattr("training.trainer.AnswerLossTrainer.compute_loss", lambda *_, **__: torch.tensor(next(losses)))
    model = torch.nn.Linear(1, 1)
    for _ in range(3):
        trainer.compute_loss(model, {})
    trainer.compute_loss(model.eval(), {})
    assert [str(loss) for loss in stopped] == ["inf", "nan"], "while evaluating nothing is learned"
