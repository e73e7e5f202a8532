"""The body of a training worker: TRL's ``SFTTrainer`` under DeepSpeed, reporting to Ray Train.

Every worker keeps its checkpoints in a directory of its own; Ray Train merges them in the run's storage, so that a
sharded optimizer (one file a rank) is whole there whichever node a rank ran on.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cluster.config import Config, from_json
from cluster.errors import MetierError
from cluster.models import load_tokenizer, resolve
from cluster.storage import Storage
from training import bad_batch, base, resize
from training.arguments import arguments
from training.callbacks import BEST, KeepBest, Report
from training.data import examples
from training.data.encode import Encoding, encode
from training.memory import as_resources_short


def train_worker(spec: dict[str, Any]) -> None:
    """Train on one worker; called by Ray Train on each.

    Args:
        spec: ``config`` (resolved JSON), ``run`` (its name), ``datasets`` (``train``, and where there are such rows
            ``validation`` and ``general``: paths of examples in storage), ``events`` (a queue that takes one dict a
            logged step or evaluation, from rank 0, and from any rank ``{"error": MetierError}`` where trying again
            would end the same way).
    """
    from deepspeed.ops import __compatible_ops__

    # Collectives over shared memory, for inference only: compiling them takes a minute, and a compiler that is killed
    # leaves a lock in torch's cache for which every later run waits.
    __compatible_ops__["deepspeed_shm_comm"] = False
    config = from_json(spec["config"])
    try:
        _train(config, spec)
    except MetierError as error:
        spec["events"].put({"error": error})
        raise
    except (RuntimeError, MemoryError) as error:
        short = as_resources_short(error, config)
        if short is None:
            raise
        spec["events"].put({"error": short})
        raise short from error


def _train(config: Config, spec: dict[str, Any]) -> None:
    import ray.train
    from ray.train import Checkpoint
    from transformers import set_seed

    from training.trainer import CpuTrainer, Trainer

    began = time.monotonic()
    storage = Storage.of(config.storage)
    directory = resolve(config.base, config.models_cache)
    tokenizer = load_tokenizer(directory, config.base.trust_remote_code)
    training = config.training
    encodings = {
        name: encode(examples.read(storage, path), tokenizer, training.max_tokens, training.too_long)
        for name, path in spec["datasets"].items()
    }
    rank, workers = ray.train.get_context().get_world_rank(), ray.train.get_context().get_world_size()
    with (
        _scratch(f"metier-{spec['run']}-{rank}") as scratch,
        resize.opened(ray.train.get_checkpoint(), workers, Path(scratch)) as (resumed, universal),
    ):
        if "tensorboard" in training.trackers:
            # transformers' own default is the scratch directory, which is gone after the run.
            os.environ["TENSORBOARD_LOGGING_DIR"] = storage.full_url(f"runs/{spec['run']}/tensorboard")
        set_seed(training.seed)  # the initial LoRA weights; the trainer sets it again for all that follows
        watched = {name: _dataset(encoding) for name, encoding in encodings.items() if name != "train"}
        args = arguments(
            config,
            scratch,
            run=spec["run"],
            fresh=resumed is None,
            watched=bool(watched),
            workers=workers,
            universal=universal,
        )
        packed = training.packing and not training.on_gpu
        report = Report(spec["events"], encodings["train"].tokens, began, config)
        keep_best = KeepBest(training.early_stopping, scratch)
        trainer = (Trainer if training.on_gpu else CpuTrainer)(
            model=base.load(config, directory),
            args=args,
            train_dataset=_packed(encodings["train"], training.max_tokens) if packed else _dataset(encodings["train"]),
            eval_dataset=watched or None,
            processing_class=tokenizer,
            callbacks=[report, *([keep_best] if "validation" in watched else [])],
            on_bad_loss=lambda loss, inputs: bad_batch.stop(
                loss, inputs, storage, spec["run"], trainer.state.global_step + 1, rank, encodings["train"], config
            ),
        )
        keep_best.trainer = trainer
        if packed:
            trainer.data_collator.return_position_ids = True
        if resumed is not None and (best := resumed / BEST).is_dir() and rank == 0:
            shutil.copytree(best, Path(scratch, BEST))
        trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed))
        final = Path(scratch, "final")
        if not keep_best.is_behind(trainer.state):
            trainer.save_model(str(final))
        elif rank == 0:
            Path(scratch, BEST).rename(final)
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


def _dataset(encoding: Encoding) -> Any:
    from datasets import Dataset

    return Dataset.from_list([dict(sequence) for sequence in encoding.sequences])


def _packed(encoding: Encoding, max_tokens: int) -> Any:
    """Sequences put together up to `max_tokens`, with where each ends in ``seq_lengths``; none is cut.

    On GPUs TRL packs by itself, into one row without padding, for kernels that take sequences of unequal length. On the
    CPU scores of that long row would grow with the square of the batch, so packed rows stay rows of a batch there.
    """
    from trl import pack_dataset

    return pack_dataset(_dataset(encoding), max_tokens, "bfd")
