"""A training step on the CPU: the loss with logits only where a label is, against TRL's own, on one model and batch.

``python -m benchmarks.answer_loss [--quick] [--json FILE]``. Forward and backward of a batch shaped like the sample
trade (4 rows of 330 tokens, 12 of them answer), LoRA rank 16 on all linear layers, bf16, the arms in turns. Not
covered: the optimizer, DeepSpeed, several workers, GPUs (where TRL's loss is used).
"""

from __future__ import annotations

import statistics
import tempfile
import time
from typing import Any

import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from benchmarks import report
from cluster.config import load
from cluster.models import load_tokenizer, resolve
from training import base
from training.trainer import AnswerLossTrainer

ROWS, TOKENS, ANSWER = 4, 330, 12


def measure(steps: int) -> dict[str, Any]:
    """Median seconds a step, by arm; `steps` of each."""
    config = load()
    directory = resolve(config.base, config.models_cache)
    ids = torch.randint(100, 40_000, (ROWS, TOKENS), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, :-ANSWER] = -100
    with tempfile.TemporaryDirectory() as scratch:
        trainer = SFTTrainer(
            model=base.load(config, directory),
            args=SFTConfig(output_dir=scratch, use_cpu=True, bf16=False, report_to="none", max_length=None),
            train_dataset=Dataset.from_list([{"input_ids": ids[0].tolist(), "completion_mask": [1] * TOKENS}]),
            processing_class=load_tokenizer(directory),
        )
        times: dict[str, list[float]] = {"TRL": [], "ours": []}
        losses = {}
        for turn in range(steps + 2):
            for name, kind in (("TRL", SFTTrainer), ("ours", AnswerLossTrainer)):
                inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
                began = time.perf_counter()
                loss = kind.compute_loss(trainer, trainer.model, inputs)
                loss.backward()
                if turn >= 2:  # the first ones warm up
                    times[name].append(time.perf_counter() - began)
                losses[name] = round(float(loss), 4)
                trainer.model.zero_grad()
    seconds = {name: statistics.median(values) for name, values in times.items()}
    return {
        "threads": torch.get_num_threads(),
        "batch": [ROWS, TOKENS, ANSWER],
        "losses": losses,
        "seconds": seconds,
        "ratios": {"step": round(seconds["TRL"] / seconds["ours"], 2)},
    }


if __name__ == "__main__":
    report.run(__doc__, measure, quick=3, full=10)
