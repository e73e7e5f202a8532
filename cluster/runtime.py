"""The Ray connection: the only ``ray.init`` of metier, the capacity of what it connected to, and job submission."""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock

from cluster.config import Config, public_dict
from cluster.errors import Unavailable
from cluster.resources import Amount

NAMESPACE = "metier"
CONFIG_FILE = "metier.yaml"


@contextlib.contextmanager
def connect(config: Config) -> Iterator[None]:
    """Connect to Ray for the length of a ``with``; a local Ray is started here and stopped at its end.

    A local Ray dies with this process, whatever ends it. Nothing is reported to Ray's makers, and its dashboard is
    not started.

    Raises:
        Unavailable: ``ray.address`` names a cluster that does not answer or does not take our token.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray warns that its token authentication is on, which is what we want.
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    import ray
    from ray.exceptions import AuthenticationError

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    _reach(config)
    local = config.ray.address == "local"
    options = {"num_cpus": config.ray.num_cpus, "include_dashboard": False} if local else {}
    try:
        with _one_start_at_a_time() if local else contextlib.nullcontext():
            ray.init(
                address=config.ray.address,
                namespace=NAMESPACE,
                log_to_driver=config.logging.level == "debug",
                logging_level=logging.WARNING,
                **options,
            )
    except AuthenticationError as error:
        raise _unauthorized(config, error) from error
    except Exception as error:  # Ray raises a bare Exception when its daemons do not come up
        raise _unanswered(config, error) from error
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():
            signal.signal(number, handler)  # Ray's own prints C++ frames and dies without cleaning up
    with contextlib.redirect_stdout(sys.stderr):  # Ray prints what it notices there, and stdout is for results
        try:
            yield
        finally:
            ray.shutdown()


def capacity() -> Amount:
    """CPUs, GPUs and memory of the connected cluster, free or not."""
    import ray

    resources = ray.cluster_resources()
    return Amount(resources.get("CPU", 0.0), resources.get("GPU", 0.0), int(resources.get("memory", 0)))


def submit(config: Config, verb: Sequence[str], on_log: Callable[[str], None]) -> str:
    """Run ``metier VERB`` with this configuration as a Ray job on ``ray.address`` (``http://head:8265``).

    Follows the job's log to its end. The configuration travels with the job, without secrets: those, and the paths
    in it, are the cluster's. The job joins the cluster it runs on.

    Returns:
        The job's id.

    Raises:
        Unavailable: the address does not answer or does not take our token, or the job did not succeed.
    """
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobStatus, JobSubmissionClient

    with tempfile.TemporaryDirectory(prefix="metier-job-") as directory:
        Path(directory, CONFIG_FILE).write_text(yaml.safe_dump(_for_cluster(config), allow_unicode=True))
        try:
            client = JobSubmissionClient(config.ray.address)
            job = client.submit_job(
                entrypoint=shlex.join(["metier", *verb, "--config", CONFIG_FILE, "--set", "ray.address=auto"]),
                runtime_env={**config.ray.runtime_env, "working_dir": directory},
            )
        except AuthenticationError as error:
            raise _unauthorized(config, error) from error
        except (ConnectionError, RuntimeError) as error:
            raise Unavailable(
                f"no Ray job server answers at ray.address '{config.ray.address}' ({_first_line(error)}); "
                "--submit wants the address of the dashboard, for example http://127.0.0.1:8265",
                param="ray.address",
            ) from error
    shown = 0
    while True:
        status = client.get_job_status(job)
        text = client.get_job_logs(job)
        if len(text) > shown:
            on_log(text[shown:])
            shown = len(text)
        if status.is_terminal():
            break
        time.sleep(1.0)
    if status != JobStatus.SUCCEEDED:
        raise Unavailable(f"job {job} ended as {status}; its log is above")
    return str(job)


def _for_cluster(config: Config) -> dict[str, Any]:
    data = public_dict(config)
    data["store"].pop("token")
    return data


def _one_start_at_a_time() -> FileLock:
    """Two local Rays that start within the same second take each other's session files, and one of them fails."""
    return FileLock(Path(tempfile.gettempdir(), f"metier-ray-start-{os.getuid()}.lock"))


def _reach(config: Config) -> None:
    """Raise if nothing listens at a ``host:port``: Ray itself would try for minutes, in silence."""
    host, _, port = config.ray.address.removeprefix("ray://").rpartition(":")
    if port.isdigit():
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        except OSError as error:
            raise _unanswered(config, error) from error


def _unanswered(config: Config, error: Exception) -> Unavailable:
    if config.ray.address == "local":
        return Unavailable(f"Ray did not start on this machine: {_first_line(error)}; try again", param="ray.address")
    return Unavailable(
        f"no Ray cluster answers at ray.address '{config.ray.address}' ({_first_line(error)}); "
        "start one with `ray start --head`, or set ray.address=local",
        param="ray.address",
    )


def _unauthorized(config: Config, error: Exception) -> Unavailable:
    return Unavailable(
        f"the Ray cluster at ray.address '{config.ray.address}' refuses our token ({_first_line(error)}); "
        "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH) as on the cluster",
        param="ray.address",
    )


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
