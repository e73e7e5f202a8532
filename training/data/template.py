"""Question templates of the user over the sentences of chunks -> question and answer pairs.

A YAML file lists them; a match of the regular expression anywhere in a sentence gives a pair::

    templates:
      - pattern: '(?P<subject>[^,;:]+?) costs (?P<price>[\\d.]+ crowns)'
        question: How much does {subject} cost?
        answer: '{price}'

``{name}`` stands for the named group. The whole sentence is the quote. A group called ``subject`` lets follow-up
questions exchange it. ``language`` keeps a template to chunks of that language (``en`` by default); ``kind: none``
makes questions that the documents do not answer, which the writer of the file vouches for.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cluster.errors import BadInput, NotFound
from retrieval.types import Chunk
from training.data.pairs import Pair
from training.data.sentences import language, lower_first, names, sentences

SLOT = re.compile(r"\{(\w*)\}")
SUBJECT = "subject"


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    pattern: str = Field(min_length=1)
    question: str = Field(min_length=1)
    answer: str = ""
    kind: Literal["single", "none"] = "single"
    language: str = "en"

    @model_validator(mode="after")
    def _check(self) -> _Entry:
        if bool(self.answer) == (self.kind == "none"):
            raise ValueError("`answer` goes with every template but those of kind none; add it or take it away")
        if not self.question.rstrip().endswith("?"):
            raise ValueError("`question` must end with a question mark")
        return self


@dataclass(frozen=True)
class Template:
    """One entry of the file, compiled."""

    pattern: re.Pattern[str]
    question: str
    answer: str
    """Empty for ``kind: none``."""
    language: str


def read_templates(file: Path) -> list[Template]:
    """The templates of `file`, in order.

    Raises:
        NotFound: there is no such file.
        BadInput: it is not YAML of the shape above, a regular expression does not compile, or a question or answer
            names a group that its pattern has not; the sentence begins with ``file:line``.
    """
    if not file.is_file():
        raise NotFound(f"{file}: no such file; name a YAML file of templates with --templates", param=str(file))
    try:
        text = file.read_text(encoding="utf-8")
        data, node = yaml.safe_load(text), yaml.compose(text, Loader=yaml.SafeLoader)
    except UnicodeDecodeError as error:
        raise BadInput(f"{file}: not UTF-8 (byte {error.start}); write it again as UTF-8", param=str(file)) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        at = f"{file}:{mark.line + 1}" if mark else str(file)
        raise BadInput(
            f"{at}: not valid YAML ({getattr(error, 'problem', error)}); put patterns in single quotes", param=at
        ) from None
    if not isinstance(data, dict) or list(data) != ["templates"] or not isinstance(data["templates"], list):
        raise BadInput(
            f"{file}: expected one key, `templates:`, with a list of pattern, question and answer", param=str(file)
        )
    assert node is not None  # there is data
    entries = node.value[0][1].value
    return [_template(entry, f"{file}", lines) for entry, lines in zip(data["templates"], entries, strict=True)]


def _template(data: Any, file: str, node: yaml.Node) -> Template:
    lines = {str(key.value): key.start_mark.line + 1 for key, _ in node.value} if isinstance(data, dict) else {}

    def wrong(field: str, reason: str) -> BadInput:
        at = f"{file}:{lines.get(field, node.start_mark.line + 1)}"
        return BadInput(f"{at}: {field}: {reason}", param=at)

    try:
        entry = _Entry.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        field = str(first["loc"][0]) if first["loc"] else "template"
        if first["type"] == "extra_forbidden":
            raise wrong(field, f"is not a field of a template; known are {', '.join(_Entry.model_fields)}") from None
        raise wrong(field, first["msg"].removeprefix("Value error, ")) from None
    try:
        pattern = re.compile(entry.pattern)
    except re.error as error:
        raise wrong("pattern", f"not a regular expression ({error}); mend it") from None
    for field in ("question", "answer"):
        for name in SLOT.findall(getattr(entry, field)):
            if name not in pattern.groupindex:
                known = ", ".join(pattern.groupindex) or "none; write one as (?P<name>…)"
                raise wrong(field, f"{{{name}}} is not a named group of the pattern, which has: {known}")
    return Template(pattern, entry.question.strip(), entry.answer, entry.language)


def pairs(chunks: Sequence[Chunk], templates: Sequence[Template]) -> Iterator[Pair]:
    """A pair for every match in `chunks`, in order; those of ``kind: none`` have an empty answer."""
    named = names(chunk.text for chunk in chunks)
    for chunk in chunks:
        spoken = language(f"{chunk.title} {chunk.heading} {chunk.text}")
        for sentence in sentences(chunk.text):
            for template in templates:
                if spoken is not None and template.language.partition("-")[0] != spoken:
                    continue
                for match in template.pattern.finditer(sentence):
                    yield _pair(match, template, sentence, chunk, named)


def _pair(match: re.Match[str], template: Template, sentence: str, chunk: Chunk, named: set[str]) -> Pair:
    def fill(text: str, groups: dict[str, str]) -> str:
        return " ".join(SLOT.sub(lambda slot: groups[slot[1]], text).split())

    found = {name: value or "" for name, value in match.groupdict().items()}
    inside = {name: lower_first(value, named) if match.start(name) == 0 else value for name, value in found.items()}
    return Pair(
        question=fill(template.question, inside),
        answer=fill(template.answer, found),
        quote=sentence,
        chunk=chunk,
        language=template.language,
        frame=fill(template.question, inside | {SUBJECT: "{}"}) if SUBJECT in found else "",
        subject=inside.get(SUBJECT, "").strip(),
    )
