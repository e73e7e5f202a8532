"""``metier ask``: one question over HTTP, with the citations and the release that answered."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from metier.console import out, print_json
from metier.options import ConfigOption, JsonOption, SetOption, open_config, server_url


def ask(
    question: Annotated[str, typer.Argument(help="The question.")],
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", help="Release, base or base:adapter; by default the release of the configuration's name."
        ),
    ] = None,
    stream: Annotated[bool, typer.Option("--stream/--no-stream", help="Print the answer as it is made.")] = True,
    rag: Annotated[
        bool | None, typer.Option("--rag/--no-rag", help="Look passages up or not; by default the release decides.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Longest answer.")] = None,
    config: ConfigOption = None,
    set_: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Ask a running server a question."""
    settings = open_config(config, set_)
    from serving.client import Client, Reply

    options: dict[str, Any] = {}
    if rag is not None:
        options["rag"] = {"enabled": rag}
    if max_tokens is not None:
        options["max_tokens"] = max_tokens
    messages = [{"role": "user", "content": question}]
    name = model or settings.name
    with Client(server_url(settings), settings.serving.request_timeout_s) as client:
        if json or not stream:
            reply = client.ask(name, messages, **options)
            if json:
                print_json(reply)
                return
            out.print(reply.text, markup=False, soft_wrap=True)
        else:
            for piece in client.stream(name, messages, **options):
                if isinstance(piece, Reply):
                    reply = piece
                else:
                    out.print(piece, end="", markup=False, soft_wrap=True)
            out.print()
    _print_sources(reply)


def _print_sources(reply: Any) -> None:
    for citation in reply.citations:
        out.print(f"  [{citation.number}] {citation.filename}", style="cyan", markup=False, soft_wrap=True)
    notes = ["declined: the documents do not say"] if reply.declined else []
    times = ", ".join(f"{stage} {seconds:.2f} s" for stage, seconds in reply.seconds.items())
    out.print("  " + "  ".join([f"by {reply.model}", *notes, times]), style="dim", markup=False, soft_wrap=True)
