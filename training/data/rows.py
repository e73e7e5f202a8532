"""The one form every row takes, whatever shape it had on disk: a conversation (:class:`Row`) or raw text (:class:`Text`).

A conversation may say where its last answer stands in the documents::

    {"id": "t1", "kind": "single",
     "messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "18.50 crowns"}],
     "evidence": [{"document": "tariff-r1", "quote": "A trailer costs 18.50 crowns."}]}

The last assistant message is the reference answer, without citation marks. Evidence decides how the row is learned:
with some, among the passages the retriever returns; with none (``[]``, and an empty reference), as a question the
documents do not answer; without the field, as it stands, without documents. :func:`read_rows` reads exactly this
form; ``training.data.read`` takes the other shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cluster.errors import BadInput, NotFound


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Message(_Strict):
    role: Literal["user", "assistant", "system"]
    content: str
    train: bool | None = None
    """Whether this answer is learned; None leaves it to ``training.loss_turns``."""


class Evidence(_Strict):
    """Where an answer stands: a quote that occurs in the document, white space aside."""

    document: str
    quote: str = Field(min_length=1)


class Row(_Strict):
    """One conversation that ends with an answer."""

    id: str = Field(min_length=1)
    kind: Literal["single", "two", "none", "multi"] = "single"
    """One document, two documents, not answerable, or a follow-up question; for reports only."""
    language: str = "en"
    messages: tuple[Message, ...] = Field(min_length=2)
    evidence: tuple[Evidence, ...] | None = None
    """Where the answer stands; empty: in no document; None: documents play no part."""
    groups: tuple[str, ...] = ()
    """Groups that may read what this row was made from, where it was not made from documents of the index."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if [message.role for message in self.messages[-2:]] != ["user", "assistant"]:
            raise ValueError("messages must end with a user message and the assistant's reference answer")
        if self.answerable and not self.reference.strip():
            raise ValueError(
                "the reference answer is empty; write one, or evidence: [] if the documents do not answer the question"
            )
        return self

    @property
    def answerable(self) -> bool:
        return self.evidence is None or bool(self.evidence)

    @property
    def grounded(self) -> bool:
        """Whether it is learned among passages."""
        return self.evidence is not None

    @property
    def reference(self) -> str:
        return self.messages[-1].content

    @property
    def conversation(self) -> list[dict[str, str]]:
        """All messages but the reference, as a client would send them."""
        return [{"role": message.role, "content": message.content} for message in self.messages[:-1]]

    @property
    def documents(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(evidence.document for evidence in self.evidence or ()))


class Text(_Strict):
    """A piece of raw text, for ``training.objective: domain``."""

    id: str = Field(min_length=1)
    text: str = Field(min_length=1)
    document: str | None = None
    """The document it is from, where it is from one."""
    language: str = "en"
    groups: tuple[str, ...] = ()

    @property
    def documents(self) -> tuple[str, ...]:
        return (self.document,) if self.document else ()


AnyRow = Row | Text


def read_rows(files: Sequence[str | Path]) -> list[Row]:
    """All rows of JSONL `files`, in order.

    Raises:
        NotFound: a file is missing.
        BadInput: a row is not of the shape above, or an id occurs twice; the message lists every bad row (at most
            ten) as ``file:line: field: what is wrong``.
    """
    rows: list[Row] = []
    problems: list[str] = []
    seen: dict[str, str] = {}
    for name in files:
        file = Path(name)
        if not file.is_file():
            raise NotFound(
                f"{file}: no such file; data.train and data.heldout list the JSONL files to read", param=str(file)
            )
        for number, line in enumerate(_text(file).split("\n"), 1):
            if not line.strip():
                continue
            at = f"{file}:{number}"
            try:
                row = Row.model_validate_json(line)
            except ValidationError as error:
                first = error.errors()[0]
                field = ".".join(str(part) for part in first["loc"]) or "row"
                problems.append(f"{at}: {field}: {first['msg'].removeprefix('Value error, ')}")
                continue
            if row.id in seen:
                problems.append(f"{at}: id: '{row.id}' was already used at {seen[row.id]}")
            seen[row.id] = at
            rows.append(row)
    if problems:
        more = f"\n… and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise BadInput("\n".join(problems[:10]) + more, param=problems[0].split(":")[0])
    return rows


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(
            f"{file}: not UTF-8 (byte {error.start}); write it again as UTF-8, for example with iconv", param=str(file)
        ) from None
