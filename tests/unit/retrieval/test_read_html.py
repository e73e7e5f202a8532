"""HTML pages: what is said, in order, with its structure, and without what frames it."""

from __future__ import annotations

import pytest

from retrieval.read.base import Unreadable
from retrieval.read.html import DEEPEST, read_html

PAGE = """<!doctype html><html><head><title>Fares - Corvane</title><style>p {color: red}</style></head><body>
<header><a href="/">Corvane</a></header>
<nav><ul><li>Home<li>Fares</ul></nav>
<div class="top cookie-banner">We use cookies.</div>
<article><header><h1>Fees for <em>trai</em>lers</h1></header>
<p>The fee is&nbsp;<b>40</b>0 crowns.<br>Paid   on
board.</p><p># 5 is a berth</p>
<h2>What to<br>bring</h2>
<ul><li>papers<li>a key <ul><li>of the trailer</ul><li>patience</ul>
<ol><li>Come early.</li><li>Wait.</li></ol>
<table><caption>Prices</caption><tr><th rowspan=2>Kind<th colspan=2>Price</tr><tr><th>Summer<th>Winter</tr>
<tr><td>Car<td>40<td>30 | 20</table>
<table><tr><td><p>placed</p><p>by a table</p></table>
<pre><code>a = 1
  b</code></pre>
<script>var x = "<div>"</script>
</article>
<aside>Read also</aside><footer>(c) Corvane</footer></body></html>"""

TEXT = """# Fees for trailers

The fee is 400 crowns.
Paid on board.

\\# 5 is a berth

## What to bring

- papers
- a key
  - of the trailer
- patience

1. Come early.
2. Wait.

Prices

| Kind | Price |  |
|---|---|---|
| Kind | Summer | Winter |
| Car | 40 | 30 \\| 20 |

placed

by a table

```
a = 1
  b
```
"""


def test_structure_becomes_markdown_and_frames_go() -> None:
    found = read_html(PAGE.encode(), boilerplate=True)
    assert found.text == TEXT
    assert found.title == "Fees for trailers"
    assert found.notes == ["left out 5 parts that frame the page (aside, div, footer, header, nav)"]


def test_frames_stay_if_they_are_wanted() -> None:
    found = read_html(PAGE.encode(), boilerplate=False)
    assert "We use cookies." in found.text and "- Home" in found.text and "(c) Corvane" in found.text
    assert "color" not in found.text and "var x" not in found.text
    assert found.notes == []


def test_the_main_part_is_all_that_counts_where_a_page_marks_it() -> None:
    page = "<title>T</title><body><p>teaser</p><main><p>what is said, at some length</p></main><p>more teasers</p>"
    assert read_html(page.encode(), True).text == "what is said, at some length\n"
    assert "teaser" in read_html(page.replace("main", "div").encode(), True).text
    shred = page.replace("what is said, at some length", "x")
    assert "teaser" in read_html(shred.encode(), True).text


def test_what_holds_most_of_a_page_is_no_frame() -> None:
    page = "<body><div id=sidebar><p>A long text about fares and trailers.</p></div><p>short</p>"
    assert "fares" in read_html(page.encode(), True).text


def test_the_title_is_the_first_heading_then_the_name_of_the_page() -> None:
    assert read_html(b"<title> The\n page </title><p>x", True).title == "The page"
    assert read_html(b"<title>The page</title><header><h1>Fares</h1></header><p>x", True).title == "Fares"
    assert read_html(b"just text", True).title == ""


@pytest.mark.parametrize(
    "head",
    [
        '<meta charset="windows-1252">',
        "<meta http-equiv=Content-Type content='text/html; charset=ISO-8859-1'>",
        '<?xml version="1.0" encoding="iso-8859-1"?>',
    ],
)
def test_the_declared_encoding_counts(head: str) -> None:
    assert read_html(head.encode() + "<p>Gebühr".encode("latin-1"), True).text == "Gebühr\n"


def test_entities_and_invisible_characters() -> None:
    assert read_html(b"<p>Sch&shy;iff&nbsp;&amp; Mole &#x20ac;5 &lt;p&gt;", True).text == "Schiff & Mole €5 <p>\n"


def test_deep_nesting_is_refused_before_it_is_parsed() -> None:
    with pytest.raises(Unreadable, match="nested"):
        read_html(b"<div>" * 1_000_000, True)
    assert read_html(b"<div>" * (DEEPEST - 10) + b"x", True).text == "x\n"
    assert read_html(b"<p>x<li>y" * 10_000, True).text.count("x") == 10_000


def test_very_many_attributes_are_refused_before_they_are_parsed() -> None:
    attributes = " ".join(f"a{number}" for number in range(100_000))
    with pytest.raises(Unreadable, match="attributes"):
        read_html(f"<div {attributes}>x</div>".encode(), True)
    assert read_html(f"<p title='{attributes}'>x</p>".encode(), True).text == "x\n"


def test_a_small_table_cannot_become_a_huge_one() -> None:
    wide = "<td rowspan=100 colspan=100>x" * 200
    assert len(read_html(f"<table><tr>{wide}{'<tr><td>y' * 2000}</table>".encode(), True).text) < 1_000_000


def test_spans_are_believed_within_reason() -> None:
    page = b"<table><tr><td colspan=99999999999999999999>a<td rowspan=x>b<tr><td colspan=0>c<td>d</table>"
    rows = read_html(page, True).text.splitlines()
    assert rows[0].count("|") == 102 and rows[2].startswith("| c | d |")


def test_nothing_gives_nothing() -> None:
    assert read_html(b"<html><body><img src=x></body></html>", True).text == ""
