"""Headings, fences and tables of a text, as offsets."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrieval.structure import Heading, outline, title_of

TEXT = """# Fares ##
Intro
=====

| a | b |
|:--|--:|
| 1 | 2 |
no row

a | b
--- | ---

~~~~
# comment
```
~~~
~~~~
Extra
---
"""


def test_everything_is_where_the_offsets_say() -> None:
    found = outline(TEXT)
    assert [(h.level, h.name, TEXT[h.start : h.end]) for h in found.headings] == [
        (1, "Fares", "# Fares ##\n"),
        (1, "Intro", "Intro\n=====\n"),
    ]
    assert [TEXT[start:end] for start, end in found.fences] == ["~~~~\n# comment\n```\n~~~\n~~~~\n"]
    assert [(TEXT[t.start : t.body], TEXT[t.body : t.end]) for t in found.tables] == [
        ("| a | b |\n|:--|--:|\n", "| 1 | 2 |\n"),
        ("a | b\n--- | ---\n", ""),
    ]
    assert [TEXT[row:].splitlines()[0] for row in found.tables[0].rows] == ["| 1 | 2 |"]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("#", ""),
        ("# #", ""),
        ("#x", ""),
        ("    # x", ""),
        ("## x", ""),
        ("```\n# x\n```\n# y", "y"),
        ("  # C# ", "C#"),
        ("x\n=\n", ""),
        ("a\nb\n==\n", ""),
        ("- x\n==\n", ""),
        ("x\n==", "x"),
    ],
)
def test_title(text: str, name: str) -> None:
    assert title_of(text) == name


def test_a_fence_that_is_never_closed_goes_on_to_the_end() -> None:
    text = "a\n```\n# x\n| a |\n|---|"
    found = outline(text)
    assert found.fences == ((2, len(text)),) and found.headings == found.tables == ()


@given(st.lists(st.sampled_from(["# a", "x", "===", "--", "", "```", "~~~~", "|a|", "|-|", "- b"]), max_size=20))
def test_the_parts_are_whole_lines_that_do_not_overlap(lines: list[str]) -> None:
    text = "\n".join(lines)
    found = outline(text)
    spans = sorted(
        [*((h.start, h.end) for h in found.headings), *found.fences, *((t.start, t.end) for t in found.tables)]
    )
    place = 0
    for start, end in spans:
        assert place <= start < end <= len(text)
        assert start == 0 or text[start - 1] == "\n"
        assert end == len(text) or text[end - 1] == "\n"
        place = end
    assert all(isinstance(heading, Heading) and 1 <= heading.level <= 6 for heading in found.headings)
