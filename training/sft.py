"""The body of a training worker: TRL's ``SFTTrainer`` under DeepSpeed, reporting to Ray Train.

Every worker keeps its checkpoints in a directory of its own; Ray Train merges them in the run's storage, so that a
sharded optimizer (one file a rank) is whole there whichever node a rank ran on.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cluster.config import Config, from_json
from cluster.models import load_tokenizer, resolve
from cluster.storage import Storage
from training.base import load_with_lora
from training.deepspeed import ds_config
from training.data.encode import Encoded, encode, tokens
from training.data.grounded import GroundedRow

PAD_TO = 64
"""Batches are padded to a multiple of this many tokens: fewer shapes, and CPU kernels are compiled per shape."""


def train_worker(spec: dict[str, Any]) -> None:
    """Train on one worker; called by Ray Train on each.

    Args:
        spec: ``config`` (resolved JSON), ``run`` (its name), ``dataset`` (path of the grounded rows in storage), ``events`` (a queue
            that takes one dict a logging step, from rank 0).
    """
    import ray.train
    from datasets import Dataset
    from ray.train import Checkpoint
    from transformers import set_seed
    from trl import SFTTrainer

    from training.loss import AnswerLossTrainer

    config = from_json(spec["config"])
    directory = resolve(config.base, config.models_cache)
    tokenizer = load_tokenizer(directory, config.base.trust_remote_code)
    rows = read_dataset(Storage.of(config.storage), spec["dataset"])
    encoded = encode(rows, tokenizer, config.training.max_tokens)

    rank = ray.train.get_context().get_world_rank()
    with _scratch(f"metier-{spec['run']}-{rank}") as scratch:
        set_seed(config.training.seed)  # the initial LoRA weights; the trainer sets it again for all that follows
        kind = SFTTrainer if config.training.gpus_per_worker > 0 else AnswerLossTrainer
        trainer = kind(
            model=load_with_lora(config, directory),
            args=_arguments(config, scratch),
            train_dataset=Dataset.from_list([dict(row) for row in encoded]),
            processing_class=tokenizer,
            callbacks=_callbacks(spec["events"], encoded),
        )
        trainer.model.enable_input_require_grads()
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            trainer.train()
        else:
            with checkpoint.as_directory() as resumed:
                trainer.train(resume_from_checkpoint=str(resumed))
        final = Path(scratch, "final")
        trainer.save_model(str(final))
        ray.train.report(
            {"step": trainer.state.global_step}, checkpoint=Checkpoint.from_directory(final) if rank == 0 else None
        )


@contextlib.contextmanager
def _scratch(name: str) -> Iterator[str]:
    """An empty directory of this worker; what a killed worker of the same run left in it is removed first."""
    directory = Path(tempfile.gettempdir(), name)
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(mode=0o700)
    try:
        yield str(directory)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def read_dataset(storage: Storage, path: str) -> list[GroundedRow]:
    """The grounded rows the driver stored for this run."""
    return [GroundedRow.model_validate_json(line) for line in storage.read(path).splitlines()]


def _arguments(config: Config, scratch: str) -> Any:
    from trl import SFTConfig

    training = config.training
    on_gpu = training.gpus_per_worker > 0
    return SFTConfig(
        output_dir=scratch,
        per_device_train_batch_size=training.batch_size,
        gradient_accumulation_steps=training.gradient_accumulation,
        num_train_epochs=training.epochs,
        max_steps=training.max_steps or -1,
        learning_rate=training.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=training.warmup_ratio,
        max_grad_norm=training.deepspeed.gradient_clipping,
        train_sampling_strategy="group_by_length",
        completion_only_loss=True,
        max_length=None,
        pad_to_multiple_of=None if on_gpu else PAD_TO,
        bf16=config.base.dtype == "bfloat16",
        fp16=config.base.dtype == "float16",
        use_cpu=not on_gpu,
        ddp_backend="nccl" if on_gpu else "gloo",
        deepspeed=ds_config(config),
        gradient_checkpointing=on_gpu,
        logging_steps=1,
        save_strategy="steps",
        save_steps=training.checkpoint_steps,
        save_total_limit=1,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=on_gpu,
        seed=training.seed,
        data_seed=training.seed,
    )


def _callbacks(events: Any, encoded: list[Encoded]) -> list[Any]:
    import ray.train
    from ray.train import Checkpoint
    from transformers import TrainerCallback
    from transformers.trainer_utils import get_last_checkpoint

    class Report(TrainerCallback):
        """Logged metrics go to the driver's queue, saved checkpoints to Ray Train."""

        def __init__(self) -> None:
            self.started = 0.0
            self.first_epoch = 0.0

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.started = time.monotonic()
            self.first_epoch = state.epoch or 0.0

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
            if not state.is_world_process_zero or not logs or "loss" not in logs:
                return
            seconds = time.monotonic() - self.started
            seen = (state.epoch - self.first_epoch) * tokens(encoded)
            events.put(
                {
                    "step": state.global_step,
                    "steps": state.max_steps,
                    "loss": logs["loss"],
                    "grad_norm": float(logs.get("grad_norm") or 0.0),
                    "learning_rate": logs.get("learning_rate", 0.0),
                    "seconds": round(seconds, 3),
                    "tokens_per_s": round(seen / seconds, 1) if seconds else 0.0,
                }
            )

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            path = get_last_checkpoint(args.output_dir)
            ray.train.report({"step": state.global_step}, checkpoint=Checkpoint.from_directory(path) if path else None)

    return [Report()]
