"""Question templates of a user: what a match gives, and what is wrong with a file by its line."""

from pathlib import Path

import pytest

from cluster.config import KnowledgeConfig
from cluster.errors import BadInput, NotFound
from retrieval.chunk import chunk as cut
from retrieval.read import read
from retrieval.types import Chunk
from training.data.pairs import flaw
from training.data.template import pairs, read_templates

ROOT = Path(__file__).parents[4]
PRICE = r"""templates:
  - pattern: '^(?P<subject>[^,]+?) costs (?P<price>\d+ euros)'
    question: How much must one pay for {subject}?
    answer: '{price}'
"""


def written(directory: Path, text: str) -> Path:
    file = directory / "t.yaml"
    file.write_text(text)
    return file


def chunk(text: str) -> Chunk:
    return Chunk("c1", "fees", "Fees", "", text, 0, "fees.md")


def test_a_match_is_a_pair_with_its_sentence_as_quote(tmp_path: Path) -> None:
    templates = read_templates(written(tmp_path, PRICE))
    (pair,) = pairs([chunk("Hello to the guests. A bed in the hut costs 40 euros, towels included.")], templates)
    assert (pair.question, pair.answer) == ("How much must one pay for a bed in the hut?", "40 euros")
    assert pair.quote == "A bed in the hut costs 40 euros, towels included."
    assert (pair.frame, pair.subject) == ("How much must one pay for {}?", "a bed in the hut")


def test_a_template_keeps_to_its_language_and_may_ask_what_nobody_answers(tmp_path: Path) -> None:
    text = PRICE.replace("    answer: '{price}'", "    kind: none").replace(
        "must one pay for", "did one pay in 1900 for"
    )
    (pair,) = pairs([chunk("A bed in the hut costs 40 euros.")], read_templates(written(tmp_path, text)))
    assert (pair.question, pair.answer) == ("How much did one pay in 1900 for a bed in the hut?", "")
    other = read_templates(written(tmp_path, PRICE + "    language: vi\n"))
    assert not list(pairs([chunk("A bed in the hut costs 40 euros.")], other))


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        (r"(?P<subject>", "(?P<subject", r"t.yaml:2: pattern: not a regular expression \("),
        ("for {subject}", "for {thing}", r"t.yaml:3: question: \{thing\} is not a named group of the pattern, which has: subject, price"),
        ("'{price}'", "'{prise}'", r"t.yaml:4: answer: \{prise\} is not a named group"),
        ("{subject}?", "{subject}", r"t.yaml:2: template: `question` must end with a question mark"),
        ("    answer: '{price}'\n", "", r"t.yaml:2: template: `answer` goes with every template but those of kind none"),
        ("answer:", "anwser:", r"t.yaml:4: anwser: is not a field of a template; known are pattern, question, answer"),
        ("templates:", "patterns:", r"t.yaml: expected one key, `templates:`, with a list"),
        ("'^(", "\"^(\\d", r"t.yaml:2: not valid YAML \(.*\); put patterns in single quotes"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_its_line(tmp_path: Path, old: str, new: str, sentence: str) -> None:
    assert old in PRICE
    with pytest.raises(BadInput, match=sentence):
        read_templates(written(tmp_path, PRICE.replace(old, new, 1)))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"no such file; name a YAML file of templates with --templates"):
        read_templates(tmp_path / "none.yaml")


def test_the_templates_of_the_sample_trade_are_all_of_use() -> None:
    templates = read_templates(ROOT / "examples/corvane/templates.yaml")
    documents, _ = read(KnowledgeConfig(documents=str(ROOT / "examples/corvane/documents")))
    chunks = [part for d in documents for part in cut(d, chunk_tokens=96, count_tokens=lambda text: len(text.split()))]
    for template in templates:
        assert any(flaw(pair) is None for pair in pairs(chunks, [template])), template.question
    assert sum(flaw(pair) is None for pair in pairs(chunks, templates)) >= 80
