"""Take a document out of every version of a knowledge at once, and say where it went.

A note in the registry keeps it from coming back with the next ingest; then its rows go from every collection, also one
that is being filled. Killed in between, the same call again finishes it. What was trained on it is named, not undone:
that is for those who read the report. Not covered: the file it came from, and answers that quoted it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cluster.errors import NotFound, Unavailable
from cluster.lineage import Lineage, lineage
from cluster.registry import Registry
from retrieval.filters import And, Compare, Condition, rights
from retrieval.ingest import forgotten_in
from retrieval.knowledge import collections
from retrieval.store import Row, Store
from retrieval.types import Principal


@dataclass(frozen=True)
class ForgottenChunk:
    """A piece of the document, in one tenant."""

    chunk_id: str
    tenant: str
    heading: str


@dataclass(frozen=True)
class ForgetReport:
    """What was removed, or would be, and what the document reached."""

    knowledge: str
    doc_id: str
    tenant: str | None
    """Whose document; None: that of every tenant."""
    rows: int
    chunks: tuple[ForgottenChunk, ...]
    versions: tuple[int, ...]
    """Versions that had it."""
    collections: tuple[str, ...]
    reached: Lineage

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def forget(
    registry: Registry,
    store: Store,
    name: str,
    doc_id: str,
    *,
    tenant: str | None = None,
    principal: Principal | None = None,
    dry_run: bool = False,
) -> ForgetReport:
    """Remove document `doc_id` from every version of `name`, and keep it from coming back.

    Args:
        tenant: whose; None: of every tenant.
        principal: on whose behalf; then only a document of its tenant that it may read.
        dry_run: only report.

    Raises:
        NotFound: the knowledge has no such document, or `principal` may not read it.
        Mismatch: another process writes the knowledge.
        Unavailable: Milvus still shows a row of it; the same call again goes on.
    """
    tenant = principal.tenant if principal else tenant
    if dry_run:
        return _report(registry, store, name, doc_id, tenant, principal)
    with registry.knowledge_claim(name, "metier knowledge forget"):
        report = _report(registry, store, name, doc_id, tenant, principal)
        if doc_id not in forgotten_in(registry, name, tenant):
            registry.knowledge_forget(name, doc_id, tenant)
        condition = _of(doc_id, tenant)
        for collection in report.collections:
            store.delete(collection, condition)
        left = [collection for collection in report.collections if store.count(collection, condition)]
    if left:
        raise Unavailable(f"Milvus still shows rows of document '{doc_id}' in {', '.join(left)}; forget it again")
    return report


def undo(registry: Registry, name: str, doc_id: str, *, tenant: str | None = None) -> None:
    """Let `doc_id` come back with the next ingest.

    Raises:
        NotFound: it was not forgotten.
    """
    registry.knowledge_unforget(name, doc_id, tenant)


def _report(
    registry: Registry, store: Store, name: str, doc_id: str, tenant: str | None, principal: Principal | None
) -> ForgetReport:
    there = tuple(collections(registry, store, name))
    found: dict[str, Sequence[Row]] = {
        collection: list(store.rows(collection, _of(doc_id, tenant), ["chunk_id", "tenant", "heading", "born", "died"]))
        for collection in there
    }
    versions = tuple(
        version.number
        for version in registry.knowledge_versions(name)
        if any(row["born"] <= version.reads < row["died"] for row in found.get(version.collection, ()))
    )
    reached = lineage(registry, name, doc_id, versions)
    rows = [row for of in found.values() for row in of]
    if principal is not None:
        readable = And((rights(principal), Compare("doc_id", "==", doc_id)))
        known = any(store.count(collection, readable) for collection in there)
    else:
        known = bool(rows or reached.datasets or doc_id in forgotten_in(registry, name, tenant))
    if not known:
        raise NotFound(f"knowledge '{name}' has no document '{doc_id}'", param="doc_id")
    chunks = dict.fromkeys(ForgottenChunk(row["chunk_id"], row["tenant"], row["heading"]) for row in rows)
    return ForgetReport(name, doc_id, tenant, len(rows), tuple(chunks), versions, there, reached)


def _of(doc_id: str, tenant: str | None) -> Condition:
    document = Compare("doc_id", "==", doc_id)
    return document if tenant is None else And((Compare("tenant", "==", tenant), document))
