"""``metier train``: rows -> a published adapter."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

import typer

from metier.console import curve, print_json, progress, say
from metier.options import ConfigOption, JsonOption, SetOption, SubmitOption, open_config


def train(
    config: ConfigOption = None,
    set_: SetOption = None,
    force: Annotated[
        bool, typer.Option("--force", help="Train even if this very recipe is already published.")
    ] = False,
    submit: SubmitOption = False,
    json: JsonOption = False,
) -> None:
    """Fine-tune a LoRA adapter on data.train with Ray Train and DeepSpeed, and publish it with its card.

    The same command after a kill goes on from the last checkpoint.
    """
    settings = open_config(config, set_)
    if submit:
        from cluster.runtime import submit as submit_job

        submit_job(settings, ["train", *(["--force"] if force else [])], partial(typer.echo, nl=False))
        return
    from training.run import train as run

    losses: list[float] = []
    with progress("training") as update:

        def on_event(event: dict[str, Any]) -> None:
            losses.append(event["loss"])
            update(event["step"], event["steps"], f"loss {event['loss']:.3f}  {event['tokens_per_s']:.0f} tokens/s")

        published = run(settings, say=lambda line: say(f"  {line}"), on_event=on_event, force=force)
    if json:
        print_json(published)
        return
    facts = published.card.training
    if losses:
        say(f"  loss {curve(losses)} {facts['loss_first']} -> {facts['loss_last']}")
    say(
        f"adapter {published.name}@{published.version} ({published.digest[:12]}): {facts['steps']} steps, "
        f"loss {facts['loss_first']} -> {facts['loss_last']}, {facts['tokens_per_s']} tokens/s, {facts['seconds']} s"
    )
