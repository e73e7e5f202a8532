"""The DeepSpeed configuration of a run, from ours. Pure: a test reads it without DeepSpeed."""

from __future__ import annotations

from typing import Any

from cluster.config import Config


def ds_config(config: Config) -> dict[str, Any]:
    """What DeepSpeed is told; batch sizes and accumulation are filled in by the trainer (``auto``).

    On CPU workers DeepSpeed's fused optimizers are not to be had, so ``torch_adam`` is asked for there. Weights are
    held in ``base.dtype``; with bf16 and fp16 the optimizer keeps fp32 master copies of what is trained.
    """
    training = config.training
    on_gpu = training.gpus_per_worker > 0
    return {
        "zero_optimization": {
            "stage": training.deepspeed.zero_stage,
            "overlap_comm": on_gpu,
            "contiguous_gradients": True,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        "bf16": {"enabled": config.base.dtype == "bfloat16"},
        "fp16": {"enabled": config.base.dtype == "float16"},
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": training.learning_rate,
                "betas": [0.9, 0.999],
                "eps": 1e-8,
                "weight_decay": 0.0,
                "torch_adam": not on_gpu,
            },
        },
        "gradient_clipping": training.deepspeed.gradient_clipping,
        "train_micro_batch_size_per_gpu": training.batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation,
        "train_batch_size": "auto",
        "steps_per_print": 10**9,
    }
