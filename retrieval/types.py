"""The nouns of retrieval: what goes in (Document, Chunk), who asks (Principal), what comes out (Passage)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cluster.knowledge import EmbedderState, KnowledgeVersion


@dataclass(frozen=True)
class Document:
    """One file as text: Unicode NFC, ``\\n`` line ends."""

    doc_id: str
    """Stable name: the file name without its ending, or what the source says (``knowledge.document_ids``)."""
    title: str
    text: str
    source: str
    """Path relative to the directory it was read from, or a URL."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """Attributes of the source; plain JSON values."""
    groups: tuple[str, ...] | None = None
    """Groups that may read it; None: those of the knowledge."""
    pages: tuple[int, ...] = ()
    """Offsets in `text` at which its pages begin, first page first; empty where the source has none."""


@dataclass(frozen=True)
class Chunk:
    """A piece of a document that is embedded and found as a whole."""

    chunk_id: str
    """Content hash over (doc_id, heading path, text): the same words in the same place keep their id."""
    doc_id: str
    title: str
    heading: str
    """Heading path inside the document, ``"Fees > Trailers"``; empty before the first heading."""
    text: str
    position: int
    """0-based order within the document."""
    source: str
    metadata: dict[str, Any] = field(default_factory=dict)
    page: int = 0
    """Page it begins on, from 1; 0 where the source has no pages."""
    start: int = 0
    end: int = 0
    """Characters of the document's text that it stands for, end exclusive; an overlap before it is not counted."""


@dataclass(frozen=True)
class Principal:
    """Who asks: rights are enforced inside the store from this, never after it."""

    tenant: str = "default"
    groups: tuple[str, ...] = ("everyone",)


@dataclass(frozen=True)
class Snapshot:
    """One version of a knowledge, as far as searching it needs: where its rows are and which of them count."""

    knowledge: str
    version: int
    """The number that answers state."""
    reads: int
    """Rows with ``born <= reads < died`` belong to it: itself, or for a version made by rollback the one it went back to."""
    collection: str
    """Milvus name of the physical collection."""
    embedder: EmbedderState
    """The model its vectors are of."""
    calibration: dict[str, Any] | None = None
    """How far dense and BM25 are to be trusted here (:mod:`retrieval.calibrate`); None where nobody has measured it."""

    @classmethod
    def of(cls, knowledge: str, version: KnowledgeVersion) -> Snapshot:
        """The snapshot that `version` of `knowledge` is."""
        calibration = version.details.get("calibration")
        return cls(knowledge, version.number, version.reads, version.collection, version.embedder, calibration)


@dataclass(frozen=True)
class Passage:
    """A chunk that was found, with how it was found. Plain data: it travels between replicas and into responses."""

    chunk_id: str
    doc_id: str
    title: str
    heading: str
    text: str
    source: str
    position: int
    score: float
    """What the order is by (but for diversity, which takes it up and goes on); docs/retrieval.md says what it means."""
    scores: dict[str, float] = field(default_factory=dict)
    """Score per stage that saw the chunk: ``dense`` (cosine), ``bm25``, ``fused``, ``queries``, ``rerank``, ``mmr``."""
    page: int = 0
    """Page it begins on, from 1; 0 where the source has no pages."""
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Retrieved:
    """The outcome of one retrieval."""

    passages: tuple[Passage, ...]
    """Best first; empty when nothing passed the floor."""
    knowledge: str
    version: int
    """Knowledge version that was searched."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time per stage: ``embed``, ``search``, ``fuse``, ``rerank``, ``diversity``, ``neighbours``."""
