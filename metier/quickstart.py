"""``metier quickstart``: the main job from documents to a table of scores, by the very commands a user would type."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from cluster.config import load
from cluster.errors import NotFound
from metier import process
from metier.console import out, say, table

EXAMPLE = Path("examples/corvane/metier.yaml")
QUESTIONS = (
    ("What is the price of a nine-metre rigid lorry from Sennet Point to Tolloway?", ["--stream"]),
    ("What colour is the badge that a late visitor to a vessel in port needs?", ["--no-stream"]),
    ("Who painted the ceiling of the Sistine Chapel?", ["--no-stream"]),
)
"""One streamed, one whole, one that the documents do not answer."""


def quickstart(
    config: Annotated[Path, typer.Option("--config", "-c", help="The example to run.")] = EXAMPLE,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the server up at the end.")] = False,
) -> None:
    """Index, train, release, serve, ask and evaluate the sample trade; the server is stopped at the end."""
    if not config.is_file():
        raise NotFound(
            f"{config}: no such file; run this in the root of the repository, or name an example with --config"
        )
    settings = load(config)
    ours = process.read(settings) is None
    if ours:
        from serving.up import check_port

        check_port(settings)  # now, rather than after the training
    steps: list[tuple[str, Sequence[str]]] = [
        ("models: fetch the base model and the embedder", ["models", "fetch"]),
        ("index: documents into Milvus", ["index"]),
        ("train: a LoRA adapter with Ray Train and DeepSpeed", ["train"]),
        ("release: base + adapter + knowledge + prompt", ["release", "create", "--promote", "prod"]),
        ("serve: Ray Serve in the background", ["up", "--detach"]),
        *((f"ask: {question}", ["ask", question, *flags]) for question, flags in QUESTIONS),
        ("evaluate: four arms on the held-out questions", ["eval", "--output", ".metier/answers.jsonl"]),
    ]
    began = time.monotonic()
    times: list[tuple[str, float]] = []
    try:
        for number, (title, verb) in enumerate(steps, 1):
            out.print(f"\n[bold]\\[{number}/{len(steps)}][/bold] {title}", soft_wrap=True)
            out.print(f"$ metier {_shown(verb)} --config {config}", style="dim", markup=False, soft_wrap=True)
            start = time.monotonic()
            _metier(verb, config)
            times.append((title.split(":")[0], time.monotonic() - start))
    finally:
        if ours and not keep:
            _metier(["down"], config)
    out.print()
    table(
        ("step", "seconds"),
        [*((name, round(seconds, 1)) for name, seconds in times), ("all", round(time.monotonic() - began, 1))],
    )
    say(
        f"\nWhere to look next:\n"
        f"  metier up --config {config}            serve it again; then `metier ask`, curl or any OpenAI client\n"
        f'  metier search --config {config} "…"    the passages a question finds\n'
        f"  metier release list --config {config}  what was released; `promote` and `rollback` move aliases\n"
        f"  .metier/answers.jsonl                  every answer behind the table\n"
        f"  docs/architecture.md                   one request and one training run, step by step"
    )


def _metier(verb: Sequence[str], config: Path) -> None:
    """Run a verb as its own process; its failure is ours, with the same exit code."""
    out.file.flush()
    command = [sys.executable, "-m", "metier", *verb, "--config", str(config)]
    code = subprocess.run(command, env={**os.environ, "COLUMNS": str(out.width)}, check=False).returncode
    if code:
        raise typer.Exit(code)


def _shown(verb: Sequence[str]) -> str:
    return " ".join(f'"{word}"' if " " in word else word for word in verb)
