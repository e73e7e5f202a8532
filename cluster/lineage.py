"""What a document reached: the datasets, runs, adapters, models and releases that hold something of it.

Read from what the registry and the datasets beside it say of themselves. Doc ids are those of a knowledge; a dataset,
or a card without a knowledge, does not say which, so one that names the id counts: rather too much than too little.
Not covered: chunks and versions (``retrieval.forget``), and answers, which are not logged yet.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from cluster.registry import Registry
from cluster.release import Card


@dataclass(frozen=True)
class DatasetUse:
    """A dataset with text of the document in its rows."""

    digest: str
    rows: int | None
    """How many of its rows; None if its rows are not in this storage any more."""
    runs: tuple[str, ...]
    """Training runs on it."""


@dataclass(frozen=True)
class ReleaseUse:
    """A release that answers, or answered, from the document or from what was trained on it."""

    ref: str
    aliases: tuple[str, ...]
    through: tuple[str, ...]
    """``adapter lamps@3``, ``knowledge v7``, ``knowledge head``."""


@dataclass(frozen=True)
class Lineage:
    """Where a document went."""

    datasets: tuple[DatasetUse, ...]
    adapters: tuple[str, ...]
    """``name@version``; likewise the models."""
    models: tuple[str, ...]
    releases: tuple[ReleaseUse, ...]
    answers: None = None
    """Answers are not logged yet."""


def lineage(registry: Registry, knowledge: str, doc_id: str, versions: Collection[int]) -> Lineage:
    """Where document `doc_id` of `knowledge` went.

    Args:
        versions: those of the knowledge that have it.
    """
    adapters = [made for made in registry.adapters() if _learned(made.card, knowledge, doc_id)]
    models = [made for made in registry.models() if _learned(made.card, knowledge, doc_id)]
    rows = _stored(registry, doc_id)
    cards: list[Card] = [made.card for made in adapters]
    cards += [made.card for made in models]
    named = {card.dataset.digest: None for card in cards if card.dataset}
    runs = _runs(registry)
    datasets = tuple(
        DatasetUse(digest, rows.get(digest), tuple(sorted(runs.get(digest, ()))))
        for digest in sorted({**named, **rows})
    )
    digests = {made.digest: made.ref for made in adapters}
    releases = []
    for made in registry.releases():
        through = []
        if (adapter := made.release.adapter) is not None and adapter.digest in digests:
            through.append(f"adapter {digests[adapter.digest]}")
        if (ref := made.release.knowledge) is not None and ref.name == knowledge:
            if ref.version == "head" and versions:
                through.append("knowledge head")
            elif ref.version in versions:
                through.append(f"knowledge v{ref.version}")
        if through:
            releases.append(ReleaseUse(made.ref, made.aliases, tuple(through)))
    return Lineage(datasets, tuple(made.ref for made in adapters), tuple(made.ref for made in models), tuple(releases))


def _learned(card: Card, knowledge: str, doc_id: str) -> bool:
    ours = card.knowledge is None or card.knowledge.name == knowledge
    return ours and card.dataset is not None and doc_id in card.dataset.documents


def _stored(registry: Registry, doc_id: str) -> dict[str, int]:
    """Digest of each dataset in storage that has rows with the document, and how many."""
    found = {}
    for name in registry.storage.list("datasets"):
        if not name.endswith(".jsonl"):
            continue
        rows = 0
        for line in registry.storage.read(f"datasets/{name}").splitlines():
            row: dict[str, Any] = json.loads(line)
            rows += doc_id in row.get("documents", ())
        if rows:
            found[name.removesuffix(".jsonl")] = rows
    return found


def _runs(registry: Registry) -> dict[str, set[str]]:
    """Digest of a dataset -> the training runs on it."""
    found: dict[str, set[str]] = {}
    for name in registry.storage.list("runs"):
        for entry in registry.log(f"runs/{name}/attempts").entries():
            if digest := entry.data.get("dataset"):
                found.setdefault(digest, set()).add(name)
    return found
