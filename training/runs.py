"""Training runs as objects in storage: who trains what, how far it is, and how to make it stop.

Under ``runs/<name>/``, beside the checkpoints of Ray Train and ``metrics.jsonl`` (:mod:`training.history`):

- ``attempts/``: a :class:`cluster.registry.Log`. Each driver that takes the run over appends who it is and what it
  trains. Entry n is created exclusively, so of two drivers that start at once one has the run.
- ``state.json``: how far the newest attempt is, written whole by its driver every few seconds, which is its heartbeat.
- ``log.txt``: what that driver said, its newest part.
- ``cancel``: which attempt is asked to stop. A later attempt is not meant by it.

A driver is alive if its process is there (same host) or its last heartbeat is young (other hosts, whose clocks may
differ by much less than :data:`LOST_S`). Not covered: removing runs, and Ray jobs that have no run yet
(:mod:`cluster.jobs`).
"""

from __future__ import annotations

import difflib
import json
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Literal

from cluster import jobs, processes
from cluster.claim import LOST_S, is_same_host, lives, me
from cluster.config import Config, public_dict
from cluster.errors import BadInput, MetierError, Mismatch, NotFound
from cluster.registry import Entry, Log
from cluster.release import BaseRef
from cluster.storage import Storage

TICK_S = 1.0
"""Between writes of what changed; the other intervals are multiples of it."""
POLL_S = 2.0
"""Between looks at whether the run was cancelled or taken over."""
BEAT_S = 5.0
"""Between heartbeats of a driver that has nothing new to say."""
LOG_LINES = 2000
"""Kept of what a driver said."""

Phase = Literal["preparing", "training", "publishing"]
PROGRESS = ("step", "steps", "loss", "tokens_per_s")
ENDED = ("succeeded", "failed", "cancelled", "lost")
"""States in which nobody works on a run any more."""
SECRET = re.compile(r"key|secret|token|password|credential", re.IGNORECASE)
LOGIN = re.compile(r"://[^/@\s]+@")
MASK = "**********"


class Cancelled(MetierError):
    """The run was stopped by ``metier runs cancel``; for who started it, that is as good as SIGTERM."""

    exit_code = 143
    http_status = 409
    code = "cancelled"


@dataclass(frozen=True)
class RunInfo:
    """What is known of one run now."""

    name: str
    attempt: int
    state: str
    """``preparing``, ``training``, ``publishing``, ``succeeded``, ``failed``, ``cancelled``, or ``lost``: its driver died."""
    facts: dict[str, Any]
    """What the driver of the newest attempt wrote of itself and its task; see :func:`claim`."""
    started: float
    """When the newest attempt began, seconds since the epoch; likewise the other times."""
    heartbeat: float
    ended: float | None = None
    step: int | None = None
    steps: int | None = None
    loss: float | None = None
    tokens_per_s: float | None = None
    adapter: str | None = None
    """What it published, ``name@version``."""
    error: str | None = None
    """Why it failed, in a sentence."""
    jobs: tuple[str, ...] = ()
    """Ids of the Ray jobs that its attempts were, oldest first."""

    @property
    def is_over(self) -> bool:
        return self.state in ENDED


