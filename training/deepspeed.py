"""The DeepSpeed configuration of a run, from ours. Pure: a test reads it without DeepSpeed."""

from __future__ import annotations

from typing import Any

from cluster.config import Config

BUCKET = 50_000_000
"""Elements of the buffers in which gradients are reduced and weights gathered. DeepSpeed's own half a billion take two
gigabytes of every GPU, however little is trained."""


def ds_config(config: Config, *, accumulation: int | None = None, universal: bool = False) -> dict[str, Any]:
    """What DeepSpeed is told; the total batch is filled in by the trainer (``auto``).

    On CPU workers DeepSpeed's fused optimizers are not to be had, so ``torch_adam`` is asked for there. Weights are
    held in ``base.dtype``; with bf16 and fp16 the optimizer keeps fp32 master copies of what is trained.
    """
    training = config.training
    return {
        "zero_optimization": {
            "stage": training.deepspeed.zero_stage,
            "overlap_comm": training.on_gpu,
            "contiguous_gradients": True,
            "reduce_bucket_size": BUCKET,
            "allgather_bucket_size": BUCKET,
            "stage3_gather_16bit_weights_on_model_save": True,
            **_offload(config),
        },
        "bf16": {"enabled": config.base.dtype == "bfloat16"},
        "fp16": {"enabled": config.base.dtype == "float16"},
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": training.learning_rate,
                "betas": [0.9, 0.999],
                "eps": 1e-8,
                "weight_decay": training.weight_decay,
                "torch_adam": not training.on_gpu,
            },
        },
        "gradient_clipping": training.deepspeed.gradient_clipping,
        "train_micro_batch_size_per_gpu": training.batch_size,
        "gradient_accumulation_steps": accumulation or training.gradient_accumulation,
        **({"checkpoint": {"load_universal": True}} if universal else {}),
        "train_batch_size": "auto",
        "steps_per_print": 10**9,
    }


def _offload(config: Config) -> dict[str, Any]:
    offload = config.training.deepspeed.offload
    pin = config.training.on_gpu
    nvme = {"nvme_path": offload.nvme_path} if offload.nvme_path else {}
    sections = {"offload_optimizer": offload.optimizer, "offload_param": offload.parameters}
    return {
        name: {"device": device, "pin_memory": pin, **nvme} for name, device in sections.items() if device != "none"
    }
