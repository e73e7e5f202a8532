"""``metier runs``: training runs, wherever they were started: list, show, follow, cancel and compare them.

A name may be cut short, and the id of a Ray job stands for its run. Jobs that have no run yet are known only to their
cluster: ``--on``, or ``ray.address`` where that is a dashboard.
"""

from __future__ import annotations

import json as jsonlib
import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.config import Config, load, public_dict
from cluster.errors import BadInput, MetierError, NotFound, Unavailable
from metier.console import curve, print_json, say, table
from metier.options import AtOption, ConfigOption, JsonOption, SetOption, follow_job, open_config

if TYPE_CHECKING:
    from cluster.jobs import Job
    from cluster.storage import Storage
    from training.runs import RunInfo

app = typer.Typer(help="Training runs.", no_args_is_help=True)

NameArgument = Annotated[str, typer.Argument(help="Name of a run or the beginning of it, or the id of a Ray job.")]
POLL_S = 1.0
GRACE_S = 20.0
"""A driver that was asked to stop and has not after so long is ended by a signal."""
WAIT_S = 90.0
"""Longer than that and the minute after which a driver on another host counts as lost."""
FACTS = (
    "adapter",
    "method",
    "objective",
    "base",
    "workers",
    "zero",
    "dataset",
    "recipe",
    "metier",
    "host",
    "pid",
    "job",
)
FIELDS = (
    "name", "state", "attempt", "step", "steps", "loss", "tokens_per_s", "adapter", "published", "error", "job",
    "started", "heartbeat", "ended",
)  # fmt: skip
"""Of a run as JSON; of a job without a run most are null."""
RESULTS = {
    "loss_first": "first loss",
    "loss_last": "final loss",
    "loss_best": "best loss",
    "validation_last": "final validation loss",
    "validation_best": "best validation loss",
    "general_first": "general loss before",
    "general_last": "general loss after",
    "tokens_per_s": "tokens/s",
    "steps": "steps",
    "seconds": "seconds",
}
"""Key of :func:`training.history.summary` -> what it is called in a table."""


@app.command("list")
def list_(config: ConfigOption = None, set_: SetOption = None, on: AtOption = None, json: JsonOption = False) -> None:
    """All runs, oldest first; with --on also training jobs of that cluster that are not runs yet."""
    settings = open_config(config, set_)
    from training.runs import list_runs

    found = list_runs(_storage(settings))
    waiting = _jobs_without_run(settings, on, {job for run in found for job in run.jobs})
    if json:
        print_json([_plain(run) for run in found] + [_plain_job(job) for job in waiting])
        return
    now = time.time()
    rows: list[tuple[object, ...]] = [
        (
            run.name,
            run.state,
            f"{run.step}/{run.steps}" if run.step is not None else "-",
            f"{run.loss:.3f}" if run.loss is not None else "-",
            f"{run.tokens_per_s:.0f}" if run.tokens_per_s is not None else "-",
            run.adapter or run.facts.get("adapter", "-"),
            _utc(run.started),
            _span(now - run.started),
        )
        for run in found
    ]
    rows += [
        (job.id, job.status, "-", "-", "-", job.adapter, _utc(job.started), _span(now - job.started)) for job in waiting
    ]
    table(("run", "state", "step", "loss", "tokens/s", "adapter", "started (UTC)", "age"), rows)


@app.command()
def show(name: NameArgument, config: ConfigOption = None, set_: SetOption = None, json: JsonOption = False) -> None:
    """One run: its facts, the settings that are not defaults, its losses and what it published."""
    settings = open_config(config, set_)
    from training.history import History, summary
    from training.runs import differences, find

    storage = _storage(settings)
    run = find(storage, name)
    events = History(storage, run.name).events
    changed = differences(public_dict(load(environ={})), run.facts.get("config", {}))
    results = summary(events)
    if json:
        print_json({**_plain(run), "facts": run.facts, "changed": changed, "results": results, "events": events})
        return
    facts: list[tuple[object, ...]] = [("state", run.state), ("attempt", run.attempt), ("started", _utc(run.started))]
    facts += [("error", run.error)] if run.error else []
    facts += [("step", f"{run.step}/{run.steps}")] if run.step is not None else []
    facts += [("published", run.adapter)] if run.adapter else []
    facts += [(key, _shown(run.facts[key])) for key in FACTS if run.facts.get(key) is not None]
    table(("fact", run.name), facts)
    table(
        ("setting", "value", "default"),
        [(path, _shown(own), _shown(default)) for path, (default, own) in changed.items()],
    )
    if losses := [event["loss"] for event in events if "loss" in event]:
        say(f"loss {curve(losses)} {results['loss_first']:.4f} -> {results['loss_last']:.4f}")
    for kind in ("validation", "general"):
        measured = [(event["step"], event[f"{kind}_loss"]) for event in events if f"{kind}_loss" in event]
        if measured:
            say(f"{kind} loss " + ", ".join(f"{value:.4f} at {step}" for step, value in measured))


