"""What is done with the versions of a knowledge after they were made: go back, compare two, let rows go, end it all.

Each that writes is the one writer of the knowledge meanwhile, records in the registry what can no longer be searched
before rows go, and may be killed anywhere: the same call again finishes it. Not covered: making versions
(:mod:`retrieval.ingest`, :mod:`retrieval.reindex`) and taking a document out of all of them (:mod:`retrieval.forget`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from cluster.errors import BadInput, NotFound
from cluster.knowledge import KnowledgeVersion
from cluster.registry import Registry
from retrieval.filters import And, Compare, Condition, In, Not, Or, live
from retrieval.store import Row, Store, pages, physical

Kind = Literal["added", "changed", "removed"]


@dataclass(frozen=True)
class ChunkChange:
    """A chunk that differs between two versions."""

    chunk_id: str
    heading: str
    kind: Kind
    """``changed``: same words in the same place, with another title, source, position, groups or metadata."""


@dataclass(frozen=True)
class DocumentChange:
    """A document that differs between two versions."""

    doc_id: str
    tenant: str
    kind: Kind
    chunks: tuple[ChunkChange, ...]


@dataclass(frozen=True)
class Compaction:
    """What a compaction removed, or would remove."""

    kept: dict[int, str]
    """Version -> why it stays."""
    gone: tuple[int, ...]
    """Versions that can no longer be searched."""
    rows: int
    collections: tuple[str, ...]
    """Collections that no kept version is in; dropped whole."""


@dataclass(frozen=True)
class Dropped:
    """What the end of a knowledge removed, or would remove."""

    versions: int
    rows: int
    collections: tuple[str, ...]
    named_by: tuple[str, ...]
    """Pins and releases that name it."""


def rollback(registry: Registry, store: Store, name: str, number: int) -> KnowledgeVersion:
    """Make version `number` what `name` shows, as a new version; the head itself if that shows it already.

    Raises:
        NotFound: there is no such version, or its collection is gone.
        Mismatch: another process writes the knowledge.
    """
    with registry.knowledge_claim(name, "metier knowledge rollback") as claim:
        target, head = registry.knowledge_version(name, number), registry.knowledge_version(name)
        if (target.collection, target.reads) == (head.collection, head.reads):
            return head
        store.count(target.collection, live(target.reads))
        details = {key: target.details[key] for key in ("calibration",) if key in target.details}
        shown = target.model_dump(mode="json", exclude={"number", "created", "added", "updated", "removed", "details"})
        claim.check()
        made = registry.knowledge_append(name, shown | {"kind": "rollback", "details": details | {"to": number}})
        store.point(name, target.collection)
    return registry.knowledge_version(name, made)


def diff(registry: Registry, store: Store, name: str, before: int, after: int) -> list[DocumentChange]:
    """What version `after` has that `before` has not and the other way round, by document.

    Raises:
        NotFound: there is no such version.
    """
    one, other = registry.knowledge_version(name, before), registry.knowledge_version(name, after)
    old, new = _only_in(store, one, other), _only_in(store, other, one)
    same = {key for key in old.keys() & new.keys() if old[key]["digest"] == new[key]["digest"]}
    differing = (old.keys() | new.keys()) - same
    chunks: dict[tuple[str, str], list[ChunkChange]] = defaultdict(list)
    for key in sorted(differing, key=lambda key: _place(new.get(key) or old[key])):
        row = new.get(key) or old[key]
        kind: Kind = "changed" if key in old and key in new else "added" if key in new else "removed"
        chunks[(row["tenant"], row["doc_id"])].append(ChunkChange(row["chunk_id"], row["heading"], kind))
    documents = sorted({doc_id for _, doc_id in chunks})
    had, has = _documents(store, one, documents), _documents(store, other, documents)
    return [
        DocumentChange(doc_id, tenant, _kind((tenant, doc_id), had, has), tuple(changes))
        for (tenant, doc_id), changes in sorted(chunks.items())
    ]


def compact(registry: Registry, store: Store, name: str, keep: int, *, dry_run: bool = False) -> Compaction:
    """Remove the rows that no kept version shows: the newest `keep`, those pinned or named by a release, and the head.

    Raises:
        NotFound: the knowledge is empty.
        Mismatch: another process writes it.
    """
    if dry_run:
        return _compact(registry, store, name, keep, dry_run=True)
    with registry.knowledge_claim(name, "metier knowledge compact"):
        return _compact(registry, store, name, keep, dry_run=False)


def _compact(registry: Registry, store: Store, name: str, keep: int, *, dry_run: bool) -> Compaction:
    registry.knowledge_version(name)
    versions, reasons = registry.knowledge_versions(name), registry.knowledge_kept(name, keep)
    gone = tuple(version.number for version in versions if version.number not in reasons)
    shown: dict[str, set[int]] = defaultdict(set)
    for version in versions:
        if version.number in reasons:
            shown[version.collection].add(version.reads)
    building = registry.knowledge_build(name)
    spared = {*shown, *([building.collection] if building else [])}
    unused = [collection for collection in collections(registry, store, name) if collection not in spared]
    # What a killed ingest left for the next version is beyond every version, and saves work when that is made.
    made = Compare("born", "<", registry.knowledge_next(name))
    dead = {collection: And((made, Not(Or([live(r) for r in sorted(reads)])))) for collection, reads in shown.items()}
    rows = sum(store.count(collection, condition) for collection, condition in dead.items())
    rows += sum(store.count(collection, And(())) for collection in unused)
    if not dry_run:
        if gone:
            registry.knowledge_compacted(name, gone)
        for collection, condition in dead.items():
            store.delete(collection, condition)
        for collection in unused:
            store.drop(collection)
    return Compaction(reasons, gone, rows, tuple(unused))


def drop(registry: Registry, store: Store, name: str, *, force: bool = False, dry_run: bool = False) -> Dropped:
    """End `name`: no version can be searched any more, and its collections go. A later ingest begins it anew.

    Args:
        force: also if pins or releases name it, which then answer with a sentence instead of passages.

    Raises:
        NotFound: there is nothing of it.
        BadInput: pins or releases name it.
        Mismatch: another process writes it.
    """
    if dry_run:
        return _to_drop(registry, store, name)
    with (
        registry.knowledge_build_claim(name, "metier knowledge drop"),
        registry.knowledge_claim(name, "metier knowledge drop"),
    ):
        dropped = _to_drop(registry, store, name)
        if dropped.named_by and not force:
            raise BadInput(
                f"knowledge '{name}' is named by {', '.join(dropped.named_by)}; unpin it, or drop it with --force if "
                "those may answer without passages",
                param="name",
            )
        if (head := registry.knowledge_latest(name)) is not None:
            ended = head.model_dump(mode="json", exclude={"number", "created", "details"})
            registry.knowledge_append(name, ended | {"kind": "drop", "documents": 0, "chunks": 0})
        if building := registry.knowledge_build(name):
            registry.knowledge_build_end(name, building.collection, "aborted")
        store.unpoint(name)
        for collection in dropped.collections:
            store.drop(collection)
    return dropped


def collections(registry: Registry, store: Store, name: str) -> list[str]:
    """The collections of `name` that are in Milvus, also those that no version is in (any more, or yet)."""
    # Of a first ingest that was killed before its entry there is one without a version.
    names = [*registry.knowledge_collections(name), physical(name, registry.knowledge_next(name))]
    return [collection for collection in dict.fromkeys(names) if store.exists(collection)]


def _to_drop(registry: Registry, store: Store, name: str) -> Dropped:
    there = tuple(collections(registry, store, name))
    versions = registry.knowledge_versions(name)
    if not versions and not there:
        raise NotFound(f"there is no knowledge '{name}'; `metier knowledge list` shows what there is", param="name")
    pins = [f"pin {number} {label}".rstrip() for number, label in registry.knowledge_pins(name).items()]
    releases = [f"release {ref}" for refs in registry.knowledge_releases(name).values() for ref in refs]
    rows = sum(store.count(collection, And(())) for collection in there)
    return Dropped(len(versions), rows, there, tuple([*pins, *releases] if versions else []))


def _only_in(store: Store, one: KnowledgeVersion, other: KnowledgeVersion) -> dict[tuple[str, str], Row]:
    """Rows of `one` by tenant and chunk; if both are in one collection, only those that `other` does not show."""
    condition: Condition = live(one.reads)
    if one.collection == other.collection:
        condition = And((condition, Not(live(other.reads))))
    columns = ["chunk_id", "digest", "doc_id", "tenant", "heading", "position"]
    return {(row["tenant"], row["chunk_id"]): row for row in store.rows(one.collection, condition, columns)}


def _place(row: Row) -> tuple[str, str, int, str]:
    return row["tenant"], row["doc_id"], row["position"], row["chunk_id"]


def _documents(store: Store, version: KnowledgeVersion, names: Sequence[str]) -> set[tuple[str, str]]:
    """Which of the documents `names` the version has, with their tenants."""
    return {
        (row["tenant"], row["doc_id"])
        for page in pages(names)
        for row in store.rows(version.collection, And((In("doc_id", page), live(version.reads))), ["tenant", "doc_id"])
    }


def _kind(document: tuple[str, str], had: set[tuple[str, str]], has: set[tuple[str, str]]) -> Kind:
    return "changed" if document in had and document in has else "added" if document in has else "removed"