class Run:
    """A run that this process has claimed: says how far it is, and learns that it was cancelled.

    Storage is touched by one thread of its own and at changes of state; :meth:`progress` and :meth:`log` only note.
    """

    def __init__(self, storage: Storage, name: str, attempt: int) -> None:
        self.storage, self.name, self.attempt = storage, name, attempt
        self.cancelled = threading.Event()
        """Set when the run must stop: cancelled, or taken over by another driver."""
        self.on_cancel: Callable[[], None] | None = None
        """Called once, from another thread, when :attr:`cancelled` is set; interrupts what the main thread waits for."""
        self.taken_over = False
        self._state: dict[str, Any] = {"state": "preparing", "attempt": attempt, "started": time.time()}
        self._lines: list[str] = []
        self._dropped = 0
        self._changed = True
        self._said = False
        self._noting = threading.Lock()
        self._writing = threading.Lock()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="metier-run", daemon=True)

    def state(self, phase: Phase) -> None:
        """The run is `phase` from now on."""
        self._note(state=phase)
        self._write()

    def progress(self, event: Mapping[str, Any]) -> None:
        """Take what is of interest in a logged event; cheap, and written at most once a second."""
        self._note(**{key: event[key] for key in PROGRESS if key in event})

    def published(self, ref: str) -> None:
        """The run made the adapter (or model) `ref`."""
        self._note(adapter=ref)

    def log(self, line: str) -> None:
        """Add one line to the run's log; no prompts, no secrets."""
        with self._noting:
            self._lines.append(f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {line}")
            self._dropped += max(0, len(self._lines) - LOG_LINES)
            self._lines = self._lines[-LOG_LINES:]
            self._said = True

    def check_cancelled(self) -> None:
        """Raise if the run must stop.

        Raises:
            Cancelled: somebody cancelled it.
            Mismatch: this driver was silent for so long that another one took the run over.
        """
        if self.cancelled.is_set():
            raise self.end()

    def end(self) -> MetierError:
        """The error that a run ends with once :attr:`cancelled` is set."""
        if self.taken_over:
            return Mismatch(
                f"run {self.name} was taken over by another driver, because this one gave no sign of life for {LOST_S:g} s; "
                f"follow it with `metier runs logs {self.name} --follow`"
            )
        return Cancelled(f"run {self.name} was cancelled; the same command goes on from its last checkpoint")

    def _note(self, **facts: Any) -> None:
        with self._noting:
            self._state |= facts
            self._changed = True

    def _open(self) -> None:
        with suppress(NotFound):
            text = self.storage.read(f"runs/{self.name}/log.txt").decode()
            self._dropped, self._lines = _split_log(text)
        self._write()
        self._thread.start()

    def _close(self, **facts: Any) -> None:
        self._done.set()
        self._thread.join(timeout=10)
        if not self.taken_over:
            self._note(ended=time.time(), **facts)
            self._write_log()
            self._write()

    def _write(self) -> None:
        with self._writing:
            with self._noting:
                state = self._state | {"heartbeat": time.time()}
                self._changed = False
            if not self.taken_over:
                self.storage.write(f"runs/{self.name}/state.json", json.dumps(state).encode())

    def _write_log(self) -> None:
        with self._writing:
            with self._noting:
                lines, dropped, said = list(self._lines), self._dropped, self._said
                self._said = False
            if said and not self.taken_over:
                self.storage.write(f"runs/{self.name}/log.txt", _join_log(dropped, lines).encode())

    def _beat(self) -> None:
        written = polled = time.monotonic()
        while not self._done.wait(TICK_S):
            now = time.monotonic()
            try:
                if now - polled >= POLL_S:
                    polled = now
                    self._poll()
                    self._write_log()
                if self._changed or now - written >= BEAT_S:
                    written = now
                    self._write()
            except MetierError:
                # A store that does not answer for a moment is no reason to stop training; the next beat tries again.
                self._changed = self._said = True

    def _poll(self) -> None:
        if self.cancelled.is_set():
            return
        self.taken_over = _attempts(self.storage, self.name).head() > self.attempt
        if self.taken_over or _cancelled_attempt(self.storage, self.name) == self.attempt:
            self.cancelled.set()
            if self.on_cancel is not None:
                self.on_cancel()


@contextmanager
def claim(storage: Storage, name: str, facts: Mapping[str, Any]) -> Iterator[Run]:
    """Own the run `name` for the length of a ``with``, whose end is recorded as the end of the run.

    If the run was cancelled meanwhile, whatever error ends the body comes out as :class:`Cancelled`.

    Args:
        facts: what is trained, from :func:`facts_of`; host, process, version and Ray job are added here.

    Raises:
        Mismatch: a living driver has the run, or earlier attempts followed another recipe.
        Cancelled: somebody cancelled the run.
    """
    run = Run(storage, name, _take(storage, name, dict(facts)))
    run._open()
    try:
        yield run
    except BaseException as error:
        stopped = run.cancelled.is_set()
        reason = run.end() if stopped else error
        ours = stopped or isinstance(error, (KeyboardInterrupt, SystemExit))
        with suppress(MetierError):  # the body's own error is the one to hear about
            run._close(state="cancelled" if ours else "failed", error=_sentence(reason))
        if stopped and reason is not error:
            raise reason from error
        raise
    run._close(state="succeeded")


def facts_of(config: Config, *, recipe: str, base: BaseRef, dataset: str) -> dict[str, Any]:
    """What a driver writes of its task: the settings, secrets masked, and what decides the weights.

    Args:
        recipe: digest of everything that decides the weights.
        dataset: digest of the rows.
    """
    training = config.training
    settings = public_dict(config)
    settings["storage"]["options"] = _masked(settings["storage"]["options"])
    settings["ray"]["runtime_env"] = _masked(settings["ray"]["runtime_env"])
    settings = _without_logins(settings)
    return {
        "adapter": training.adapter,
        "recipe": recipe,
        "base": base.source + (f"@{base.revision}" if base.revision else ""),
        "dataset": dataset,
        "method": training.method,
        "objective": training.objective,
        "workers": training.workers,
        "zero": training.deepspeed.zero_stage,
        "config": settings,
    }


# -- looking on -------------------------------------------------------------------------------------------------


def find(storage: Storage, name: str) -> RunInfo:
    """The run called `name`; a beginning that fits only one, or the id of its Ray job, will do.

    Raises:
        NotFound: there is none; near names are in the sentence.
        BadInput: several runs begin so.
    """
    if name in (names := _names(storage)):
        return read(storage, name)
    fitting = [known for known in names if known.startswith(name)]
    if len(fitting) > 1:
        raise BadInput(f"'{name}' is the beginning of several runs: {', '.join(fitting)}; write more of the name")
    if fitting:
        return read(storage, fitting[0])
    for known in names:
        if name in (run := read(storage, known)).jobs:
            return run
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else "`metier runs list` shows what there is"
    raise NotFound(f"there is no run '{name}'; {hint}")


def read(storage: Storage, name: str) -> RunInfo:
    """The run of exactly this name, which must be there."""
    return _read(storage, name, _attempts(storage, name).entries())


def list_runs(storage: Storage) -> list[RunInfo]:
    """All runs, those that began last at the end."""
    return sorted((read(storage, name) for name in _names(storage)), key=lambda run: run.started)


def request_cancel(storage: Storage, run: RunInfo) -> None:
    """Ask the driver of `run` to stop; it looks every :data:`POLL_S` seconds. Asking twice changes nothing."""
    note = {"attempt": run.attempt, "host": socket.gethostname(), "at": time.time()}
    storage.write(f"runs/{run.name}/cancel", json.dumps(note).encode())


def is_here(run: RunInfo) -> bool:
    """Whether the driver of `run` is a living process of this machine."""
    return is_same_host(run.facts) and processes.runs(run.facts["pid"], run.facts["created"])


def read_log(storage: Storage, name: str) -> tuple[int, list[str]]:
    """What the drivers of run `name` said: how many older lines are not kept any more, and the lines."""
    try:
        return _split_log(storage.read(f"runs/{name}/log.txt").decode())
    except NotFound:
        return 0, []


def differences(one: Mapping[str, Any], other: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Settings that differ, by dotted path; ``None`` where one side has none."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in [*one, *(key for key in other if key not in one)]:
        left, right = one.get(key), other.get(key)
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            found |= differences(left, right, f"{prefix}{key}.")
        elif left != right:
            found[f"{prefix}{key}"] = (left, right)
    return found


# -- inside -----------------------------------------------------------------------------------------------------


def _take(storage: Storage, name: str, facts: dict[str, Any]) -> int:
    """Append an attempt of this process to the run's log and return its number."""
    job, address = jobs.current()
    mine = {
        "claim": uuid.uuid4().hex,
        "at": time.time(),
        **me(),
        "metier": version("metier"),
        "job": job,
        "address": address,
        **facts,
    }
    log = _attempts(storage, name)
    while True:
        newest = log.head()
        if newest:
            _check_free(storage, name, log.entries(), mine)
        # The entry after the newest one is ours or somebody else's who was faster; then they are looked at.
        number = log.append(mine | {"attempt": newest + 1}, unique="attempt")
        if log.entry(number).data["claim"] == mine["claim"]:
            return number


def _check_free(storage: Storage, name: str, entries: list[Entry], mine: Mapping[str, Any]) -> None:
    theirs = entries[-1].data
    if theirs.get("recipe") != mine.get("recipe"):
        changed = differences(theirs.get("config", {}).get("training", {}), mine.get("config", {}).get("training", {}))
        what = [f"training.{path} was {was} and is {now}" for path, (was, now) in changed.items()]
        if theirs.get("dataset") != mine.get("dataset"):
            what.append("the rows changed")
        if theirs.get("base") != mine.get("base"):
            what.append(f"the base was {theirs.get('base')} and is {mine.get('base')}")
        raise Mismatch(
            f"run {name} was begun with another recipe ({'; '.join(what[:3]) or 'other files of the base'}); set training.run to another name",
            param="training.run",
        )
    if not _read(storage, name, entries).is_over:
        raise Mismatch(
            f"run {name} is being trained by pid {theirs['pid']} on {theirs['host']} since {_utc(theirs['at'])}; "
            f"wait for it, cancel it with `metier runs cancel {name}`, or set training.run to another name",
            param="training.run",
        )


def _read(storage: Storage, name: str, entries: list[Entry]) -> RunInfo:
    entry = entries[-1]
    known: dict[str, Any] = {}
    with suppress(NotFound):
        known = json.loads(storage.read(f"runs/{name}/state.json"))
    if known.get("attempt") != entry.number:  # of an earlier attempt; the newest has not written yet
        known = {}
    began = float(entry.data["at"])
    heartbeat = float(known.get("heartbeat", began))
    state = known.get("state", "preparing")
    if state not in ENDED and not lives(entry.data, heartbeat):
        state = "cancelled" if _cancelled_attempt(storage, name) == entry.number else "lost"
    return RunInfo(
        name=name,
        attempt=entry.number,
        state=state,
        facts=entry.data,
        started=began,
        heartbeat=heartbeat,
        jobs=tuple(entry.data["job"] for entry in entries if entry.data["job"]),
        **{key: known.get(key) for key in ("ended", *PROGRESS, "adapter", "error")},
    )


def _names(storage: Storage) -> list[str]:
    return [name for name in storage.list("runs") if _attempts(storage, name).head()]


def _attempts(storage: Storage, name: str) -> Log:
    return Log(storage, f"runs/{name}/attempts")


def _cancelled_attempt(storage: Storage, name: str) -> int:
    """The attempt that was last asked to stop; 0 if none was."""
    try:
        return int(json.loads(storage.read(f"runs/{name}/cancel"))["attempt"])
    except NotFound:
        return 0


def _join_log(dropped: int, lines: list[str]) -> str:
    head = [f"[{dropped} older lines are not kept]"] if dropped else []
    return "".join(f"{line}\n" for line in head + lines)


def _split_log(text: str) -> tuple[int, list[str]]:
    lines = text.splitlines()
    if lines and (head := re.fullmatch(r"\[(\d+) older lines are not kept\]", lines[0])):
        return int(head[1]), lines[1:]
    return 0, lines


def _masked(value: Any, under: str = "") -> Any:
    """A part of the settings that takes any key, without environment variables and what by its name is a secret."""
    if not isinstance(value, dict):
        return value
    return {
        key: MASK if under == "env_vars" or SECRET.search(key) else _masked(inner, key) for key, inner in value.items()
    }


def _without_logins(value: Any) -> Any:
    """`value` with ``user:password@`` taken out of its URLs."""
    if isinstance(value, dict):
        return {key: _without_logins(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_logins(inner) for inner in value]
    return LOGIN.sub("://", value) if isinstance(value, str) else value


def _sentence(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, SystemExit):
        return "terminated"
    text = str(error).strip()
    if isinstance(error, MetierError):
        return text
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def _utc(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))
