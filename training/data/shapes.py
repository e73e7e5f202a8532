"""Records -> rows: the shapes that rows have on disk, and the one form they all become (``training.data.rows``).

``chat``
    `messages` of `role` and `content`, or `conversations` of `from` and `value` as ShareGPT writes them.
``prompt``
    `prompt` and `completion`, each a string or a list of messages.
``instruction``
    `instruction`, `input`, `output`, and `history` as a list of [question, answer].
``text``
    `text`.

The shapes of conversations also take `system`, `id`, `kind`, `language`, `evidence` and `groups`; ``text`` takes
`id`, `document`, `language` and `groups`. Every other field is left out, unless its name is nearly one of these.

Not covered: tool calls, images, preference pairs, and turns that are to be merged: they are refused, never mended.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from pydantic import ValidationError
from pydantic_core import from_json

from cluster.config import Shape
from training.data.problems import Problem
from training.data.read import Record
from training.data.rows import AnyRow, Row, Text

COMMON = ("id", "kind", "language", "evidence", "groups")
OPTIONAL: dict[Shape, tuple[str, ...]] = {
    "chat": ("system", *COMMON),
    "prompt": ("system", *COMMON),
    "instruction": ("input", "history", "system", *COMMON),
    "text": ("id", "document", "language", "groups"),
}
REQUIRED: dict[Shape, tuple[str, ...]] = {
    "chat": ("messages",),
    "prompt": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
    "text": ("text",),
}
"""In the order in which a shape is told from the fields."""
CONVERSATIONS = "conversations"
"""What ShareGPT calls `messages`."""
FIELDS = frozenset(
    {CONVERSATIONS, *(name for part in (OPTIONAL, REQUIRED) for names in part.values() for name in names)}
)
"""Every name that means something here."""
ROLES = {
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant",
    "system": "system",
}  # fmt: skip
UNSUPPORTED = ("tool", "function", "function_call", "observation", "tool_calls")
TYPO = 0.85
"""How alike two names must be (:mod:`difflib`) for one to be taken for a slip of the pen."""


class _Wrong(Exception):
    """(field, reason, fix) of a row that cannot be used."""


def detect(fields: Mapping[str, Any]) -> Shape | None:
    """The shape whose fields are all there; the first of chat, prompt, instruction, text."""
    return _detect(tuple(fields))


def to_row(record: Record, shape: Shape) -> AnyRow | Problem:
    """`record` in the one form, or the first thing that is wrong with it.

    A row without `id` gets one from its content: 16 hex digits of SHA-256, the same wherever the row stands.
    """
    fields = record.fields
    try:
        _check_names(tuple(fields), shape)
        return _text(fields) if shape == "text" else _conversation(fields, MESSAGES[shape](fields))
    except _Wrong as wrong:
        return Problem(record.place, *wrong.args)
    except ValidationError as error:
        return Problem(record.place, *_first(error))


def unknown_shape(record: Record) -> Problem:
    """What is said of a record of no known shape."""
    return Problem(record.place, "row", *_unknown(tuple(record.fields)))


def ignored(names: Sequence[str], shape: Shape) -> tuple[str, ...]:
    """The fields among `names` that mean nothing in rows of `shape`."""
    return tuple(name for name in names if name not in _known(shape))


@lru_cache
def _known(shape: Shape) -> frozenset[str]:
    extra = (CONVERSATIONS,) if shape == "chat" else ()
    return frozenset((*REQUIRED[shape], *extra, *OPTIONAL[shape]))


@lru_cache(maxsize=1024)
def _detect(names: tuple[str, ...]) -> Shape | None:
    if CONVERSATIONS in names:
        return "chat"
    return next((shape for shape, needed in REQUIRED.items() if set(needed) <= set(names)), None)


@lru_cache(maxsize=1024)
def _unknown(names: tuple[str, ...]) -> tuple[str, str]:
    shapes = "; ".join(f"{shape} ({', '.join(needed)})" for shape, needed in REQUIRED.items())
    reason = f"has the fields {', '.join(names) or '(none)'}, which are no known shape: {shapes}"
    return reason, "say what they mean with data.columns={their_name: our_name}, or name the shape with data.shape"


@lru_cache(maxsize=1024)
def _slip(names: tuple[str, ...], shape: Shape) -> tuple[str, str] | None:
    """(name, what was probably meant) of a field that is nearly one of ours."""
    missing = sorted(_known(shape) - set(names))
    for name in ignored(names, shape):
        if near := difflib.get_close_matches(name, missing, n=1, cutoff=TYPO):
            return name, near[0]
    return None


@lru_cache(maxsize=1024)
def _missing(names: tuple[str, ...], shape: Shape) -> str | None:
    if shape == "chat" and CONVERSATIONS in names:
        return None
    return next((name for name in REQUIRED[shape] if name not in names), None)


def _check_names(names: tuple[str, ...], shape: Shape) -> None:
    if slip := _slip(names, shape):
        name, meant = slip
        fix = f"write {meant}, or leave the field out with data.columns={{{name}: ''}}"
        raise _Wrong(name, f"is not a field of {shape} rows, but nearly {meant}", fix)
    if absent := _missing(names, shape):
        reason = f"is missing from a {shape} row, which has {', '.join(names) or 'no fields'}"
        raise _Wrong(absent, reason, "write it, or say with data.columns which field it is")


# -- conversations -----------------------------------------------------------------------------------------------


class Turn(NamedTuple):
    """A message of a row, and where its parts stand there."""

    role_at: str
    content_at: str
    """Such as ``messages.2.content``; ``prompt`` for a string."""
    message: dict[str, Any]
    """`role`, `content` and `train` of :class:`training.data.rows.Message`."""


def _chat(fields: Mapping[str, Any]) -> list[Turn]:
    name = CONVERSATIONS if fields.get("messages") is None and CONVERSATIONS in fields else "messages"
    return _turns(name, fields[name])


def _prompt(fields: Mapping[str, Any]) -> list[Turn]:
    given = _said("prompt", fields["prompt"], "user")
    learned = _said("completion", fields["completion"], "assistant")
    earlier, later = _answers(given), _answers(learned)
    if earlier or len(later) > 1:
        # The shape says which answers are learned: those of the completion.
        for answers, flag in ((earlier, False), (later, True)):
            for answer in answers:
                answer["train"] = flag if answer["train"] is None else answer["train"]
    return [*given, *learned]


def _answers(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    return [turn.message for turn in turns if turn.message["role"] == "assistant"]


def _instruction(fields: Mapping[str, Any]) -> list[Turn]:
    turns: list[Turn] = []
    for number, pair in enumerate(_items("history", _optional(fields, "history") or [])):
        at = f"history.{number}"
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise _Wrong(at, "is not a pair", "write [question, answer]")
        turns += [*_said(f"{at}.0", pair[0], "user"), *_said(f"{at}.1", pair[1], "assistant")]
    (asked,) = _said("instruction", fields["instruction"], "user", only_text=True)
    if (given := _optional(fields, "input")) is not None:
        (extra,) = _said("input", given, "user", only_text=True)
        asked.message["content"] += "\n\n" + extra.message["content"]
    return [*turns, asked, *_said("output", fields["output"], "assistant", only_text=True)]


MESSAGES: dict[Shape, Callable[[Mapping[str, Any]], list[Turn]]] = {
    "chat": _chat,
    "prompt": _prompt,
    "instruction": _instruction,
}


def _conversation(fields: Mapping[str, Any], turns: list[Turn]) -> Row:
    optional = {name: value for name in COMMON if (value := _optional(fields, name)) is not None}
    for name in ("evidence", "groups"):
        if name in optional:
            optional[name] = _items(name, optional[name])
    if (system := _optional(fields, "system")) is not None:
        if turns and turns[0].message["role"] == "system":
            raise _Wrong("system", "is given beside a system message", "keep one of them")
        turns = [*_said("system", system, "system", only_text=True), *turns]
    _check_order(turns, may_be_empty=optional.get("evidence") == [])
    return Row.model_validate(_with_id(optional | {"messages": [turn.message for turn in turns]}))


def _said(field: str, value: Any, role: str, *, only_text: bool = False) -> list[Turn]:
    """A string as one message of `role`, or a list of messages as it stands."""
    if isinstance(value, str):
        return [Turn(field, field, {"role": role, "content": value, "train": None})]
    if only_text or not isinstance(value, Sequence):
        raise _Wrong(field, f"is {_kind(value)}", "write it as a string")
    return _turns(field, value)


def _turns(field: str, value: Any) -> list[Turn]:
    turns = []
    for number, message in enumerate(_items(field, value)):
        at = f"{field}.{number}"
        if not isinstance(message, Mapping):
            raise _Wrong(at, f"is {_kind(message)}", 'write a message: {"role": "user", "content": "…"}')
        turns.append(_turn(at, message))
    return turns


def _turn(at: str, message: Mapping[str, Any]) -> Turn:
    role_name = "from" if "from" in message and "role" not in message else "role"
    content_name = "value" if "value" in message and "content" not in message else "content"
    said = message.get(role_name)
    role = ROLES.get(said) if isinstance(said, str) else None
    if called := next((name for name in UNSUPPORTED if message.get(name)), None):
        raise _Wrong(f"{at}.{called}", "calls a tool, which rows cannot hold", "take the row out")
    role_at, content_at = f"{at}.{role_name}", f"{at}.{content_name}"
    if role is None:
        if said in UNSUPPORTED:
            raise _Wrong(role_at, f"'{said}' is the turn of a tool, which rows cannot hold", "take the row out")
        reason = "is missing" if said is None else f"{said!r} is not known"
        raise _Wrong(role_at, reason, "use user, assistant or system")
    content = message.get(content_name)
    if not isinstance(content, str):
        raise _Wrong(content_at, f"is {_kind(content)}", "write it as a string; only text can be learned")
    train = message.get("train")
    if train is not None and not isinstance(train, bool):
        raise _Wrong(f"{at}.train", f"is {_kind(train)}", "write true or false")
    if train and role != "assistant":
        raise _Wrong(f"{at}.train", f"is true on a message of the {role}", "only answers of the assistant are learned")
    return Turn(role_at, content_at, {"role": role, "content": content, "train": train})


def _check_order(turns: Sequence[Turn], *, may_be_empty: bool) -> None:
    """System first if at all; then user and assistant in turn, the user first, the assistant last; none empty."""
    if not turns:
        raise _Wrong("messages", "is empty", "write a question and its answer")
    before = "system"
    for number, (role_at, content_at, message) in enumerate(turns):
        role = message["role"]
        is_reference = role == "assistant" and number == len(turns) - 1
        if not message["content"].strip() and not (may_be_empty and is_reference):
            raise _Wrong(content_at, "is empty", "write what was said, or take the row out")
        if role == "system":
            if number:
                raise _Wrong(role_at, "a system message stands behind the first place", "move it to the front")
        elif role == before:
            raise _Wrong(role_at, f"two turns of the {role} in a row", "join them, or write the turn between them")
        elif role == "assistant" and before == "system":
            raise _Wrong(role_at, "the conversation begins with the assistant", "begin it with the user")
        before = role
    if before != "assistant":
        raise _Wrong(
            turns[-1].role_at, f"the conversation ends with the {before}", "end it with the assistant's answer"
        )
    if all(answer["train"] is False for answer in _answers(turns)):
        raise _Wrong("messages", "train is false on every answer, so nothing is learned", "take the row out")


# -- raw text ----------------------------------------------------------------------------------------------------


def _text(fields: Mapping[str, Any]) -> Text:
    text = fields["text"]
    if not isinstance(text, str):
        raise _Wrong("text", f"is {_kind(text)}", "write it as a string")
    if not text.strip():
        raise _Wrong("text", "is empty", "write some text, or take the row out")
    optional = {name: value for name in OPTIONAL["text"] if (value := _optional(fields, name)) is not None}
    if "groups" in optional:
        optional["groups"] = _items("groups", optional["groups"])
    return Text.model_validate(_with_id(optional | {"text": text}))


# -- values ------------------------------------------------------------------------------------------------------


def _optional(fields: Mapping[str, Any], name: str) -> Any:
    """The value of `name`; a null and the empty cell of a table count as none."""
    value = fields.get(name)
    return None if isinstance(value, str) and not value else value


def _items(field: str, value: Any) -> list[Any]:
    """A list, or the JSON of one in a string, as the cell of a table holds it."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = from_json(value)
        except ValueError as error:
            raise _Wrong(field, f"is not JSON ({error})", "write a list, in a cell as JSON") from None
    if not isinstance(value, list | tuple):
        raise _Wrong(field, f"is {_kind(value)}", "write a list, in a cell as JSON")
    return list(value)


def _with_id(fields: dict[str, Any]) -> dict[str, Any]:
    given = fields.get("id")
    if isinstance(given, int) and not isinstance(given, bool):
        return fields | {"id": str(given)}
    if given is None:
        content = json.dumps(fields, sort_keys=True, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass")
        return fields | {"id": hashlib.sha256(content).hexdigest()[:16]}
    return fields


def _kind(value: Any) -> str:
    names = {type(None): "null", bool: "true or false", int: "a number", float: "a number", str: "a string"}
    return names.get(type(value), "an object" if isinstance(value, Mapping) else "a list")


def _first(error: ValidationError) -> tuple[str, str, str]:
    """(field, reason, fix) of the first thing that the form of a row refuses."""
    detail = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in detail["loc"]) or "row"
    message = detail["msg"].removeprefix("Value error, ")
    reason, _, fix = message.partition("; ")
    return field, reason[:1].lower() + reason[1:], fix or "docs/data.md shows the form of a row"
