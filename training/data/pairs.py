"""A question with its answer and the words of one chunk it stands in: what every builder makes, and when it is any good.

:func:`flaw` is the one judge, of rules and of models alike. It reads words, not meaning: a fluent question whose
answer is the wrong number of the right sentence passes.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from retrieval.types import Chunk
from training.data.grounded import holds
from training.data.rows import Evidence
from training.data.sentences import content, lower_first

LONGEST_ANSWER = 25
"""Words."""
QUESTION_WORDS = range(4, 46)
SAME_QUESTION = 3
"""Documents of which one and the same question is kept (``what is given as owner?``)."""
POINTS_AT_TEXT = re.compile(
    r"\b(?:this|the|above|given|following) (?:passage|text|excerpt|paragraph|context|snippet|sentence above)\b"
    r"|\b(?:đoạn văn|đoạn trích|văn bản trên|đoạn trên)\b",
    re.IGNORECASE,
)
ASKING = content("how often long far what time each every any bao nhiêu lâu mấy giờ")
NAMED = re.compile(r"\b(?:[A-Z]|\d)")
WORDS = re.compile(r"\w+")
NUMBER = re.compile(r"\d[\d.,:]*\d|\d")


@dataclass(frozen=True)
class Pair:
    """One question, answered by one chunk."""

    question: str
    """As it is asked of somebody who already knows which document is meant; it ends with a question mark."""
    answer: str
    quote: str
    chunk: Chunk
    language: str
    frame: str = ""
    """The question with ``{}`` for its subject, where a rule knows what that is."""
    subject: str = ""
    cloze: bool = False
    """A sentence with a gap: always asked with its document."""
    alone: bool = False
    """The question can be asked without saying which document is meant."""

    @property
    def id(self) -> str:
        """Hash of document, question and quote."""
        return hashlib.sha256("\0".join((self.chunk.doc_id, self.question, self.quote)).encode()).hexdigest()[:12]

    @property
    def evidence(self) -> Evidence:
        return Evidence(document=self.chunk.doc_id, quote=self.quote)


def flaw(pair: Pair, *, longest_answer: int = LONGEST_ANSWER) -> str | None:
    """Why `pair` is not used, in a few words that can be counted; None if it is."""
    words = pair.question.split()
    if not pair.question.endswith("?"):
        return "not a question"
    if len(words) not in QUESTION_WORDS:
        return "question too short or too long"
    if POINTS_AT_TEXT.search(pair.question):
        return "question points at the passage"
    if not pair.answer.strip() or len(pair.answer.split()) > longest_answer:
        return "answer empty or too long"
    if not pair.quote.strip() or not holds(pair.chunk.text, pair.quote):
        return "quote is not in the passage"
    if not _supported(pair.answer, pair.quote):
        return "answer is not in the quote"
    if _given_away(pair):
        return "question gives the answer away"
    if not pair.cloze and _copied(pair):
        return "question copies the quote"
    return None


def _supported(answer: str, quote: str) -> bool:
    """Every number of the answer stands in the quote, and four in five of its words do."""
    said = content(quote)
    words = content(answer)
    if not set(NUMBER.findall(answer)) <= set(NUMBER.findall(quote)):
        return False
    return answer.casefold() in quote.casefold() or (bool(words) and len(words & said) >= 0.8 * len(words))


def _given_away(pair: Pair) -> bool:
    answer, question = (" ".join(WORDS.findall(text.casefold())) for text in (pair.answer, pair.question))
    return f" {answer} " in f" {question} "


def _copied(pair: Pair) -> bool:
    """A long run of the quote, answer included, stands in the question as it is."""
    question, quote = pair.question.casefold().split(), pair.quote.casefold().split()
    runs = {tuple(quote[at : at + 12]) for at in range(len(quote) - 11)}
    return any(tuple(question[at : at + 12]) in runs for at in range(len(question) - 11)) and pair.language != "vi"


def distinct(pairs: Iterable[Pair]) -> list[Pair]:
    """`pairs` without questions that one document answers twice, and few of those that many documents answer."""
    asked: dict[str, dict[str, list[Pair]]] = defaultdict(lambda: defaultdict(list))
    for pair in pairs:
        asked[pair.question.casefold()][pair.chunk.doc_id].append(pair)
    kept: list[Pair] = []
    for documents in asked.values():
        clear = [found[0] for found in documents.values() if len({pair.answer for pair in found}) == 1]
        kept += clear[:SAME_QUESTION]
    return kept


def standing_alone(pairs: Sequence[Pair], live: Sequence[Chunk]) -> list[Pair]:
    """`pairs` with :attr:`Pair.alone` set where what the question says of its chunk is met in no other chunk.

    It must share four words with the chunk if a name or number is among them, else five. A cloze is never alone.
    """
    together = meeting(live)
    result = []
    for pair in pairs:
        words = (content(pair.question) - ASKING) & content(pair.chunk.text)
        enough = len(words) >= (4 if NAMED.search(pair.question, 1) else 5)
        alone = enough and not pair.cloze and together(words) == {pair.chunk.chunk_id}
        result.append(replace(pair, alone=alone))
    return result


def meeting(live: Sequence[Chunk]) -> Callable[[set[str]], set[str]]:
    """A function from words (:func:`content`) to the ids of the chunks that hold them all, title and heading counted."""
    holders: dict[str, set[str]] = defaultdict(set)
    for chunk in live:
        for word in content(f"{chunk.title} {chunk.heading} {chunk.text}"):
            holders[word].add(chunk.chunk_id)

    def together(words: set[str]) -> set[str]:
        found = [holders.get(word, set()) for word in words]
        return set.intersection(*found) if found else set()

    return together


def asked(pair: Pair, named: set[str]) -> str:
    """The question as a user would put it: with the document it is about, unless it can do without."""
    if pair.alone:
        return pair.question[:1].upper() + pair.question[1:]
    place = f'"{pair.chunk.title}"'
    if pair.chunk.heading and (len(content(pair.question)) < 4):
        place += f" ({pair.chunk.heading})"
    opening = f"Theo {place}" if pair.language == "vi" else f"According to {place}"
    return f"{opening}, {lower_first(pair.question, named)}"


def count_flaws(pairs: Iterable[Pair], rejected: Counter[str], *, longest_answer: int = LONGEST_ANSWER) -> list[Pair]:
    """The pairs without a flaw; the others are counted in `rejected` by reason."""
    kept = []
    for pair in pairs:
        if reason := flaw(pair, longest_answer=longest_answer):
            rejected[reason] += 1
        else:
            kept.append(pair)
    return kept
