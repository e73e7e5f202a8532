"""One training run on Ray Train: worker group, failure policy, checkpoints, and its events back to the caller."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from cluster.config import Config, to_json
from cluster.errors import MetierError, Unavailable
from cluster.storage import Storage

Event = dict[str, Any]
POLL = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"}
"""Ray Train asks its workers for news every two seconds by default, and each checkpoint waits for that."""


def launch(config: Config, *, run: str, dataset: str, on_event: Callable[[Event], None]) -> Any:
    """Run the workers until they are done; Ray must be connected.

    Args:
        run: name of the run; a second launch under this name goes on from its last checkpoint.
        dataset: path of the grounded rows in storage.
        on_event: called in this process, in order, with what rank 0 logs.

    Returns:
        The final ``ray.train.Checkpoint``: a directory with the PEFT files.

    Raises:
        MetierError: the workers failed; the first error a worker raised, unchanged if it was ours.
    """
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.util.queue import Queue

    from training.sft import train_worker

    for name, value in POLL.items():
        os.environ.setdefault(name, value)
    training = config.training
    on_gpu = training.gpus_per_worker > 0
    filesystem, path = Storage.of(config.storage).arrow("runs")
    events = Queue(actor_options={"num_cpus": 0})
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"config": to_json(config), "run": run, "dataset": dataset, "events": events},
        scaling_config=ScalingConfig(
            num_workers=training.workers,
            use_gpu=on_gpu,
            resources_per_worker={
                "CPU": training.cpus_per_worker,
                **({"GPU": training.gpus_per_worker} if on_gpu else {}),
            },
        ),
        torch_config=TorchConfig(backend="nccl" if on_gpu else "gloo"),
        run_config=RunConfig(
            name=run,
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=training.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    )
    with _Pump(events, on_event):
        try:
            result = _fit(trainer)
        except Exception as error:
            raise _cause(error) from error
    if result.checkpoint is None:
        raise Unavailable(f"run {run} ended without a checkpoint; what it left is under {path}/{run}")
    return result.checkpoint


def _fit(trainer: Any) -> Any:
    """``trainer.fit()`` in a thread: in the main one Ray Train takes SIGINT over and ends the process with code 0 or 1."""
    outcome: Future[Any] = Future()

    def fit() -> None:
        try:
            outcome.set_result(trainer.fit())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=fit, name="metier-train-fit", daemon=True).start()
    return outcome.result()


class _Pump:
    """Moves events from the workers' queue to a callback while a run lasts."""

    def __init__(self, queue: Any, on_event: Callable[[Event], None]) -> None:
        self.queue, self.on_event = queue, on_event
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._run, name="metier-train-events", daemon=True)

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join(timeout=10)
        self.queue.shutdown(force=True)

    def _run(self) -> None:
        from ray.exceptions import RayError
        from ray.util.queue import Empty

        while True:
            ending = self.done.is_set()
            try:
                self.on_event(self.queue.get(timeout=0.5))
            except Empty:
                if ending:
                    return
            except RayError:  # Ray is going down; the run's own error says why
                return


def _cause(error: Exception) -> MetierError:
    """The error of ours somewhere below a Ray Train failure, or the failure in a sentence."""
    failures = getattr(error, "worker_failures", None) or {}
    for failure in [*failures.values(), error]:
        seen: BaseException | None = failure
        while seen is not None:
            inner = getattr(seen, "cause", None)
            for candidate in (seen, inner):
                if isinstance(candidate, MetierError):
                    return candidate
            seen = seen.__cause__
    last = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
    return Unavailable(f"training failed: {last}")
