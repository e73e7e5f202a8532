"""HTML -> text with Markdown structure: headings, paragraphs, lists, tables and code, in the order of the page.

Parsed as browsers do (selectolax, the lexbor engine). What frames a page goes: navigation, header, footer, asides,
cookie banners, by element, role and class name; where the page marks its main part, everything else. Tables that only
place things (no rows of several short cells) become paragraphs.

Not covered: pages crafted to keep the parser busy, what scripts would show, styles that hide, texts of pictures, addresses of links, frames.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from selectolax.lexbor import LexborHTMLParser, LexborNode

from retrieval.read.base import Extract, Unreadable
from retrieval.read.clean import clean, literal, one_line, table
from retrieval.read.decode import decode


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


CHARSET = re.compile(rb"""(?:charset|encoding)\s*=\s*["']?\s*([A-Za-z0-9_.:-]{2,40})""", re.IGNORECASE)
HEAD = 4096
"""Bytes in which an encoding is declared."""
DEEPEST = 2000
"""Elements inside each other; parsing takes the square of it."""
MOST_ATTRIBUTES = 2000
"""Attributes of one element; parsing takes the square of it."""
LONG_TAG = re.compile(r"<[A-Za-z](?:[^\"'<>]|\"[^\"]*\"|'[^']*'){2000,}+")
QUOTED = re.compile(r"\"[^\"]*\"|'[^']*'")
TAG = re.compile(r"<(/?)([A-Za-z][A-Za-z0-9-]*)")
UNNESTED = _names(
    "area base br col embed hr img input link meta param source track wbr "
    "p li dt dd tr td th tbody thead tfoot option optgroup colgroup rp rt html head body"
)
"""Elements without content, or whose end may be left out."""
UNSEEN = "script, style, noscript, template, iframe, object, canvas, svg, video, audio, select, button, textarea, head"
FRAME = (
    "nav, footer, aside, [role=navigation], [role=banner], [role=contentinfo], [role=complementary], [role=search], "
    "[role=dialog], [role=alertdialog]"
)
FRAME_NAMES = re.compile(
    r"(?:^|[\s_-])(?:cookies?|consent|gdpr|breadcrumbs?|navbar|sidebar|pagination|skip-?(?:link|nav|to)\S*|newsletter)(?:$|[\s_-])",
    re.IGNORECASE,
)
INSIDE = frozenset(("article", "main", "section"))
"""Where a ``header`` belongs to what is said, not to the page."""
BLOCKS = _names(
    "address article aside blockquote body caption center dd details dialog dir div dl dt fieldset figcaption figure "
    "footer form h1 h2 h3 h4 h5 h6 header hr legend li main menu nav ol p pre section summary table tbody td tfoot th "
    "thead tr ul"
)
SPAN = 100
"""Columns or rows of one cell that are believed."""
REPEATED = 200
"""Characters of a cell that are repeated in each row it reaches."""


def read_html(data: bytes, boilerplate: bool) -> Extract:
    """Text and title of a page.

    Args:
        boilerplate: leave out what frames the page.

    Raises:
        Unreadable: not text, nested too deep, or with elements of very many attributes.
    """
    declared = CHARSET.search(data[:HEAD])
    markup, note = decode(data, declared.group(1).decode() if declared else "")
    if _depth(markup) > DEEPEST:
        raise Unreadable(f"its elements are nested more than {DEEPEST} deep; mend its markup")
    if any(len(QUOTED.sub("", tag).split()) > MOST_ATTRIBUTES for tag in LONG_TAG.findall(markup)):
        raise Unreadable(f"an element has more than {MOST_ATTRIBUTES} attributes; mend its markup")
    page = LexborHTMLParser(markup)
    notes = [note] if note else []
    name = page.css_first("title")
    named = one_line(name.text()) if name else ""
    first = page.css_first("h1")
    title = one_line(_inline(first)) if first else ""
    body = page.body
    if body is None:
        return Extract("", title or named, notes=notes)
    for node in body.css(UNSEEN):
        node.decompose()
    if boilerplate and (left := _unframe(body)):
        counts = ", ".join(f"{count} {tag}" if count > 1 else tag for tag, count in sorted(left.items()))
        notes.append(f"left out {left.total()} parts that frame the page ({counts})")
    text = clean(_Writer().write(_main(body) if boilerplate else body))
    return Extract(text, title or named, notes=notes)


def _depth(markup: str) -> int:
    """An upper bound of how deep elements are nested, without parsing."""
    depth = deepest = 0
    for end, tag in TAG.findall(markup):
        if tag.lower() not in UNNESTED:
            depth = max(depth + (-1 if end else 1), 0)
            deepest = max(deepest, depth)
    return deepest


def _unframe(body: LexborNode) -> Counter[str]:
    """Take what frames the page out of it; tag -> how many."""
    left: Counter[str] = Counter()
    framing = body.css(FRAME)
    framing += [node for node in body.css("header") if not any(each.tag in INSIDE for each in _above(node))]
    framing += [node for node in body.css("[class], [id]") if node.tag != "body" and FRAME_NAMES.search(_named(node))]
    whole = len(body.text())
    for node in framing:
        # What holds most of the page frames nothing, whatever it is called.
        if node.parent is not None and len(node.text()) * 2 <= whole:
            left[str(node.tag)] += 1
            node.decompose()
    return left


def _above(node: LexborNode) -> Iterator[LexborNode]:
    parent = node.parent
    while parent is not None:
        yield parent
        parent = parent.parent


def _named(node: LexborNode) -> str:
    return f"{node.attrs.sget('class')} {node.attrs.sget('id')}"


