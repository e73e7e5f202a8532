"""The Ray connection: the only ``ray.init`` of metier, and the capacity of what it connected to."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock

from cluster.config import Config
from cluster.errors import Unavailable
from cluster.resources import Amount

NAMESPACE = "metier"
LOCAL_STARTS = 2
"""Tries to start a local Ray: on a busy machine its daemons do not always find each other in the time Ray gives them."""


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
            _init(config, options, tries=LOCAL_STARTS if local else 1)
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


def _init(config: Config, options: dict[str, Any], tries: int) -> None:
    import ray
    from ray.exceptions import AuthenticationError

    for left in reversed(range(tries)):
        try:
            ray.init(
                address=config.ray.address,
                namespace=NAMESPACE,
                log_to_driver=config.logging.level == "debug",
                logging_level=logging.WARNING,
                **options,
            )
            return
        except AuthenticationError:
            raise
        except Exception:
            if not left:
                raise
            ray.shutdown()


def capacity() -> Amount:
    """CPUs, GPUs and memory of the connected cluster, free or not."""
    import ray

    resources = ray.cluster_resources()
    return Amount(resources.get("CPU", 0.0), resources.get("GPU", 0.0), int(resources.get("memory", 0)))


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
    if config.ray.address.startswith("http"):
        return Unavailable(
            f"ray.address '{config.ray.address}' is the address of a dashboard, which takes jobs: write `--on {config.ray.address}`",
            param="ray.address",
        )
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
