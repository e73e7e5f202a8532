"""What happens around the steps of a run on its workers: events to the driver, checkpoints to Ray Train, the best kept."""

from __future__ import annotations

import os
import resource
import shutil
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from cluster.config import Config, EarlyStoppingConfig
from training.flops import model_flops_utilization

BEST = "best"
"""Directory, in a worker's scratch and in its checkpoints, of the weights with the lowest validation loss so far."""
VALIDATION = "eval_validation_loss"


class Report(TrainerCallback):
    """Logged metrics go to the driver's queue, saved checkpoints to Ray Train."""

    def __init__(self, events: Any, dataset_tokens: int, began: float, config: Config) -> None:
        """`dataset_tokens` of one epoch, without padding; `began` is when this worker started (``time.monotonic``)."""
        self.events, self.dataset_tokens, self.began, self.config = events, dataset_tokens, began, config
        self.started = self.step_started = 0.0
        self.first_epoch = 0.0
        self.first_step = 0
        self.in_steps = 0.0
        """Seconds spent in steps: not in evaluations or checkpoints."""
        self.parameters = (0, 0)
        """All, and those that are trained."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.started = time.monotonic()
        self.first_epoch = state.epoch or 0.0
        self.first_step = state.global_step
        counts = [(_size(parameter), parameter.requires_grad) for parameter in model.parameters()]
        self.parameters = sum(n for n, _ in counts), sum(n for n, trained in counts if trained)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.step_started = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.in_steps += time.monotonic() - self.step_started
        if state.global_step >= state.max_steps and args.eval_strategy != "no":
            control.should_evaluate = True  # what is published is measured, whatever the last step is

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if not state.is_world_process_zero or not logs or "loss" not in logs:
            return
        done = state.global_step - self.first_step
        tokens_per_s = (state.epoch - self.first_epoch) * self.dataset_tokens / self.in_steps if self.in_steps else 0.0
        event = {
            "step": state.global_step,
            "steps": state.max_steps,
            "loss": logs["loss"],
            "grad_norm": float(logs.get("grad_norm") or 0.0),
            "learning_rate": logs.get("learning_rate", 0.0),
            "seconds": round(time.monotonic() - self.started, 3),
            "tokens_per_s": round(tokens_per_s, 1),
            "eta_s": round((state.max_steps - state.global_step) * self.in_steps / done, 1) if done else 0.0,
            "memory_bytes": _peak_memory(self.config),
        }
        if self.config.training.on_gpu:
            event["mfu"] = model_flops_utilization(*self.parameters, tokens_per_s / args.world_size)
        if done == 1:
            event["setup_s"] = round(self.started - self.began, 3)
        self.events.put(event)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **_: Any) -> None:
        if state.is_world_process_zero:
            losses = {
                key.removeprefix("eval_"): round(value, 6) for key, value in metrics.items() if key.endswith("_loss")
            }
            seconds = round(time.monotonic() - self.started, 3)
            self.events.put({"step": state.global_step, "steps": state.max_steps, "seconds": seconds, **losses})

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        import ray.train
        from ray.train import Checkpoint

        path = get_last_checkpoint(args.output_dir)
        if path and (best := Path(args.output_dir, BEST)).is_dir():
            shutil.copytree(best, Path(path, BEST), copy_function=os.link, dirs_exist_ok=True)
        ray.train.report({"step": state.global_step}, checkpoint=Checkpoint.from_directory(path) if path else None)


class KeepBest(TrainerCallback):
    """Keeps the weights of the lowest validation loss, and stops when it has not fallen for some validations.

    What was seen is read from the trainer's own log, which its checkpoints hold: a run that goes on after a failure
    knows what it knew. The untrained model is no candidate.
    """

    def __init__(self, config: EarlyStoppingConfig, scratch: str) -> None:
        self.config, self.directory = config, Path(scratch, BEST)
        self.trainer: Any = None

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **_: Any) -> None:
        if VALIDATION not in metrics or state.global_step == 0:
            return
        seen = validations(state.log_history)
        if best_step(seen) == state.global_step:
            shutil.rmtree(self.directory, ignore_errors=True)
            self.trainer.save_model(str(self.directory))
        if (
            self.config.patience
            and rounds_without_improvement(seen, self.config.min_improvement) >= self.config.patience
        ):
            control.should_training_stop = True

    def is_behind(self, state: Any) -> bool:
        """Whether the last weights are worse than the ones that were kept."""
        seen = validations(state.log_history)
        return bool(seen) and best_step(seen) != state.global_step


def validations(log: list[dict[str, Any]]) -> list[tuple[int, float]]:
    """(step, loss) of every validation in a trainer's log, in order, the one before the first step aside."""
    return [(entry["step"], entry[VALIDATION]) for entry in log if VALIDATION in entry and entry["step"] > 0]


def best_step(seen: list[tuple[int, float]]) -> int:
    """The step with the lowest loss, the earliest of several; 0 if there was no validation."""
    return min(seen, key=lambda item: item[1], default=(0, 0.0))[0]


def rounds_without_improvement(seen: list[tuple[int, float]], least: float) -> int:
    """Validations since one was better than all before it by more than `least`."""
    rounds, best = 0, float("inf")
    for _, loss in seen:
        rounds = 0 if loss < best - least else rounds + 1
        best = min(best, loss)
    return rounds


def _size(parameter: Any) -> int:
    """Elements of a parameter, also where ZeRO-3 holds it elsewhere."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _peak_memory(config: Config) -> int:
    """Bytes this worker has held at most: on the GPU, or of its process."""
    if config.training.on_gpu:
        import torch

        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
