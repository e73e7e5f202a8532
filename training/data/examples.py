"""An example: a row as it is learned, after passages, citations and the choice of turns. What a dataset holds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

from pydantic import BaseModel, ConfigDict

from cluster.storage import Storage


class Example(BaseModel):
    """Either a conversation (`messages` up to the answer, then `answer`) or raw `text`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    messages: tuple[dict[str, str], ...] = ()
    answer: str = ""
    learned: bool = True
    """Whether the loss is taken on `answer`."""
    turns: tuple[int, ...] = ()
    """Positions in `messages` of earlier answers that are learned too."""
    text: str | None = None
    documents: tuple[str, ...] = ()
    """Documents whose text it holds."""
    chunks: tuple[str, ...] = ()


def digest(examples: Iterable[BaseModel]) -> str:
    """Content hash of `examples` in their order: the dataset's version, 64 hex digits."""
    total = hashlib.sha256()
    for example in examples:
        total.update(json.dumps(example.model_dump(mode="json"), sort_keys=True, ensure_ascii=False).encode())
        total.update(b"\n")
    return total.hexdigest()


def write(storage: Storage, path: str, examples: Iterable[Example]) -> None:
    """Keep `examples` at `path`, one JSON object a line."""
    storage.write(path, "".join(example.model_dump_json() + "\n" for example in examples).encode())


def read(storage: Storage, path: str) -> list[Example]:
    """What :func:`write` kept."""
    return [Example.model_validate_json(line) for line in storage.read(path).split(b"\n") if line]
