"""Verbs of metier as jobs of a Ray cluster: begin one, follow it, stop it, and list what there is.

An address here is that of the cluster's dashboard, ``http://head:8265``. Not covered: joining a cluster as a driver
(:mod:`cluster.runtime`), and runs, which know their job and outlive it (``training.runs``).
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import shlex
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from cluster.config import Config, public_dict
from cluster.errors import BadInput, NotFound, Unavailable

CONFIG_FILE = "metier.yaml"
ENVIRONMENT = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Where Ray tells a job's process its metadata."""
OVER = ("succeeded", "failed", "stopped")
LOUD = ("ray", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk")
"""Loggers that set a level of their own and tell of every package that is uploaded."""
CONNECT_S = 10.0
POLL_S = 1.0
PATIENCE_S = 15.0
"""A job server that is silent while a job is followed may be restarting; after so long it is given up."""
NO_AGENT = "No available agent"
"""How a job server says that it cannot take jobs yet."""


@dataclass(frozen=True)
class Job:
    """A verb of metier that runs, or ran, as a Ray job."""

    id: str
    verb: str
    adapter: str
    status: str
    """``pending``, ``running``, ``succeeded``, ``failed`` or ``stopped``."""
    started: float
    """Seconds since the epoch; 0 if it has not."""
    message: str
    """What Ray says about the status."""

    @property
    def is_over(self) -> bool:
        return self.status in OVER


def submit(config: Config, address: str, verb: Sequence[str]) -> str:
    """Begin ``metier VERB`` with this configuration as a job on the cluster at `address`, and return the job's id.

    The configuration travels with the job, without secrets: those, and the paths in it, are the cluster's. The job
    joins the cluster it runs on, where ``metier`` must be on the PATH.

    Raises:
        Unavailable: the address does not answer, or takes neither our token nor the job.
    """
    client = _connect(address)
    with tempfile.TemporaryDirectory(prefix="metier-job-") as directory:
        Path(directory, CONFIG_FILE).write_text(yaml.safe_dump(_for_cluster(config), allow_unicode=True))
        started, name = time.monotonic(), f"metier-{verb[0]}-{secrets.token_hex(4)}"
        while True:
            try:
                with _asking(address):
                    job = client.submit_job(
                        submission_id=name,
                        entrypoint=shlex.join(["metier", *verb, "--config", CONFIG_FILE, "--set", "ray.address=auto"]),
                        runtime_env={**config.ray.runtime_env, "working_dir": directory},
                        metadata={"metier": verb[0], "adapter": config.training.adapter, "address": address},
                    )
                return str(job)
            except Unavailable as error:  # a young or busy cluster: its dashboard is up before its agents are
                if NO_AGENT not in error.message or time.monotonic() - started > PATIENCE_S:
                    raise
            time.sleep(POLL_S)


def follow(address: str, job: str, on_log: Callable[[str], None]) -> str:
    """Hand what `job` prints to `on_log` until it is over; whatever ends this call does not end the job.

    Returns:
        ``succeeded``, ``failed`` or ``stopped``.

    Raises:
        NotFound: the cluster has no such job.
        Unavailable: the job server was silent for :data:`PATIENCE_S` seconds; the job may go on.
    """
    client = _connect(address)
    shown = 0
    heard = time.monotonic()
    while True:
        try:
            with _asking(address, job):
                status = client.get_job_status(job).value.lower()  # before the log, or its end could be missed
                text = client.get_job_logs(job)
        except Unavailable as error:
            if time.monotonic() - heard > PATIENCE_S:
                raise Unavailable(
                    f"the Ray job server at {address} stopped answering; job {job} may go on, and "
                    f"`metier runs logs {job} --on {address} --follow` shows it when the server is back",
                    param="--on",
                ) from error
        else:
            heard = time.monotonic()
            if len(text) > shown:
                on_log(text[shown:])
                shown = len(text)
            if status in OVER:
                return str(status)
        time.sleep(POLL_S)


def jobs(address: str) -> list[Job]:
    """The jobs of the cluster at `address` that metier submitted, oldest first.

    Raises:
        Unavailable: the address does not answer or does not take our token.
    """
    client = _connect(address)
    with _asking(address):
        found = client.list_jobs()
    ours = [details for details in found if details.submission_id and "metier" in (details.metadata or {})]
    return sorted(map(_job, ours), key=lambda job: job.started)


def log(address: str, job: str) -> str:
    """What `job` has printed so far.

    Raises:
        NotFound: the cluster has no such job.
        Unavailable: the address does not answer or does not take our token.
    """
    client = _connect(address)
    with _asking(address, job):
        return str(client.get_job_logs(job))


def stop(address: str, job: str) -> bool:
    """End `job`: SIGTERM, a few seconds later SIGKILL. Whether it was running.

    Raises:
        NotFound: the cluster has no such job.
        Unavailable: the address does not answer or does not take our token.
    """
    client = _connect(address)
    with _asking(address, job):
        return bool(client.stop_job(job))


def current() -> tuple[str | None, str | None]:
    """Id of the Ray job that this process is, and the address that took it; None where it is none or not known."""
    metadata = json.loads(os.environ.get(ENVIRONMENT, "{}")).get("metadata", {})
    return metadata.get("job_submission_id"), metadata.get("address")


def check_address(address: str) -> None:
    """Refuse what cannot be the address of a dashboard.

    Raises:
        BadInput: it is not an ``http://`` or ``https://`` URL with a host.
    """
    url = urlsplit(address)
    if url.scheme not in ("http", "https") or not url.hostname:
        raise BadInput(f"'{address}' is not the address of a Ray dashboard; write it as http://head:8265", param="--on")


def _job(details: Any) -> Job:
    return Job(
        id=details.submission_id,
        verb=details.metadata["metier"],
        adapter=details.metadata.get("adapter", ""),
        status=details.status.value.lower(),
        started=(details.start_time or 0) / 1000,
        message=details.message or "",
    )


def _for_cluster(config: Config) -> dict[str, Any]:
    data = public_dict(config)
    data["store"].pop("token")
    data["ray"].pop("runtime_env")  # it is the job's own; its variables may be secrets
    return data


def _connect(address: str) -> Any:
    """A client of the job server at `address`."""
    check_address(address)
    from ray.job_submission import JobSubmissionClient

    for chatty in LOUD:
        logging.getLogger(chatty).setLevel(logging.WARNING)
    url = urlsplit(address)
    with _asking(address):
        # Ray's client has no timeout: a host that swallows packets would hold it for minutes.
        port = url.port or {"http": 80, "https": 443}[url.scheme]
        socket.create_connection((url.hostname or "", port), timeout=CONNECT_S).close()
        return JobSubmissionClient(address)


@contextmanager
def _asking(address: str, job: str | None = None) -> Iterator[None]:
    """Errors of Ray's client as ours."""
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError as error:
        raise Unavailable(
            f"the Ray cluster at {address} refuses our token ({_first_line(error)}); "
            "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH) as on the cluster",
            param="--on",
        ) from error
    except (OSError, RuntimeError) as error:
        if job and "status code 404" in str(error):
            raise NotFound(
                f"the Ray cluster at {address} has no job '{job}'; `metier runs list --on {address}` shows what there is"
            ) from error
        raise Unavailable(
            f"no Ray job server answers at {address} ({_first_line(error)}); "
            "--on wants the address of the dashboard, for example http://127.0.0.1:8265",
            param="--on",
        ) from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
