"""Versions of a knowledge: what each is, where its rows are, and which rows of a collection it shows.

A version is an entry of an append-only log (:class:`cluster.registry.Log`), written last: an ingest is visible once
its entry is there. Every change of what is found is a version, so also a rollback (which shows the rows of an earlier
one) and a move to a collection with other vectors.

Beside it are logs of what does not change what is found: pins, compactions, collections being built, and documents
that were forgotten. What the entries of a log come to is worked out here.

Pure data. Not covered: keeping it (:mod:`cluster.registry`) and the rows themselves (``retrieval.store``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from pydantic import Field

from cluster.config import Section


class EmbedderState(Section):
    """The bi-encoder whose vectors a collection holds."""

    source: str
    revision: str | None = None
    max_tokens: int
    fingerprint: str
    """Digest of the model's files, wherever they came from."""
    dimension: int


class KnowledgeVersion(Section):
    """One version, as the registry keeps it."""

    number: int
    created: str
    """ISO 8601 UTC."""
    kind: Literal["ingest", "rollback", "reindex", "drop"] = "ingest"
    """`reindex` moved to another collection, `drop` ended the knowledge (a later ingest begins it anew)."""
    reads: int
    """Rows with ``born <= reads < died`` belong to it: its own number, or the one a rollback went back to."""
    collection: str
    """Milvus name of the physical collection that holds its rows."""
    embedder: EmbedderState
    chunk_tokens: int
    overlap_tokens: int
    tenant: str = "default"
    """Whose documents the version changed."""
    documents: int = 0
    """Documents read."""
    chunks: int = 0
    """Chunks that the tenant has in it."""
    added: int = 0
    updated: int = 0
    removed: int = 0
    details: dict[str, Any] = Field({})
    """What else the run reported."""


class Build(Section):
    """A collection that is filled beside the one that serves, until the knowledge moves to it."""

    number: int
    """The version that was next when it began. Rows it makes of documents are born in minus that: before every version,
    and apart from those of other builds and of ingests that go on meanwhile."""
    collection: str
    source: Literal["rows", "documents"]
    """What it is made of: the rows that serve, or for its own tenant the documents."""
    embedder: EmbedderState
    chunk_tokens: int
    overlap_tokens: int
    index: dict[str, Any]
    """Settings of its indexes: ``vector`` and ``bm25``."""
    began: str
    """ISO 8601 UTC."""


class Forgotten(Section):
    """A document that an ingest does not bring back."""

    doc_id: str
    tenant: str | None = None
    """Whose; None: of every tenant."""
    at: str
    """ISO 8601 UTC."""


def pins(entries: Iterable[Mapping[str, Any]]) -> dict[int, str]:
    """Pinned version -> its label, from the entries of a log of pins."""
    standing: dict[int, str] = {}
    for entry in entries:
        if entry["action"] == "pin":
            standing[entry["version"]] = entry["label"]
        else:
            standing.pop(entry["version"], None)
    return standing


def forgotten(entries: Iterable[Mapping[str, Any]]) -> list[Forgotten]:
    """The documents that stay away, in the order in which they were forgotten."""
    standing: dict[tuple[str, str | None], Forgotten] = {}
    for entry in entries:
        key = (entry["doc_id"], entry["tenant"])
        standing.pop(key, None)
        if entry["action"] == "forget":
            standing[key] = Forgotten(doc_id=key[0], tenant=key[1], at=entry["at"])
        elif key[1] is None:
            standing = {known: value for known, value in standing.items() if known[0] != key[0]}
    return list(standing.values())


def compacted(entries: Iterable[Mapping[str, Any]]) -> set[int]:
    """The versions whose rows were removed."""
    return {number for entry in entries for number in entry["gone"]}


def kept(
    versions: Sequence[KnowledgeVersion], *, keep: int, pinned: Mapping[int, str], released: Mapping[int, Sequence[str]]
) -> dict[int, str]:
    """Version -> why it is kept: ``head``, pinned, named by a release, or one of the newest `keep`.

    Args:
        versions: all that are there, oldest first.
    """
    reasons: dict[int, str] = {version.number: "newest" for version in versions[-keep:]}
    there = {version.number for version in versions}
    reasons |= {number: f"release {names[0]}" for number, names in released.items() if number in there}
    reasons |= {number: f"pin {label}".rstrip() for number, label in pinned.items() if number in there}
    if versions:
        head = versions[-1]
        if head.reads in there:
            reasons[head.reads] = "head reads it"
        reasons[head.number] = "head"
    return reasons
