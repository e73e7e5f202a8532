"""One training run on Ray Train: worker group, failure policy, checkpoints, and its events back to the caller."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, InvalidStateError
from typing import Any

from cluster.config import Config, to_json
from cluster.errors import MetierError, Unavailable
from cluster.storage import Storage
from training.memory import out_of_memory

Event = dict[str, Any]
POLL = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"}
"""Ray Train asks its workers for news every two seconds by default, and each checkpoint waits for that."""


def launch(
    config: Config,
    *,
    run: str,
    datasets: Mapping[str, str],
    on_event: Callable[[Event], None],
    outcome: Future[Any] | None = None,
) -> Any:
    """Run the workers until they are done; Ray must be connected.

    Args:
        run: name of the run; a second launch under this name goes on from its last checkpoint.
        datasets: paths of examples in storage, by what they are for: ``train``, ``validation``, ``general``.
        on_event: called in this process, in order, with what rank 0 logs.
        outcome: where the run's end is put; who holds it can end the run with an exception of their own.

    Returns:
        The final ``ray.train.Checkpoint``: a directory with the PEFT files, or with a whole model.

    Raises:
        MetierError: the workers failed; the first error a worker raised, unchanged if it was ours. What a worker knows
            to be final ends the run at once; anything else is tried again, ``training.max_failures`` times.
    """
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.util.queue import Queue
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from training.group import GroupConfig
    from training.sft import train_worker

    for name, value in POLL.items():
        os.environ.setdefault(name, value)
    training = config.training
    filesystem, path = Storage.of(config.storage).arrow("runs")
    here = NodeAffinitySchedulingStrategy(
        ray.get_runtime_context().get_node_id(), soft=False
    )  # not on a node that may go
    events = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"config": to_json(config), "run": run, "datasets": dict(datasets), "events": events},
        scaling_config=ScalingConfig(
            num_workers=(training.min_workers, training.workers) if training.min_workers else training.workers,
            use_gpu=training.on_gpu,
            resources_per_worker={
                "CPU": training.cpus_per_worker,
                **({"GPU": training.gpus_per_worker} if training.on_gpu else {}),
            },
        ),
        torch_config=GroupConfig(backend="nccl" if training.on_gpu else "gloo"),
        run_config=RunConfig(
            name=run,
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=training.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    )
    outcome = Future() if outcome is None else outcome
    with _Pump(events, on_event, outcome):
        result = _fit(trainer, outcome, config)
    if result.checkpoint is None:
        raise Unavailable(f"run {run} ended without a checkpoint; what it left is under {path}/{run}")
    return result.checkpoint


def _fit(trainer: Any, outcome: Future[Any], config: Config) -> Any:
    """``trainer.fit()`` in a thread: in the main one Ray Train takes SIGINT over and ends the process with code 0 or 1.

    Whatever reaches `outcome` first counts: the result, its failure, or an end that somebody else decided on. In that
    case the thread is left behind; closing the connection to Ray ends the workers, and with them `fit`.
    """

    def fit() -> None:
        try:
            result = trainer.fit()
        except BaseException as error:
            settle(outcome, _cause(error, config))
        else:
            settle(outcome, result)

    threading.Thread(target=fit, name="metier-train-fit", daemon=True).start()
    return outcome.result()


def settle(outcome: Future[Any], end: Any) -> None:
    """Put `end`, a result or an exception, into `outcome` unless something is there already."""
    with contextlib.suppress(InvalidStateError):
        if isinstance(end, BaseException):
            outcome.set_exception(end)
        else:
            outcome.set_result(end)


class _Pump:
    """Moves events from the workers' queue to a callback while a run lasts; an error that is final ends the run."""

    def __init__(self, queue: Any, on_event: Callable[[Event], None], outcome: Future[Any]) -> None:
        self.queue, self.on_event, self.outcome = queue, on_event, outcome
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
                event = self.queue.get(timeout=0.5)
                if "error" in event:
                    settle(self.outcome, event["error"])
                else:
                    self.on_event(event)
            except Empty:
                if ending:
                    return
            except RayError:  # Ray is going down; the run's own error says why
                return
            except Exception as error:  # the callback's: without anyone to tell it would be lost in this thread
                settle(self.outcome, error)


def _cause(error: BaseException, config: Config) -> MetierError:
    """The error of ours somewhere below a Ray Train failure, or the failure in a sentence."""
    from ray.exceptions import OutOfMemoryError

    failures = getattr(error, "worker_failures", None) or {}
    for failure in [*failures.values(), error]:
        seen: BaseException | None = failure
        while seen is not None:
            inner = getattr(seen, "cause", None)
            for candidate in (seen, inner):
                if isinstance(candidate, MetierError):
                    return candidate
                if isinstance(candidate, OutOfMemoryError):
                    return out_of_memory(config)
            seen = seen.__cause__
    last = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
    return Unavailable(f"training failed: {last}")
