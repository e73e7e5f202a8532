"""The quality of rows before any GPU is taken: what training would refuse (errors) and what it would learn badly (warnings).

Each check looks at all rows of all lists together and yields :class:`Finding`; :func:`check` runs them in order and
sums up. What a finding says of secrets and personal data is masked.

Not covered: whether quotes stand in their documents, which training checks against the live index, and whether an
answer is right.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from cluster.config import HUB, Config, Shape
from retrieval import duplicates
from training.data import language, lengths, sensitive, text_quality
from training.data.leakage import SAID, leaks
from training.data.load import scan
from training.data.problems import Problem
from training.data.rows import AnyRow, Row, Text, read_rows
from training.data.text_quality import contents

Update = Callable[[int, int | None, str], None]
Progress = Callable[[str], AbstractContextManager[Update]]
"""Name of a check -> while it runs, where it reports how far it is."""
MANY = 2000
"""Rows of which progress is shown."""
STEP = 200
"""Rows between two reports of progress."""
CODE = re.compile(r"\S*\d\S*")
"""A number, or a name with one in it."""


@dataclass(frozen=True)
class Finding(Problem):
    """A problem of one row, and what kind it is."""

    level: Literal["error", "warning"]
    """An error stops training; a warning does not."""
    kind: str
    """What such findings are counted under."""


class Placed(NamedTuple):
    """A row and where it came from."""

    list: str
    """``data.train``, ``data.validation`` or ``data.general``."""
    source: str
    place: str
    row: AnyRow


@dataclass
class Source:
    """What one source holds."""

    list: str
    source: str
    shape: Shape | None
    """None where no row of a known shape was found."""
    rows: int = 0
    turns: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    with_evidence: int = 0
    not_answerable: int = 0
    """Rows whose evidence is empty: the documents do not answer them."""
    without_documents: int = 0
    """Rows without the field `evidence`, learned as they stand."""
    ignored: tuple[str, ...] = ()
    """Fields that mean nothing to metier."""


@dataclass
class Report:
    """All there is to say; plain data, for ``--json``."""

    sources: list[Source]
    findings: list[Finding] = field(default_factory=list)
    forms: dict[str, int] = field(default_factory=dict)
    """Unicode form -> rows."""
    languages: dict[str, int] = field(default_factory=dict)
    """Language -> rows of it; ``not judged`` for those too short or not clear."""
    lengths: lengths.Summary | None = None
    lengths_note: str = ""
    """Why there are no lengths, or what they do not count."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Check -> how long it took."""

    @property
    def errors(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.level == "error"]


@dataclass(frozen=True)
class Checked:
    """The report, and the rows it is about."""

    report: Report
    rows: list[Placed]
    """Rows that could be read, in the order of the lists."""
    token_counts: list[int]
    """Tokens of each of them; empty where they could not be counted."""


def check(
    config: Config,
    lists: Mapping[str, Sequence[str]],
    tokenizer: Any | None,
    progress: Progress,
) -> Checked:
    """Read and check the sources of `lists` (``{"data.train": [...]}``).

    Args:
        tokenizer: that of the base, for token lengths; None leaves them out.

    Raises:
        NotFound, BadInput: a held-out file is missing or cannot be read.
    """
    report = Report([])
    began = time.perf_counter()
    rows = _read(config, lists, report)
    report.seconds["read"] = time.perf_counter() - began
    token_counts: list[int] = []

    def too_long(update: Update) -> Iterable[Finding]:
        if tokenizer and rows:
            token_counts.extend(lengths.count([item.row for item in rows], tokenizer, config.prompt, update))
            report.lengths = lengths.summarize(token_counts, config.training.max_tokens)
        return _too_long(rows, token_counts, config) if token_counts else ()

    checks: dict[str, Callable[[Update], Iterable[Finding]]] = {
        "token lengths": too_long,
        "leakage": lambda _: _leakage(rows, config),
        "text": lambda update: _text(rows, report.forms, update),
        "duplicates": lambda _: [*_copies(rows), *_conflicts(rows)],
        "near duplicates": lambda update: _near_copies(rows, update),
        "languages": lambda update: _languages(rows, report.languages, update),
        "secrets and personal data": lambda update: _sensitive(rows, update),
    }
    for name, run in checks.items():
        began = time.perf_counter()
        with progress(name) if len(rows) >= MANY else nullcontext(_unseen) as update:
            report.findings += run(update)
        report.seconds[name] = time.perf_counter() - began
    return Checked(report, rows, token_counts)