def _main(body: LexborNode) -> LexborNode:
    """The part that the page marks as its main one, if it is one and not a shred of the page."""
    marked = body.css("main, [role=main]") or body.css("article")
    if len(marked) == 1 and len(marked[0].text()) * 4 >= len(body.text()):
        return marked[0]
    return body


class _Writer:
    """Writes the blocks below a node, without recursion."""

    def __init__(self) -> None:
        self.blocks: list[tuple[int, str]] = []
        """(the list that it is an item of, 0 for none; text)"""
        self.words: list[str] = []
        self.lists: list[int | None] = []
        """For each list around: the number of its last item, None if items have none."""
        self.list = 0
        """Number of the outermost list, counted over the page."""
        self.mark = ""
        """What the next block begins with."""
        self.heading = False

    def write(self, root: LexborNode) -> str:
        """The text below `root`."""
        node = root.child
        while node is not None:
            if self._enter(node) and node.child is not None:
                node = node.child
                continue
            while node is not None and node.next is None:
                self._leave(node)
                node = node.parent
                if node is None or node.mem_id == root.mem_id:
                    self._end()
                    return self._joined()
            if node is not None:
                self._leave(node)
                node = node.next
        self._end()
        return self._joined()

    def _enter(self, node: LexborNode) -> bool:
        """Whether to go on below `node`."""
        tag = node.tag or ""
        if node.is_text_node:
            self.words.append(re.sub(r"\s+", " ", node.text_content or ""))
            return False
        if tag == "br":
            self.words.append(" " if self.heading else "\n")
            return False
        if tag not in BLOCKS:
            return True
        self._end()
        if tag == "pre":
            self._code(node)
            return False
        if tag == "table" and (rows := _rows(node)):
            caption = node.css_first("caption")
            self._block(one_line(_inline(caption)) if caption else "")
            self._block(table(rows))
            return False
        if tag in ("ul", "ol", "menu", "dir"):
            self.list += not self.lists
            self.lists.append(0 if tag == "ol" else None)
        elif tag == "li":
            self._item()
        elif len(tag) == 2 and tag[0] == "h" and tag[1].isdigit():
            self.heading = True
            self.mark = "#" * int(tag[1]) + " "
        return True

    def _leave(self, node: LexborNode) -> None:
        tag = node.tag or ""
        if tag not in BLOCKS:
            return
        self._end()
        if tag in ("ul", "ol", "menu", "dir") and self.lists:
            self.lists.pop()
        if tag == "li" or self.heading:
            self.mark = ""
            self.heading = False

    def _item(self) -> None:
        number = self.lists[-1] if self.lists else None
        if number is not None:
            self.lists[-1] = number = number + 1
        self.mark = "  " * (len(self.lists) - 1) + ("- " if number is None else f"{number}. ")

    def _end(self) -> None:
        """End the paragraph."""
        lines = [" ".join(line.split()) for line in "".join(self.words).split("\n")]
        self.words = []
        text = "\n".join(line for line in lines if line)
        if text:
            mark, self.mark = self.mark, ""
            item = self.list if mark and not self.heading else 0
            self.blocks.append((item, mark + (text if mark else literal(text))))

    def _block(self, text: str) -> None:
        if text:
            self.blocks.append((0, text))

    def _code(self, node: LexborNode) -> None:
        code = node.text().strip("\n")
        if code.strip():
            fence = "```" if "```" not in code else "~~~~"
            self._block(f"{fence}\n{code}\n{fence}")

    def _joined(self) -> str:
        parts: list[str] = []
        before = 0
        for item, text in self.blocks:
            parts += ["\n" if item and item == before else "\n\n" if parts else "", text]
            before = item
        return "".join(parts) + ("\n" if parts else "")


def _inline(node: LexborNode) -> str:
    """The text of `node` with spaces where a block or a line ends."""
    parts: list[str] = []
    for each in node.traverse(include_text=True):
        if each.is_text_node:
            parts.append(each.text_content or "")
        elif each.tag == "br" or each.tag in BLOCKS:
            parts.append(" ")
    return " ".join("".join(parts).split())


def _rows(node: LexborNode) -> list[list[str]]:
    """Cells of a table, those that span repeated in each row they reach; empty where a table only places things."""
    if node.css_first("table table, h1, h2, h3, h4, pre") is not None:
        return []
    rows: list[list[str]] = []
    reaching: dict[int, tuple[int, str]] = {}  # column -> (rows still to come, text)
    for row in node.css("tr"):
        cells: list[str] = []
        for each in _cells(row):
            while len(cells) in reaching:
                cells.append(_take(reaching, len(cells)))
            text = _inline(each)
            columns = _span(each, "colspan") if len(cells) < SPAN else 1
            down = _span(each, "rowspan") if len(text) <= REPEATED else 1
            for offset in range(columns):
                if down > 1:
                    reaching[len(cells)] = (down - 1, text if offset == 0 else "")
                cells.append(text if offset == 0 else "")
        while len(cells) in reaching:
            cells.append(_take(reaching, len(cells)))
        if cells:
            rows.append(cells)
    return rows if sum(len(row) > 1 for row in rows) > 1 else []


def _cells(row: LexborNode) -> Iterator[LexborNode]:
    each = row.child
    while each is not None:
        if each.tag in ("td", "th"):
            yield each
        each = each.next


def _take(reaching: dict[int, tuple[int, str]], column: int) -> str:
    more, text = reaching.pop(column)
    if more > 1:
        reaching[column] = (more - 1, text)
    return text


def _span(node: LexborNode, name: str) -> int:
    value = node.attrs.sget(name)
    return min(int(value), SPAN) if value.isascii() and value.isdigit() and int(value[:6]) > 0 else 1
