import re
from itertools import pairwise
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from retrieval.chunk import LONGEST, chunk
from retrieval.structure import outline
from retrieval.types import Chunk, Document


def words(text: str) -> int:
    return len(text.split())


def pieces(text: str) -> int:
    """A subword-like count: long words cost more than one token."""
    return sum(1 + len(word) // 6 for word in text.split())


def document(text: str) -> Document:
    return Document(doc_id="fares", title="Fares", text=text, source="fares.md")


def cut(text: str, tokens: int = 8, overlap: int = 0, count: Any = words) -> list[Chunk]:
    return chunk(document(text), chunk_tokens=tokens, overlap_tokens=overlap, count_tokens=count)


def test_headings_become_the_path_and_are_never_crossed() -> None:
    found = cut("# Fares\nowner\n## Fees\nfee\n### Trailers\ntrailer\n## Refunds ##\nrefund\n", tokens=100)
    assert [(c.heading, c.text) for c in found] == [
        ("", "owner"),
        ("Fees", "fee"),
        ("Fees > Trailers", "trailer"),
        ("Refunds", "refund"),
    ]
    assert [c.position for c in found] == [0, 1, 2, 3]


def test_hash_lines_inside_a_fence_are_text() -> None:
    [found] = cut("```\n# not a heading\n~~~\n```\n", tokens=100)
    assert "# not a heading" in found.text and found.heading == ""


def test_paragraphs_and_items_are_packed_whole() -> None:
    text = "one two three\n\nfour five six\n- seven eight\n- nine ten\n1. eleven"
    assert [c.text for c in cut(text)] == ["one two three\n\nfour five six", "- seven eight\n- nine ten\n1. eleven"]


def test_long_paragraph_is_cut_at_sentences_then_words_then_characters() -> None:
    assert [c.text for c in cut("One two three. Four five six. Seven eight nine.", tokens=6)] == [
        "One two three. Four five six.",
        "Seven eight nine.",
    ]
    assert [c.text for c in cut("a b c d e f g", tokens=3)] == ["a b c", "d e f", "g"]
    assert [c.text for c in cut("abcdefgh", tokens=3, count=len)] == ["abc", "def", "gh"]


def test_overlap_repeats_the_end_within_a_section_only() -> None:
    found = cut("a b c d e f g h i j\n# Other\nk", tokens=5, overlap=2)
    assert [c.text for c in found] == ["a b c", "b c d e f", "e f g h i", "h i j", "k"]


def test_ids_are_stable_unique_and_depend_on_the_content() -> None:
    text = "same\n# A\nsame\n# B\n" + "x y z w.\n\n" * 3
    first, second = cut(text, tokens=4), cut("new\n\n" + text, tokens=4)
    assert len({c.chunk_id for c in first}) == len(first) == 5
    assert {c.chunk_id for c in first if c.heading} < {c.chunk_id for c in second}
    other = chunk(Document("other", "Fares", text, "fares.md"), chunk_tokens=4, overlap_tokens=0, count_tokens=words)
    assert not {c.chunk_id for c in first} & {c.chunk_id for c in other}


def test_underlined_headings_are_headings() -> None:
    found = cut("Fares\n=====\nowner\n\nFees\n---\nfee\n\n- item\n---\n\nlong\nparagraph\n---\nend", tokens=100)
    assert [(c.heading, c.text) for c in found] == [
        ("", "owner"),
        ("Fees", "fee\n\n- item\n---\n\nlong\nparagraph\n---\nend"),
    ]


def test_a_line_without_end_is_no_heading() -> None:
    found = cut("# " + "word " * 2000, tokens=100)
    assert found[0].heading == "" and len(found) == 21


def test_code_is_kept_whole_if_it_fits_and_cut_at_lines_if_not() -> None:
    code = "```\na = 1.\n\n- b = 2\n\n| c = 3\n```"
    assert [c.text for c in cut(f"one two three four\n{code}\nfive", tokens=14)] == [
        "one two three four",
        f"{code}\nfive",
    ]
    lines = "\n".join(f"x = f({n}). y" for n in range(4))
    assert [c.text for c in cut(f"```\n{lines}\n```", tokens=9)] == [
        "```\nx = f(0). y\nx = f(1). y",
        "x = f(2). y\nx = f(3). y\n```",
    ]


TABLE = "Prices:\n\n| kind | price |\n|---|---|\n| car | 40 |\n| bus | 90 |\n| van | 50 |\n\nafter"


def test_chunks_inside_a_table_begin_with_the_names_of_its_columns() -> None:
    found = cut(TABLE, tokens=10, count=lambda text: len(re.findall(r"\w+|---", text)))
    names = "| kind | price |\n|---|---|\n"
    assert [c.text for c in found] == [
        f"Prices:\n\n{names}| car | 40 |\n| bus | 90 |",
        f"{names}| van | 50 |\n\nafter",
    ]
    assert TABLE[found[1].start : found[1].end] == "| van | 50 |\n\nafter"


def test_names_of_columns_stay_with_the_first_row() -> None:
    found = cut("a b c d e f g\n" + TABLE[9:], tokens=12, count=lambda text: len(re.findall(r"\w+|---", text)))
    assert [c.text.splitlines()[0] for c in found] == ["a b c d e f g", "| kind | price |"]


def test_names_that_would_fill_half_of_the_chunk_are_not_repeated() -> None:
    found = cut("| a b c | d e f |\n|---|---|\n| one | two |\n| three | four |\n", tokens=10)
    assert [c.text for c in found] == ["| a b c | d e f |\n|---|---|", "| one | two |\n| three | four |"]


def test_pages_and_offsets() -> None:
    text = "one two\n\nthree four\n\n# Fees\n\nfive six"
    pages = (0, text.index("four"), text.index("four"), text.index("# Fees"))
    paged = Document("fares", "Fares", text, "fares.pdf", pages=pages)
    found = chunk(paged, chunk_tokens=2, overlap_tokens=0, count_tokens=words)
    assert [(c.text, c.page) for c in found] == [("one two", 1), ("three four", 1), ("five six", 4)]
    assert [text[c.start : c.end] for c in found] == [c.text for c in found]
    assert {c.page for c in cut(text)} == {0}


def test_no_chunk_is_longer_than_a_row_holds() -> None:
    found = cut("x" * 50_000 + " " * 50_000 + "y", tokens=1000, count=words)
    assert max(len(c.text) for c in found) <= LONGEST and "".join(c.text for c in found) == "x" * 50_000 + "y"


def test_time_grows_with_the_length_even_of_one_endless_line() -> None:
    def asked(length: int, letter: str) -> int:
        counted = 0

        def count(text: str) -> int:
            nonlocal counted
            counted += len(text)
            return pieces(text)

        cut((letter * 3 + " " if letter != "-" else "-----") * length, tokens=50, overlap=10, count=count)
        return counted

    for letter in ("a", "-"):
        small, large = asked(1_000, letter), asked(20_000, letter)
        assert large < 25 * small and large < 20_000 * 5 * 12


lines = st.lists(
    st.one_of(
        st.sampled_from(
            [
                "",
                "## Fees",
                "# Fares",
                "- item one",
                "| a | b |",
                "|--|--|",
                "```",
                "~~~",
                "\t",
                "2. two. Three! 四。五",
                "===",
                "--",
            ]
        ),
        st.text(max_size=60).map(lambda text: re.sub(r"[\r\n]", " ", text)),
    ),
    max_size=25,
)


@given(lines=lines, tokens=st.integers(1, 20), overlap=st.integers(0, 3))
def test_no_text_is_lost_and_each_chunk_is_its_span(lines: list[str], tokens: int, overlap: int) -> None:
    text = "\n".join(lines)
    skeleton = outline(text)
    found = cut(text, tokens=tokens + overlap, overlap=overlap, count=pieces)
    left = text
    for each in reversed(found):
        assert text[each.start : each.end].strip() == text[each.start : each.end] != ""
        assert each.text.endswith(text[each.start : each.end])
        left = left[: each.start] + left[each.end :]
    for heading in skeleton.headings:
        left = left.replace(text[heading.start : heading.end].strip("\n"), "", 1)
    assert left.strip() == ""
    assert all(a.end <= b.start for a, b in pairwise(found))
    assert all(c.text == c.text.strip() != "" for c in found)
    assert len({c.chunk_id for c in found}) == len(found)
    if not overlap:
        assert all(pieces(c.text) <= tokens or c.end - c.start == 1 for c in found)
        tables = [(table.body, table.end) for table in skeleton.tables]
        for each in found:
            repeats = any(body <= each.start < end for body, end in tables)
            assert repeats or each.text == text[each.start : each.end]
