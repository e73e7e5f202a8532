"""TRL's ``SFTTrainer`` with what a run here needs more: an order of rows that a resumed run finds again, no step on a loss
that is not a number, and a loss on the CPU that computes logits only where a label is.

TRL's fused loss skips prompt positions on GPUs but scores every position elsewhere, and with answers of ten tokens
after prompts of three hundred that was the larger part of a step (docs/decisions/0004-training-speed.md). The value is
the same: mean cross-entropy over the answer tokens of the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers.trainer_pt_utils import LengthGroupedSampler
from trl import SFTTrainer


class SeededOrder(torch.utils.data.Sampler[int]):
    """The order of another sampler, decided by seed and epoch alone.

    transformers' sampler by length takes its order from the global random state, which an evaluation before the first
    step changes: a resumed run, which has none, would see its rows in another order.
    """

    def __init__(self, sampler: Any, seed: int) -> None:
        self.sampler, self.seed, self.epoch = sampler, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        self.sampler.generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(self.sampler)


class Trainer(SFTTrainer):
    """``SFTTrainer`` with that order, which calls `on_bad_loss` with the batch of a loss that is NaN or infinite before
    anything learns from it."""

    def __init__(self, *args: Any, on_bad_loss: Callable[[float, dict[str, Any]], None], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.on_bad_loss = on_bad_loss

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        sampler = super()._get_train_sampler(*args, **kwargs)
        if not isinstance(sampler, LengthGroupedSampler):
            return sampler
        # Its unit is the batch of one worker, which a group of another size accumulates differently.
        sampler.batch_size = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return SeededOrder(sampler, self.args.seed)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        outcome = super().compute_loss(model, inputs, *args, **kwargs)
        loss = outcome[0] if isinstance(outcome, tuple) else outcome
        if model.training and not torch.isfinite(loss):
            self.on_bad_loss(float(loss), inputs)
        return outcome


class AnswerLossTrainer(SFTTrainer):
    """``SFTTrainer`` with that loss on the CPU."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs["labels"][:, 1:]
        positions = (labels != -100).any(dim=0).nonzero().flatten()
        # Positions that start again say where one packed row ends; a mask of ones would hide it.
        packed = {key: inputs[key] for key in ("position_ids",) if key in inputs}
        outputs = model(
            input_ids=inputs["input_ids"],
            attention_mask=None if packed else inputs["attention_mask"],
            use_cache=False,
            logits_to_keep=positions,
            **packed,
        )
        targets = labels[:, positions]
        total = torch.nn.functional.cross_entropy(
            outputs.logits.float().flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum"
        )
        if num_items_in_batch is None:
            loss = total / (targets != -100).sum().clamp(min=1)
        else:  # counts the answer tokens of all ranks, and gradients are averaged over ranks
            loss = total / num_items_in_batch * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss


class CpuTrainer(Trainer, AnswerLossTrainer):
    """Both."""
