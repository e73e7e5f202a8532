"""The loss of a step on the CPU: logits only where a label is.

TRL's fused loss skips prompt positions on GPUs but scores every position elsewhere, and with answers of ten tokens
after prompts of three hundred that was the larger part of a step (docs/decisions/0004-training-speed.md). The value is
the same: mean cross-entropy over the answer tokens of the whole batch.
"""

from __future__ import annotations

from typing import Any

import torch
from trl import SFTTrainer


class AnswerLossTrainer(SFTTrainer):  # type: ignore[misc]
    """``SFTTrainer`` with that loss."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs["labels"][:, 1:]
        positions = (labels != -100).any(dim=0).nonzero().flatten()
        outputs = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            use_cache=False,
            logits_to_keep=positions,
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