@app.command()
def logs(
    name: NameArgument,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run is over.")] = False,
    config: ConfigOption = None,
    set_: SetOption = None,
    on: AtOption = None,
    json: JsonOption = False,
) -> None:
    """What a run said: the log of its Ray job where there is one that can be reached, else what the driver kept."""
    if follow and json:
        raise BadInput("--follow prints lines as they come; leave --json out, or --follow")
    settings = open_config(config, set_)
    storage = _storage(settings)
    run, job = _find(storage, settings, on, name)
    address = _address(settings, on, run)
    if job and address:
        from cluster import jobs

        try:
            if follow:
                follow_job(address, job)
                return
            text = jobs.log(address, job)
        except (Unavailable, NotFound) as error:
            if run is None or on:
                raise
            say(f"{error.message}; what the driver kept follows")
        else:
            _print_log(text.splitlines(), json, job=job)
            return
    assert run is not None  # a job without a run was found at an address
    if follow:
        _follow_file(storage, run.name)
        return
    from training.runs import read_log

    dropped, lines = read_log(storage, run.name)
    if dropped:
        say(f"{dropped} older lines are not kept")
    _print_log(lines, json, run=run.name)


@app.command()
def cancel(
    name: NameArgument,
    wait: Annotated[float, typer.Option(min=0, help="Seconds until it is given up to wait for the end.")] = WAIT_S,
    config: ConfigOption = None,
    set_: SetOption = None,
    on: AtOption = None,
    json: JsonOption = False,
) -> None:
    """Stop a run, wherever it runs; the same `metier train` goes on from its last checkpoint."""
    settings = open_config(config, set_)
    storage = _storage(settings)
    run, job = _find(storage, settings, on, name)
    address = _address(settings, on, run)
    if run is None:
        assert job and address
        state, said = _cancel_job(address, job, wait)
    elif run.is_over:
        state, said = run.state, f"run {run.name} is over already: {run.state}"
    else:
        state = _cancel_run(storage, run, address, wait)
        said = f"run {run.name} is over: {state}"
    if json:
        print_json({"name": run.name if run else job, "state": state})
        return
    say(said)


