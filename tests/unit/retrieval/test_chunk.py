import re
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from retrieval.chunk import HEADING, chunk
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


lines = st.lists(
    st.one_of(
        st.sampled_from(["", "## Fees", "# Fares", "- item one", "| a | b |", "```", "\t", "2. two. Three! 四。五"]),
        st.text(max_size=60).map(lambda text: re.sub(r"[\r\n]", " ", text)),
    ),
    max_size=25,
)


@given(lines=lines, tokens=st.integers(1, 20))
def test_no_text_is_lost_and_no_chunk_is_too_long(lines: list[str], tokens: int) -> None:
    text = "\n".join(lines)
    found = cut(text, tokens=tokens, count=pieces)
    assert all(c.text == c.text.strip() != "" for c in found)
    if "```" not in text:
        body = "".join(line for line in lines if not HEADING.match(line))
        assert "".join("".join(c.text.split()) for c in found) == "".join(body.split())
    assert all(pieces(c.text) <= tokens or len(c.text) == 1 for c in found)
    assert len({c.chunk_id for c in found}) == len(found)