def summary(findings: Sequence[Finding]) -> list[tuple[str, str, int]]:
    """(level, kind, how many), errors before warnings, the most frequent first."""
    counts = Counter((finding.level, finding.kind) for finding in findings)
    return sorted(
        ((level, kind, n) for (level, kind), n in counts.items()), key=lambda entry: (entry[0], -entry[2], entry[1])
    )


# -- reading -----------------------------------------------------------------------------------------------------


def _read(config: Config, lists: Mapping[str, Sequence[str]], report: Report) -> list[Placed]:
    rows: list[Placed] = []
    for name, sources in lists.items():
        found = scan(config.data, sources, config.training.objective)
        about = [
            Source(name, source, found.shapes.get(source), ignored=found.ignored.get(source, ())) for source in sources
        ]
        position = 0
        for place, row in found.rows:
            # Rows come in the order of their sources.
            while not is_of(place, sources[position]):
                position += 1
            _count(about[position], row)
            rows.append(Placed(name, sources[position], place, row))
        report.sources += about
        report.findings += [_error(problem) for problem in found.problems]
    return rows


def is_of(place: str, source: str) -> bool:
    """Whether the row at `place` was read from `source`."""
    if source.startswith(HUB):
        repository, _, split = source.partition("#")
        return place.startswith(f"{repository.partition('@')[0]}#{split or 'train'} row ")
    return place == source or place.startswith((f"{source}:", f"{source.rstrip('/')}/"))


def _count(about: Source, row: AnyRow) -> None:
    about.rows += 1
    if isinstance(row, Row):
        about.turns += len(row.messages)
        about.kinds[row.kind] = about.kinds.get(row.kind, 0) + 1
        about.with_evidence += bool(row.evidence)
        about.not_answerable += not row.answerable
        about.without_documents += not row.grounded


def _error(problem: Problem) -> Finding:
    reason = re.sub(r"'[^']*'|\d+", "…", problem.reason.partition(" at ")[0].partition(" (")[0])
    place = "" if problem.field in ("row", "file", "source") else re.sub(r"\d+", "N", problem.field) + ": "
    kind = place + reason
    return Finding(problem.place, problem.field, problem.reason, problem.fix, "error", kind)


# -- errors ------------------------------------------------------------------------------------------------------


def _too_long(rows: Sequence[Placed], token_counts: Sequence[int], config: Config) -> Iterator[Finding]:
    limit, policy = config.training.max_tokens, config.training.too_long
    for item, tokens in zip(rows, token_counts, strict=True):
        if tokens <= limit or isinstance(item.row, Text) or item.list == "data.general":
            continue
        reason = f"has {tokens} tokens, more than training.max_tokens ({limit})"
        if policy == "refuse":
            fix = "shorten it, raise training.max_tokens, or set training.too_long to drop or truncate"
            yield Finding(item.place, "messages", reason, fix, "error", "longer than training.max_tokens")
        else:
            fix = f"training.too_long={policy} will {'leave it out' if policy == 'drop' else 'cut it'}"
            yield Finding(item.place, "messages", reason, fix, "warning", "longer than training.max_tokens")


def _leakage(rows: Sequence[Placed], config: Config) -> Iterator[Finding]:
    trained = [item for item in rows if item.list == "data.train"]
    if not config.data.heldout or not trained:
        return
    places = {item.row.id: item.place for item in trained}
    for leak in leaks([item.row for item in trained], read_rows(config.data.heldout)):
        reason = SAID[leak.reason].format(leak.heldout_id)
        fix = "take the row out, or set data.leakage=drop"
        level: Literal["error", "warning"] = "error" if config.data.leakage == "refuse" else "warning"
        yield Finding(places[leak.row_id], "row", reason, fix, level, f"leakage: {leak.reason}")


# -- warnings ----------------------------------------------------------------------------------------------------

FIXES: dict[text_quality.Kind, str] = {
    "mojibake": "repair it with --fix",
    "suspected mojibake": "look at it, and read the source again with its own encoding",
    "not NFC": "write it as NFC with --fix",
    "control characters": "remove them with --fix",
    "invisible characters": "remove them with --fix",
    "lost characters": "read the source again with its own encoding",
}


