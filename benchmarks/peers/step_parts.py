"""One worker's optimizer step taken apart, without Ray: forward, backward, DeepSpeed's step, the all-reduce alone, and
which operators the time goes to.

``python -m benchmarks.peers.step_parts TASK.json``, one process a rank, with RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR,
MASTER_PORT and OMP_NUM_THREADS in the environment. TASK.json holds ``settings`` (overrides of the configuration),
``batch`` (rows, tokens, answer tokens), ``steps`` and ``out``. Model, loss and DeepSpeed configuration are those of a
real worker; the batch is random and the same size each time.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch.profiler import ProfilerActivity, profile

from cluster.config import load
from cluster.models import resolve
from training import base
from training.deepspeed import ds_config
from training.trainer import AnswerLossTrainer

GROUPS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "mkldnn", "onednn"),
    "collectives and waiting for them": ("gloo", "c10d", "nccl"),
    "copies and casts": ("aten::copy_", "aten::cat", "aten::clone", "aten::contiguous", "aten::_to_copy"),
    "optimizer": ("Optimizer", "aten::_foreach", "aten::addcdiv", "aten::addcmul", "aten::lerp", "aten::sqrt"),
    "softmax, norms, activations": ("softmax", "aten::pow", "aten::rsqrt", "aten::mean", "silu", "aten::mul"),
}
"""Name -> beginnings or parts of operator names; the first that fits counts, the rest is `other`."""
WARM_UP, PROFILED = 2, 2


def main() -> None:
    task = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    config = load(None, task["settings"])
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    deepspeed.init_distributed("gloo", verbose=False)
    model = base.load(config, resolve(config.base, config.models_cache))
    rows, tokens, answer = task["batch"]
    settings = {**ds_config(config), "train_micro_batch_size_per_gpu": rows, "train_batch_size": rows * world}
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=[p for p in model.parameters() if p.requires_grad], config=settings
    )
    words = model.get_input_embeddings().num_embeddings
    ids = torch.randint(words, (rows, tokens), generator=torch.Generator().manual_seed(rank))
    labels = ids.clone()
    labels[:, :-answer] = -100
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

    parts: dict[str, list[float]] = {"forward": [], "backward": [], "step": []}
    for turn in range(task["steps"] + WARM_UP):
        torch.distributed.barrier()
        for name, seconds in one_step(engine, inputs).items():
            if turn >= WARM_UP:
                parts[name].append(seconds)
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        for _ in range(PROFILED):
            one_step(engine, inputs)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    figures = {
        "seconds": {name: statistics.median(values) for name, values in parts.items()},
        "trained_parameters": trained,
        "all_reduce_alone_s": all_reduce(trained) if world > 1 else 0.0,
        "operators": by_group(recorded),
    }
    if rank == 0:
        Path(task["out"]).write_text(json.dumps(figures), encoding="utf-8")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def one_step(engine: Any, inputs: dict[str, Any]) -> dict[str, float]:
    """Seconds of each part."""
    began = time.perf_counter()
    nobody: Any = None  # the loss of a batch that is not accumulated asks nothing of its trainer
    loss = AnswerLossTrainer.compute_loss(nobody, engine, inputs)
    forward = time.perf_counter()
    engine.backward(loss)
    backward = time.perf_counter()
    engine.step()
    return {
        "forward": forward - began,
        "backward": backward - forward,
        "step": time.perf_counter() - backward,
    }


def all_reduce(elements: int, times: int = 5) -> float:
    """Median seconds to add up `elements` bf16 gradients over all ranks, nothing else running."""
    buffer = torch.ones(elements, dtype=torch.bfloat16)
    seconds = []
    for _ in range(times):
        torch.distributed.barrier()
        began = time.perf_counter()
        torch.distributed.all_reduce(buffer)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def by_group(recorded: Any) -> dict[str, float]:
    """Seconds a step inside the operators of each group, what they call not counted."""
    total = dict.fromkeys([*GROUPS, "other"], 0.0)
    for event in recorded.key_averages():
        group = next((name for name, keys in GROUPS.items() if any(key in event.key for key in keys)), "other")
        total[group] += event.self_cpu_time_total / 1e6 / PROFILED
    return {name: round(seconds, 4) for name, seconds in total.items()}


if __name__ == "__main__":
    main()
