"""``metier runs``: training runs, wherever they were started."""

from __future__ import annotations

import typer

app = typer.Typer(help="Training runs.", no_args_is_help=True)
