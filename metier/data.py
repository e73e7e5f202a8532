"""``metier data``: look at training rows, mend them, put some aside, make new ones."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.errors import BadInput, ConfigError
from metier import data_build, data_check
from metier.console import print_json, say, table
from metier.options import ConfigOption, JsonOption, SetOption, open_config

if TYPE_CHECKING:
    from training.data.rows import AnyRow

DEFAULT_SHARE = 0.1
"""Share put aside when neither ``--share`` nor the configuration names one."""

app = typer.Typer(help="Training rows: check, fix, split, build.", no_args_is_help=True)
app.command("check")(data_check.check)
app.command("build")(data_build.build)


@app.command()
def split(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Where the two files go.")] = Path(
        "split"
    ),
    share: Annotated[
        float | None,
        typer.Option(
            help=f"Share of the rows put aside; by default data.split.validation_share, or {DEFAULT_SHARE} if that is 0."
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Decides what is put aside; by default data.split.seed.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the two files if they are there.")] = False,
    config: ConfigOption = None,
    set_: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Put a share of data.train aside for validation, by whole documents and conversations, as two JSONL files."""
    settings = open_config(config, set_)
    if not settings.data.train:
        raise ConfigError(
            "data.train names no rows; list the files to split, for example data.train=[rows.jsonl]", param="data.train"
        )
    if share is not None and not 0 < share <= 0.5:
        raise BadInput(f"--share {share:g}: use a share above 0 and at most 0.5", param="share")
    files = [output / "train.jsonl", output / "validation.jsonl"]
    if there := [str(file) for file in files if file.exists() and not force]:
        raise BadInput(f"{' and '.join(there)}: already there; choose another --output, or replace with --force")
    from training.data.load import load_rows
    from training.data.split import group_keys
    from training.data.split import split as divide

    how = settings.data.split
    wanted = share or how.validation_share or DEFAULT_SHARE
    how = how.model_copy(update={"validation_share": wanted, "seed": how.seed if seed is None else seed})
    loaded = load_rows(settings.data, settings.data.train, settings.training.objective)
    for source, fields in loaded.ignored.items():
        say(f"{source}: left out {', '.join(fields)}")
    parts = divide(loaded.rows, how)
    sides = [parts.train, parts.validation]
    _write(files, sides)
    counts = [
        {
            "file": str(file),
            "rows": len(rows),
            "documents": len({document for row in rows for document in row.documents}),
            "groups": len(set(group_keys(rows))),
        }
        for file, rows in zip(files, sides, strict=True)
    ]
    if json:
        print_json({"shapes": loaded.shapes, "seed": how.seed, "files": counts})
        return
    table(("file", "rows", "documents", "groups"), [tuple(count.values()) for count in counts])


def _write(files: Sequence[Path], sides: Sequence[Sequence[AnyRow]]) -> None:
    """Both files or, after a kill, at most one: never rows on both sides, or half a file."""
    mark = uuid.uuid4().hex[:8]
    made = [file.with_name(f".{file.name}.{mark}") for file in files]
    try:
        files[0].parent.mkdir(parents=True, exist_ok=True)
        for new, rows in zip(made, sides, strict=True):
            with new.open("w", encoding="utf-8", newline="\n") as lines:
                lines.writelines(row.model_dump_json(exclude_none=True) + "\n" for row in rows)
        for old in files:
            old.unlink(missing_ok=True)
        for new, file in zip(made, files, strict=True):
            new.replace(file)
    except OSError as error:
        raise BadInput(f"{files[0].parent}: cannot be written ({error.strerror}); choose another --output") from error
    finally:
        for new in made:
            new.unlink(missing_ok=True)
