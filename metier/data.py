"""``metier data``: look at training rows, mend them, put some aside, make new ones."""

from __future__ import annotations

import typer

app = typer.Typer(help="Training rows: check, fix, split, build.", no_args_is_help=True)
