"""The nouns of retrieval: what goes in (Document, Chunk), who asks (Principal), what comes out (Passage)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Document:
    """One file as text: Unicode NFC, ``\\n`` line ends."""

    doc_id: str
    """Stable name: the file name without its ending, or what the source says."""
    title: str
    text: str
    source: str
    """Path relative to the directory it was read from, or a URL."""
    metadata: dict[str, Any] = field(default_factory=dict)


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


@dataclass(frozen=True)
class Principal:
    """Who asks: rights are enforced inside the store from this, never after it."""

    tenant: str = "default"
    groups: tuple[str, ...] = ("everyone",)


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
    """What the final order is by; comparable within one answer only."""
    scores: dict[str, float] = field(default_factory=dict)
    """Score per stage that saw the chunk: ``dense`` (cosine), ``bm25``, ``rrf``."""


@dataclass(frozen=True)
class Retrieved:
    """The outcome of one retrieval."""

    passages: tuple[Passage, ...]
    """Best first; empty when nothing passed the floor."""
    knowledge: str
    """Collection name."""
    version: int
    """Knowledge version that was searched."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time per stage: ``embed``, ``search``."""
