"""``metier train``: rows -> a published adapter."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated, Any

import typer

from metier.console import curve, print_json, progress, say
from metier.options import ConfigOption, DetachOption, JsonOption, OnOption, SetOption, open_config, run_on


def train(
    config: ConfigOption = None,
    set_: SetOption = None,
    force: Annotated[
        bool, typer.Option("--force", help="Train even if this very recipe is already published.")
    ] = False,
    on: OnOption = None,
    detach: DetachOption = False,
    json: JsonOption = False,
) -> None:
    """Fine-tune on data.train with Ray Train and DeepSpeed, and publish what comes out with its card.

    The same command after a kill goes on from the last checkpoint.
    """
    settings = open_config(config, set_)
    if run_on(settings, on, ["train", *(["--force"] if force else [])], detach=detach, json=json):
        return
    from training.run import train as run

    events: list[dict[str, Any]] = []
    with progress("training") as update:

        def on_event(event: dict[str, Any]) -> None:
            events.append(event)
            if "loss" in event:
                update(event["step"], event["steps"], _step(event))
            else:
                say(f"  step {event['step']}: {_evaluation(event)}")

        published = run(settings, say=lambda line: say(f"  {line}"), on_event=on_event, force=force)
    if json:
        print_json(published)
        return
    card = published.card
    if losses := [event["loss"] for event in events if "loss" in event]:
        say(f"  loss {curve(losses)} {card.training['loss_first']} -> {card.training['loss_last']}")
    for line in _gain_and_forgetting(card.metrics):
        say(f"  {line}")
    facts = card.training
    say(
        f"{settings.training.publish} {published.ref} ({published.digest[:12]}): {facts['steps']} steps, "
        f"loss {facts['loss_first']} -> {facts['loss_last']}, {facts['tokens_per_s']} tokens/s, {facts['seconds']} s"
    )


def _step(event: dict[str, Any]) -> str:
    parts = [
        f"loss {event['loss']:.3f}",
        f"lr {event['learning_rate']:.1e}",
        f"grad {event['grad_norm']:.2f}",
        f"{event['tokens_per_s']:.0f} tokens/s",
        f"{event['memory_bytes'] / 2**30:.1f} GiB",
    ]
    if event.get("mfu"):
        parts.append(f"MFU {event['mfu']:.0%}")
    return "  ".join([*parts, f"{timedelta(seconds=round(event['eta_s']))} left"])


def _evaluation(event: dict[str, Any]) -> str:
    return ", ".join(
        f"{key.removesuffix('_loss')} loss {value:.4f}" for key, value in event.items() if key.endswith("_loss")
    )


def _gain_and_forgetting(metrics: dict[str, Any]) -> list[str]:
    """What was gained on validation rows, and beside it what was lost on general ones."""
    lines = []
    for kind, what in (("validation", "gain"), ("general", "forgetting")):
        before, after = metrics.get(f"{kind}_before"), metrics.get(f"{kind}_after")
        if before is not None and after is not None:
            change = 100 * (after - before) / before if before else 0.0
            lines.append(f"{what}: {kind} loss {before:.4f} -> {after:.4f} ({change:+.1f} %)")
    return lines
