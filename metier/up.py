"""``metier up``: serve what the registry holds, in the foreground or detached."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Annotated

import typer

from cluster.config import Config
from cluster.errors import MetierError, Unavailable
from metier import process
from metier.console import say
from metier.options import ConfigOption, SetOption, open_config, server_url

START_SECONDS = 600.0


def up(
    config: ConfigOption = None,
    set_: SetOption = None,
    detach: Annotated[
        bool, typer.Option("--detach", "-d", help="Return when it is ready; `metier down` ends it.")
    ] = False,
) -> None:
    """Start Milvus (embedded), Ray and the pipeline, and serve until Ctrl-C or `metier down`."""
    settings = open_config(config, set_)
    if running := process.read(settings):
        say(f"already up at {running.url} (process {running.pid}); `metier down` ends it")
        return
    from serving.up import check_port, deploy, stays_in_foreground

    if not stays_in_foreground(settings):
        from cluster import runtime

        with runtime.connect(settings):
            deploy(settings)
        say(
            f"application '{settings.name}' runs on the Ray cluster at {settings.ray.address}; `metier down` removes it"
        )
        return
    check_port(settings)
    if detach:
        _detached(settings, config, set_ or [])
    else:
        _foreground(settings)


def _foreground(settings: Config) -> None:
    from serving.up import running

    ended = threading.Event()
    try:
        with running(settings, lambda line: say(f"  {line}")):
            _on_signals(ended)
            process.write(settings, server_url(settings))
            say(f"up at {server_url(settings)}; Ctrl-C or `metier down` ends it")
            ended.wait()
            say("shutting down")
    finally:
        process.forget(settings)


def _on_signals(ended: threading.Event) -> None:
    def end(*_: object) -> None:
        if ended.is_set():
            raise KeyboardInterrupt  # asked twice: do not wait for a clean end
        ended.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)


def _detached(settings: Config, file: Path | None, overrides: list[str]) -> None:
    log = process.log_file(settings)
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "metier", "up"]
    command += ["--config", str(file)] if file else []
    for override in overrides:
        command += ["--set", override]
    with log.open("w") as sink:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, start_new_session=True)
    deadline = time.monotonic() + START_SECONDS
    try:
        while time.monotonic() < deadline:
            if found := process.read(settings):
                say(f"up at {found.url} (process {found.pid}, log {log}); `metier down` ends it")
                return
            if child.poll() is not None:
                break
            time.sleep(0.2)
    except (KeyboardInterrupt, SystemExit):
        child.terminate()
        child.wait()
        raise
    child.terminate()
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("error:")]
    kinds = {kind.exit_code: kind for kind in MetierError.__subclasses__()}
    raise kinds.get(child.poll() or 0, Unavailable)(
        "\n".join(line.removeprefix("error: ") for line in lines) or f"it did not start; see {log}"
    )
