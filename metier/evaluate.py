"""``metier eval``: the held-out questions through the four arms of a running server, side by side.

With a word after it (``metier eval retrieval``) another evaluation, each in a file of its own.
"""

from __future__ import annotations

import json as jsonlib
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from cluster.errors import BadInput, ConfigError
from metier.console import print_json, progress, say, table
from metier.evaluate_retrieval import retrieval
from metier.options import (
    ConfigOption,
    DetachOption,
    JsonOption,
    OnOption,
    SetOption,
    open_config,
    open_registry,
    run_on,
    server_url,
)

app = typer.Typer(invoke_without_command=True)
app.command("retrieval")(retrieval)


@app.callback()
def evaluate(
    ctx: typer.Context,
    release: Annotated[
        str | None, typer.Option("--release", help="Release to judge; by default the configuration's name.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many questions.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write every answer to this JSONL file.")
    ] = None,
    config: ConfigOption = None,
    set_: SetOption = None,
    on: OnOption = None,
    detach: DetachOption = False,
    json: JsonOption = False,
) -> None:
    """Answer data.heldout by base, base+RAG, tuned and tuned+RAG, and print the scores."""
    if ctx.invoked_subcommand is not None:
        return
    settings = open_config(config, set_)
    if not settings.data.heldout:
        raise ConfigError("data.heldout names no file; list the JSONL files with questions", param="data.heldout")
    if on and output:
        raise BadInput(
            "--output names a file of the cluster's node with --on; leave it out, the scores are in the job's log"
        )
    verb = ["eval", *(["--release", release] if release else []), *(["--limit", str(limit)] if limit else [])]
    if run_on(settings, on, verb, detach=detach, json=json):
        return
    from evaluation.arms import arms, run, score
    from serving.client import Client
    from training.data.rows import read_rows

    rows = read_rows(settings.data.heldout)[:limit]
    made = open_registry(settings).release(release or settings.name)
    adapter = made.release.adapter
    if adapter is None:
        raise BadInput(f"release {made.name}@{made.digest[:12]} has no adapter, so there is no tuned arm to compare")
    base = settings.base.served_name
    four = arms(base, f"{base}:{adapter.name}@{adapter.version}", f"{made.name}@{made.digest}")
    scores, answers = [], []
    with Client(server_url(settings), settings.serving.request_timeout_s) as client:
        for arm in four:
            with progress(arm.name, len(rows)) as update:
                done = 0

                def count() -> None:
                    nonlocal done
                    done += 1
                    update(done, len(rows), "")

                answered = run(
                    client,
                    arm,
                    rows,
                    max_tokens=settings.evaluation.max_tokens,
                    concurrency=settings.evaluation.concurrency,
                    on_answer=count,
                )
            answers += answered
            scores.append(score(arm, answered, rows))
    if output:
        lines = "".join(jsonlib.dumps(asdict(answer), ensure_ascii=False) + "\n" for answer in answers)
        output.write_text(lines, encoding="utf-8")
        say(f"every answer is in {output}")
    if json:
        print_json({"release": made.digest, "questions": len(rows), "arms": scores})
        return
    table(
        ("arm", "exact match", "token F1", "citation hit", "abstains rightly", "wrongly"),
        [(s.arm, s.exact_match, s.token_f1, s.citation_hit, s.abstention, s.false_abstention) for s in scores],
        title=f"{len(rows)} held-out questions, release {made.name}@{made.digest[:12]}",
    )