def _text(rows: Sequence[Placed], forms: dict[str, int], update: Update) -> Iterator[Finding]:
    for item in _watched(rows, update):
        row_forms = set()
        for name, text in contents(item.row):
            row_forms.add(text_quality.form(text))
            for flaw in text_quality.flaws(text):
                detail = _shown(flaw, text, item.row.language)
                yield _warning(item, name, f"{flaw.kind}: {detail}", FIXES[flaw.kind], flaw.kind)
        row_forms.discard("either")
        form = "mixed" if len(row_forms) > 1 else next(iter(row_forms), "either")
        forms[form] = forms.get(form, 0) + 1


def _shown(flaw: text_quality.Flaw, text: str, language: str) -> str:
    """The detail of `flaw`; where that shows a piece of the text, one in which sensitive parts are masked."""
    if flaw.kind != "mojibake":
        return flaw.detail
    masked = text_quality.flaws(sensitive.replace(text, language, masked=True))
    return next((other.detail for other in masked if other.kind == flaw.kind), "inside a masked part")


def _copies(rows: Sequence[Placed]) -> Iterator[Finding]:
    for first, later in duplicates.copies([said(item.row) for item in rows]):
        reason = f"says the same as {_other(rows[first], rows[later])}"
        yield _warning(rows[later], "row", reason, "leave one of them out, for example with --fix", "duplicate")


def _conflicts(rows: Sequence[Placed]) -> Iterator[Finding]:
    first: dict[str, tuple[Placed, str]] = {}
    for item in rows:
        if isinstance(item.row, Text):
            continue
        question = duplicates.normal("\n".join(f"{turn['role']} {turn['content']}" for turn in item.row.conversation))
        answer = duplicates.normal(item.row.reference) or item.row.reference.strip()
        other, given = first.setdefault(question, (item, answer))
        if given != answer:
            reason = f"the same question as {_other(other, item)} has another answer"
            yield _warning(item, "messages", reason, "keep the answer that is right", "conflicting answers")


def _near_copies(rows: Sequence[Placed], update: Update) -> Iterator[Finding]:
    texts = [said(item.row) for item in rows]
    codes = [set(CODE.findall(duplicates.normal(text))) for text in texts]
    for left, right, similarity in duplicates.near(texts, update=update):
        # Rows of one pattern about other numbers (rooms, dates, tariffs) are what a trade is made of.
        if similarity < 1 and codes[left] == codes[right]:
            reason = f"is nearly {_other(rows[left], rows[right])} (similarity {similarity:.2f})"
            yield _warning(rows[right], "row", reason, "keep the better one, if they mean the same", "near duplicate")


def _languages(rows: Sequence[Placed], found: dict[str, int], update: Update) -> Iterator[Finding]:
    for item in _watched(rows, update):
        known = language.identify("\n".join(text for _, text in contents(item.row)))
        found[known or "not judged"] = found.get(known or "not judged", 0) + 1
        if known and not language.agree(known, item.row.language):
            reason = f"says '{item.row.language}', but the text is '{known}'"
            yield _warning(item, "language", reason, f'write "language": "{known}"', "language")


def _sensitive(rows: Sequence[Placed], update: Update) -> Iterator[Finding]:
    for item in _watched(rows, update):
        for name, text in contents(item.row):
            for found in sensitive.find(text, item.row.language):
                reason = f"{found.kind}: {sensitive.mask(text[found.start : found.end])}"
                kind = f"secret: {found.kind}" if found.secret else f"personal data: {found.kind}"
                fix = "revoke it and take it out" if found.secret else "take it out"
                yield _warning(item, name, reason, f"{fix}, for example with --fix --scrub", kind)


def said(row: AnyRow) -> str:
    """All that is said in `row`, by which copies are told."""
    return "\n".join(text for _, text in contents(row))


def _warning(item: Placed, name: str, reason: str, fix: str, kind: str) -> Finding:
    return Finding(item.place, name, reason, fix, "warning", kind)


def _other(other: Placed, item: Placed) -> str:
    """How a finding about `item` names another row."""
    return other.place if other.list == item.list else f"{other.place} of {other.list}"


def _watched(rows: Sequence[Placed], update: Update) -> Iterator[Placed]:
    for done, item in enumerate(rows):
        if done % STEP == 0:
            update(done, len(rows), "")
        yield item
    update(len(rows), len(rows), "")


def _unseen(done: int, total: int | None, note: str) -> None:
    """Nobody watches."""