@app.command()
def compare(
    names: Annotated[list[str], typer.Argument(help="Two or more runs.")],
    plot: Annotated[Path | None, typer.Option("--plot", help="Write the loss curves to this PNG file.")] = None,
    config: ConfigOption = None,
    set_: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Runs side by side: the settings in which they differ, and what came out."""
    if len(names) < 2:
        raise BadInput("one run cannot be compared; name two or more, `metier runs list` shows what there is")
    settings = open_config(config, set_)
    from training.history import History, summary
    from training.runs import differences, find

    storage = _storage(settings)
    found = [find(storage, name) for name in names]
    events = {run.name: History(storage, run.name).events for run in found}
    compared = [{key: run.facts.get(key) for key in ("base", "dataset", "config")} for run in found]
    paths = [path for other in compared[1:] for path in differences(compared[0], other)]
    changed = {path: [_at(facts, path) for facts in compared] for path in dict.fromkeys(paths)}
    results = [summary(events[run.name]) for run in found]
    if plot:
        from training.plot import compare_plot

        compare_plot(events, plot)
        say(f"the loss curves are in {plot}")
    if json:
        print_json(
            {
                "runs": [run.name for run in found],
                "states": [run.state for run in found],
                "changed": {path.removeprefix("config."): values for path, values in changed.items()},
                "results": results,
            }
        )
        return
    columns = [run.name for run in found]
    table(
        ("setting", *columns),
        [(path.removeprefix("config."), *map(_shown, values)) for path, values in changed.items()],
    )
    rows = [("state", *(run.state for run in found))]
    rows += [
        (word, *(_number(result.get(key)) for result in results))
        for key, word in RESULTS.items()
        if any(key in result for result in results)
    ]
    table(("result", *columns), rows)


# -- which run, which job ----------------------------------------------------------------------------------------


def _find(storage: Storage, config: Config, on: str | None, name: str) -> tuple[RunInfo | None, str | None]:
    """The run that `name` means and its newest job, or a job that has no run."""
    from training.runs import find

    try:
        run = find(storage, name)
    except NotFound:
        fitting = [job.id for job in _jobs_without_run(config, on, set()) if job.id.startswith(name)]
        if len(fitting) != 1:
            raise
        return None, fitting[0]
    return run, run.facts.get("job")


def _address(config: Config, on: str | None, run: RunInfo | None) -> str | None:
    """The dashboard to ask: as said now, or where the run's job was submitted."""
    return on or _dashboard(config) or (run.facts.get("address") if run else None)


def _dashboard(config: Config) -> str | None:
    return config.ray.address if config.ray.address.startswith("http") else None


def _jobs_without_run(config: Config, on: str | None, known: set[str]) -> list[Job]:
    """Training jobs of the cluster that no run knows: they have not begun one yet, or failed before they could."""
    address = on or _dashboard(config)
    if address is None:
        return []
    from cluster import jobs

    try:
        found = jobs.jobs(address)
    except Unavailable as error:
        if on:
            raise
        say(f"{error.message}; jobs of that cluster are not shown")
        return []
    return [job for job in found if job.verb == "train" and job.id not in known and job.status != "succeeded"]


# -- following and ending ----------------------------------------------------------------------------------------


def _follow_file(storage: Storage, name: str) -> None:
    from training.runs import read, read_log

    shown = 0
    while True:
        over = read(storage, name).is_over
        dropped, lines = read_log(storage, name)
        for line in lines[max(0, shown - dropped) :]:
            typer.echo(line)
        shown = dropped + len(lines)
        if over:
            return
        time.sleep(POLL_S)


def _print_log(lines: list[str], json: bool, **source: str) -> None:
    if json:
        print_json({**source, "lines": lines})
        return
    for line in lines:
        typer.echo(line)


def _cancel_job(address: str, job: str, wait: float) -> tuple[str, str]:
    """Stop a job that has no run; its status, and what to say."""
    from cluster import jobs

    if not jobs.stop(address, job):
        status = _job_status(address, job)
        return status, f"job {job} is over already: {status}"
    deadline = time.monotonic() + wait
    while (status := _job_status(address, job)) not in jobs.OVER:
        if time.monotonic() > deadline:
            raise Unavailable(
                f"job {job} was told to stop and has not in {wait:g} s; `metier runs list` shows when it has"
            )
        time.sleep(POLL_S)
    return status, f"job {job} is over: {status}"


def _job_status(address: str, job: str) -> str:
    from cluster import jobs

    return next(known.status for known in jobs.jobs(address) if known.id == job)


def _cancel_run(storage: Storage, run: RunInfo, address: str | None, wait: float) -> str:
    """Ask the driver, then tell its process or its Ray job; the state in which the run ended.

    Raises:
        Unavailable: it has not ended in `wait` seconds; it stays asked.
    """
    from training.runs import read, request_cancel

    request_cancel(storage, run)
    begun = time.monotonic()
    told = ""
    while True:
        now = read(storage, run.name)
        if now.attempt != run.attempt:
            return "cancelled"  # and somebody has begun it again
        if now.is_over:
            return now.state
        waited = time.monotonic() - begun
        if waited > wait:
            raise Unavailable(
                f"run {run.name} has not stopped in {wait:g} s{told}; it stays asked to, and `metier runs list` shows when it has"
            )
        if not told and waited > min(GRACE_S, wait / 2):
            told = _tell(now, address)
        time.sleep(POLL_S)


def _tell(run: RunInfo, address: str | None) -> str:
    """End the driver from outside, and say how it was tried."""
    from cluster import jobs
    from training.runs import is_here

    job = run.facts.get("job")
    if job and address:
        try:
            jobs.stop(address, job)
        except MetierError as error:
            return f" and its job could not be stopped ({error.message})"
        return f" although job {job} was stopped"
    if is_here(run):
        try:
            os.kill(run.facts["pid"], signal.SIGTERM)
        except PermissionError:
            return f" and process {run.facts['pid']} belongs to somebody else"
        return f" although process {run.facts['pid']} was sent SIGTERM"
    return f" and its process is on {run.facts['host']}"


# -- shown -------------------------------------------------------------------------------------------------------


def _storage(config: Config) -> Storage:
    from cluster.storage import Storage

    return Storage.of(config.storage)


def _plain(run: RunInfo) -> dict[str, Any]:
    known = {key: getattr(run, key, None) for key in FIELDS}
    return known | {"adapter": run.facts.get("adapter"), "job": run.facts.get("job"), "published": run.adapter}


def _plain_job(job: Job) -> dict[str, Any]:
    known = {"name": job.id, "state": job.status, "adapter": job.adapter, "job": job.id, "started": job.started}
    return dict.fromkeys(FIELDS) | known


def _at(facts: dict[str, Any], path: str) -> Any:
    value: Any = facts
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else jsonlib.dumps(value, ensure_ascii=False)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _utc(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.gmtime(seconds)) if seconds else "-"


def _span(seconds: float) -> str:
    """A length of time in one unit."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"
