"""What the trainer is told: our settings in the words of TRL's ``SFTConfig``."""

from __future__ import annotations

import importlib.util
from typing import Any

from cluster.config import Config
from training.deepspeed import ds_config
from training.resize import accumulation

PAD_TO = 64
"""Batches are padded to a multiple of this many tokens on the CPU: fewer shapes, and kernels are compiled per shape."""


def arguments(
    config: Config, scratch: str, *, run: str, fresh: bool, watched: bool, workers: int, universal: bool
) -> Any:
    """``SFTConfig`` of a run.

    Args:
        scratch: directory of this worker for checkpoints and logs.
        run: its name, under which trackers show it.
        fresh: False when it goes on from a checkpoint; the base is then not evaluated again.
        watched: whether there are rows to evaluate.
        workers: size of the group now.
        universal: whether it goes on from a checkpoint in DeepSpeed's universal form.
    """
    from trl import SFTConfig

    training = config.training
    on_gpu = training.on_gpu
    packed = training.packing and on_gpu
    batches = accumulation(training, workers)
    return SFTConfig(
        output_dir=scratch,
        run_name=run,
        per_device_train_batch_size=training.batch_size,
        per_device_eval_batch_size=training.batch_size,
        gradient_accumulation_steps=batches,
        num_train_epochs=training.epochs,
        max_steps=training.max_steps or -1,
        learning_rate=training.learning_rate,
        weight_decay=training.weight_decay,
        lr_scheduler_type="constant_with_warmup" if training.scheduler == "constant" else training.scheduler,
        lr_scheduler_kwargs={"min_lr_rate": 0.1} if training.scheduler == "cosine_with_min_lr" else {},
        warmup_steps=training.warmup_ratio,
        max_grad_norm=training.deepspeed.gradient_clipping,
        train_sampling_strategy="random" if training.packing else "group_by_length",
        completion_only_loss=True,
        max_length=training.max_tokens if packed else None,
        packing=packed,
        eval_packing=False,
        pad_to_multiple_of=None if on_gpu else PAD_TO,
        bf16=config.base.dtype == "bfloat16",
        fp16=config.base.dtype == "float16",
        use_cpu=not on_gpu,
        use_liger_kernel=uses_liger(config),
        ddp_backend="nccl" if on_gpu else "gloo",
        deepspeed=ds_config(config, accumulation=batches, universal=universal),
        gradient_checkpointing=on_gpu if training.gradient_checkpointing is None else training.gradient_checkpointing,
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if watched else "no",
        eval_steps=training.validate_steps or training.checkpoint_steps,
        eval_on_start=watched and fresh,
        prediction_loss_only=True,
        save_strategy="steps",
        save_steps=training.checkpoint_steps,
        save_total_limit=1,
        report_to=list(training.trackers) or "none",
        disable_tqdm=True,
        dataloader_pin_memory=on_gpu,
        seed=training.seed,
        data_seed=training.seed,
    )


def uses_liger(config: Config) -> bool:
    """Whether Liger's kernels are used: where asked for, by default on GPUs that have them."""
    training = config.training
    if training.liger is None:
        return training.on_gpu and importlib.util.find_spec("liger_kernel") is not None
    return training.liger
