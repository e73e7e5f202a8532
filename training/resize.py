"""Going on from a checkpoint with another number of workers than wrote it.

DeepSpeed loads sharded optimizer states only with the number of ranks that saved them; its universal form has no such
limit. The conversion reads the shards with ``torch.load``, as every resume under DeepSpeed does: they are our own.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cluster.config import TrainingConfig

OPTIMIZER_STATES = "global_step*/*_optim_states.pt"


def accumulation(training: TrainingConfig, workers: int) -> int:
    """Batches a step of a group of `workers`: a step keeps its rows, or with a size that does not divide them about so many."""
    return max(1, round(training.gradient_accumulation * training.workers / workers))


@contextlib.contextmanager
def opened(checkpoint: Any, workers: int, scratch: Path) -> Iterator[tuple[Path | None, bool]]:
    """The files of a ``ray.train.Checkpoint`` (or none) as `workers` can load them, and whether they are in universal form."""
    if checkpoint is None:
        yield None, False
        return
    with checkpoint.as_directory() as directory:
        saved = Path(directory)
        shards = len(list(saved.glob(OPTIMIZER_STATES)))  # none under ZeRO-0, whose states are whole
        if shards in (0, workers):
            yield saved, False
        else:
            yield universal(saved, scratch), True


def universal(saved: Path, scratch: Path) -> Path:
    """The checkpoint `saved` in DeepSpeed's universal form, in `scratch`; `saved` may be shared and is only read."""
    from deepspeed.checkpoint.ds_to_universal import main

    step = (saved / "latest").read_text().strip()
    made = scratch / "universal"
    made.mkdir()
    for entry in saved.iterdir():
        (made / entry.name).symlink_to(entry)
    main(
        argparse.Namespace(
            input_folder=str(saved / step),
            output_folder=str(made / f"{step}_universal"),
            num_extract_workers=1,  # in this process
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
    )
    return made
