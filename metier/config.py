"""``metier config``: show, describe and check configurations."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
import yaml

from cluster.config import Config, load, public_dict
from metier.console import print_json, say
from metier.options import ConfigOption, JsonOption, SetOption

app = typer.Typer(help="The configuration and its schema.", no_args_is_help=True)


@app.command()
def show(config: ConfigOption = None, set_: SetOption = None, json: JsonOption = False) -> None:
    """The resolved configuration, defaults and all; secrets are masked."""
    data = public_dict(load(config, set_ or ()))
    if json:
        print_json(data)
        return
    typer.echo(yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=110), nl=False)


@app.command()
def schema(
    markdown: Annotated[bool, typer.Option("--markdown", help="The page docs/configuration.md instead.")] = False,
) -> None:
    """JSON schema of a configuration file, for editors."""
    if markdown:
        from metier.reference import markdown as render

        typer.echo(render(), nl=False)
        return
    print_json(Config.model_json_schema())


@app.command()
def validate(
    files: Annotated[list[Path], typer.Argument(help="YAML files to check.")],
    set_: SetOption = None,
) -> None:
    """Check configuration files; the first bad one ends it with exit code 2."""
    for file in files:
        load(file, set_ or ())
        say(f"{file}: ok")
