"""Pairs -> the rows of a file: the four kinds in their shares, none that leaks, each with how the retriever finds it.

Where pairs come from is for ``extract`` (rules), ``template`` (patterns of the user) and ``endpoint`` (a model) to
say; what a row of each kind is, for ``compose``. This file decides which rows are kept. Nothing here trains: training
grounds the rows again, on the knowledge version of its day.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from cluster.errors import BadInput
from retrieval.types import Chunk
from training.data.compose import Kind, candidates
from training.data.grounded import Retrieve, holds
from training.data.leakage import leaks
from training.data.pairs import Pair, distinct, standing_alone
from training.data.rows import Row
from training.data.sentences import names

SAMPLE = 40
Progress = Callable[[int], None]
"""Told how many rows the retriever was asked about."""


@dataclass(frozen=True)
class Shares:
    """Shares of all rows; single rows are the rest."""

    none: float = 0.1
    two: float = 0.1
    multi: float = 0.1

    def __post_init__(self) -> None:
        for name in ("none", "two", "multi"):
            if not 0 <= getattr(self, name) <= 1:
                raise BadInput(
                    f"--{name} {getattr(self, name):g} is not a share; give a number from 0 to 1", param=name
                )
        if self.none + self.two + self.multi > 0.9:
            raise BadInput(
                "--none, --two and --multi leave less than a tenth for single rows; lower them", param="none"
            )


@dataclass
class Built:
    """The rows, and what became of those that were not kept."""

    rows: list[Row] = field(default_factory=list)
    checked: Counter[str] = field(default_factory=Counter)
    """Rows with evidence that the retriever was asked about, by kind."""
    findable: Counter[str] = field(default_factory=Counter)
    """Those of which it found every gold chunk among ``retrieval.candidates``."""
    shown: Counter[str] = field(default_factory=Counter)
    """Those of which every gold chunk would also stand in the prompt, among the best ``retrieval.top_k``."""
    wanted: dict[str, int] = field(default_factory=dict)
    """Rows of each kind but single that the shares ask for; there may be too few pairs for them."""
    leaked: int = 0
    """Rows that repeat a held-out question, or come close to one."""

    @property
    def kinds(self) -> Counter[str]:
        return Counter(row.kind for row in self.rows)


def allowed(live: Sequence[Chunk], heldout: Sequence[Row]) -> list[Chunk]:
    """The chunks of documents from which no question of `heldout` is answered."""
    kept_back = {document for row in heldout if row.answerable for document in row.documents}
    return [chunk for chunk in live if chunk.doc_id not in kept_back]


def build(
    pairs: Sequence[Pair],
    *,
    chunks: Sequence[Chunk],
    live: Sequence[Chunk],
    heldout: Sequence[Row],
    retrieve: Retrieve,
    shares: Shares,
    limit: int | None,
    seed: int,
    top_k: int,
    only_findable: bool,
    progress: Progress = lambda _: None,
) -> Built:
    """Rows from `pairs` without flaws, in an order that `seed` decides.

    Args:
        pairs: from `chunks`; those with an empty answer are questions that the documents do not answer.
        live: every chunk of the knowledge; an unanswerable question must find no answer in any of them.
        limit: rows at most; full questions come before gaps to fill. None keeps all.
        top_k: passages that a prompt shows.
        only_findable: drop rows of which the retriever misses a gold chunk; otherwise it is asked about the first
            :data:`SAMPLE` rows of each kind only, for the report.
    """
    answered = standing_alone(distinct(pair for pair in pairs if pair.answer), live)
    named = names(chunk.text for chunk in live)
    given = {pair.id: _unanswered(pair) for pair in pairs if not pair.answer}
    built = Built()
    gold = _GoldChunks(live)

    def take(kind: Kind, most: int | None) -> list[Row]:
        made = [*given.values()] if kind == "none" else []
        if most != 0:
            made += candidates(kind, answered, chunks=chunks, live=live, named=named, seed=seed)
        leaking = {leak.row_id for leak in leaks(made, heldout)} if heldout else set()
        built.leaked += len(leaking)
        kept: list[Row] = []
        for row in made:
            if len(kept) == most:
                break
            if row.id in leaking:
                continue
            if row.evidence and (only_findable or built.checked[kind] < SAMPLE):
                built.checked[kind] += 1
                found = [passage.chunk_id for passage in retrieve(row.conversation)]
                built.findable[kind] += (is_found := gold.among(row, set(found)))
                built.shown[kind] += gold.among(row, set(found[:top_k]))
                progress(built.checked.total())
                if only_findable and not is_found:
                    continue
            kept.append(row)
        return kept

    singles = take("single", None) if limit is None else []
    total = len(singles) / (1 - shares.none - shares.two - shares.multi) if limit is None else limit
    wanted: dict[Kind, int] = {
        "two": round(total * shares.two),
        "multi": round(total * shares.multi),
        "none": round(total * shares.none),
    }
    others = [row for kind, most in wanted.items() for row in take(kind, most)]
    if limit is not None:
        singles = take("single", limit - len(others))
    built.wanted = {str(kind): most for kind, most in wanted.items()}
    built.rows = [*singles, *others]
    random.Random(seed).shuffle(built.rows)
    return built


def _unanswered(pair: Pair) -> Row:
    turns = ({"role": "user", "content": pair.question}, {"role": "assistant", "content": ""})
    return Row.model_validate(
        {"id": f"none-{pair.id}", "kind": "none", "language": pair.language, "messages": turns, "evidence": ()}
    )


class _GoldChunks:
    """The chunks in which the quotes of a row stand."""

    def __init__(self, live: Sequence[Chunk]) -> None:
        self._of: dict[str, list[Chunk]] = {}
        for chunk in live:
            self._of.setdefault(chunk.doc_id, []).append(chunk)

    def among(self, row: Row, found: set[str]) -> bool:
        """Whether `found` holds, for every quote of `row`, a chunk in which it stands."""
        return all(
            any(chunk.chunk_id in found and holds(chunk.text, item.quote) for chunk in self._of[item.document])
            for item in row.evidence or ()
        )
