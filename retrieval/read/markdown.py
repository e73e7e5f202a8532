"""Markdown and plain text: the text as it is, with what YAML front matter says of it.

Front matter is a block between ``---`` and ``---`` at the very beginning whose first line is a key: ``title`` and
``groups`` are taken as such, everything else becomes attributes. Not covered: TOML front matter, Markdown rendered to
text, anchors and aliases in YAML (they can grow without bound).
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from retrieval.read.base import Extract, Unreadable
from retrieval.read.clean import clean, one_line
from retrieval.read.decode import decode
from retrieval.read.plain import attributes, groups_of
from retrieval.structure import title_of

FRONT = re.compile(
    r"---[ \t]*\n(?=[ \t]*(?:#[^\n]*\n)*[\w\"'][^\n:]*:(?:[ \t]|\n))(.*?)^(?:---|\.\.\.)[ \t]*(?:\n|\Z)",
    re.DOTALL | re.MULTILINE,
)
LONGEST_FRONT = 65_536


class _Loader(yaml.SafeLoader):
    """SafeLoader without aliases."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not taken")
        return super().compose_node(parent, index)


def read_markdown(data: bytes) -> Extract:
    """Text with front matter."""
    text, note = decode(data)
    text = clean(text)
    front = FRONT.match(text[:LONGEST_FRONT])
    found = _front(front.group(1)) if front else Extract("")
    found.text = text[front.end() :] if front else text
    found.title = found.title or title_of(found.text)
    if note:
        found.notes.append(note)
    return found


def read_text(data: bytes) -> Extract:
    """Text, headings included where it has any."""
    text, note = decode(data)
    text = clean(text)
    return Extract(text, title=title_of(text), notes=[note] if note else [])


def _front(block: str) -> Extract:
    try:
        values = yaml.load(block, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise Unreadable(f"its front matter is not valid YAML ({reason}); mend it, or put no '---' first") from None
    if not isinstance(values, dict):
        raise Unreadable("its front matter is not a list of keys and values; mend it, or put no '---' first")
    title = values.pop("title", None)
    groups = groups_of(values.pop("groups", None))
    metadata, dropped = attributes(values)
    notes = [f"left out attributes that are too large: {', '.join(dropped)}"] if dropped else []
    return Extract("", one_line(str(title)) if title else "", metadata, groups, notes=notes)
