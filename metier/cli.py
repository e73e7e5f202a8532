"""The command line: which verbs there are. Each verb has a file of its own, which imports heavy things in its body."""

from __future__ import annotations

from typing import Annotated

import typer

from cluster.errors import exit_codes
from metier import (
    adapters,
    ask,
    check,
    config,
    data,
    down,
    evaluate,
    index,
    knowledge,
    models,
    plan,
    quickstart,
    release,
    runs,
    search,
    status,
    train,
    up,
)

EPILOG = "Exit codes: " + "; ".join(f"{code} {meaning}" for code, meaning in exit_codes().items()) + "."

app = typer.Typer(
    name="metier",
    help="Turn a general language model into an expert in a trade: fine-tuned, grounded, served, released as one.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    epilog=EPILOG,
)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"metier {version('metier')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Options before the verb."""


app.command("quickstart")(quickstart.quickstart)
app.command("check")(check.check)
app.add_typer(data.app, name="data")
app.command("index")(index.index)
app.add_typer(knowledge.app, name="knowledge")
app.command("search")(search.search)
app.command("plan")(plan.plan)
app.command("train")(train.train)
app.add_typer(runs.app, name="runs")
app.command("up")(up.up)
app.command("down")(down.down)
app.command("status")(status.status)
app.command("ask")(ask.ask)
app.add_typer(evaluate.app, name="eval")
app.add_typer(release.app, name="release")
app.add_typer(adapters.app, name="adapters")
app.add_typer(models.app, name="models")
app.add_typer(config.app, name="config")
