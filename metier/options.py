"""The options that verbs share, and what they lead to: a loaded configuration, a registry, a job on a cluster."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster import log
from cluster.config import Config, load
from cluster.errors import BadInput, Unavailable
from metier.console import print_json, say

if TYPE_CHECKING:
    from cluster.registry import Registry

ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", "-c", envvar="METIER_CONFIG", help="YAML configuration; defaults are used without one."),
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", "-s", metavar="KEY=VALUE", help="Override a setting; may be repeated.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
OnOption = Annotated[
    str | None,
    typer.Option(
        "--on", metavar="ADDRESS", help="Run it as a job on the Ray cluster with this dashboard, http://head:8265."
    ),
]
DetachOption = Annotated[bool, typer.Option("--detach", "-d", help="With --on: print the job's id and return at once.")]
AtOption = Annotated[
    str | None,
    typer.Option("--on", metavar="ADDRESS", help="Also ask the Ray cluster with this dashboard, http://head:8265."),
]


def open_config(file: Path | None, overrides: list[str] | None) -> Config:
    """The configuration of this call, with logging set up as it says."""
    config = load(file, overrides or ())
    log.setup(config.logging)
    return config


def open_registry(config: Config) -> Registry:
    """The registry that `config` names."""
    from cluster.registry import Registry
    from cluster.storage import Storage

    return Registry(Storage.of(config.storage))


def server_url(config: Config) -> str:
    """Where the server of `config` listens."""
    return f"http://{config.serving.host}:{config.serving.port}"


def run_on(config: Config, address: str | None, verb: Sequence[str], *, detach: bool, json: bool) -> bool:
    """Run `verb` as a job on the Ray cluster at `address` and show its log, if ``--on`` was given; else False.

    The log goes to stdout; with `json` to stderr, and stdout gets the job. Whatever ends this process (Ctrl-C, SIGTERM,
    a closed terminal) does not end the job, which is said.

    Raises:
        BadInput: ``--detach`` without ``--on``.
        Unavailable: the cluster does not answer, or the job did not succeed.
    """
    if address is None:
        if detach:
            raise BadInput("--detach needs --on, the address of a cluster that goes on without this terminal")
        return False
    from cluster import jobs

    job = jobs.submit(config, address, verb)
    if detach:
        if json:
            print_json({"job": job, "address": address})
        else:
            typer.echo(job)
        return True
    say(f"job {job} is submitted to {address}")
    status = follow_job(address, job, to_stderr=json)
    if status != "succeeded":
        raise Unavailable(f"job {job} ended as {status}; its log is above")
    if json:
        print_json({"job": job, "address": address, "status": status})
    return True


def follow_job(address: str, job: str, *, to_stderr: bool = False) -> str:
    """Show the log of `job` until it is over and return how it ended; say that it goes on if this process ends first."""
    from cluster import jobs

    hang_up = signal.signal(signal.SIGHUP, lambda *_: sys.exit(129))
    try:
        return jobs.follow(address, job, lambda text: typer.echo(text, nl=False, err=to_stderr))
    except (KeyboardInterrupt, SystemExit):
        with contextlib.suppress(OSError):  # the terminal may be gone
            say(
                f"job {job} goes on; `metier runs logs {job} --on {address} --follow` shows it, `metier runs cancel {job} --on {address}` ends it"
            )
        raise
    finally:
        signal.signal(signal.SIGHUP, hang_up)
