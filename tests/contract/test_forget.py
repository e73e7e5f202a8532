"""A document is forgotten, against a real milvus-lite server: from every version at once, for good, and traced."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.config import PromptConfig, RetrievalConfig
from cluster.errors import Mismatch, NotFound
from cluster.release import BaseRef, EmbedderRef, KnowledgeRef, Release
from retrieval import knowledge
from retrieval.filters import Compare
from retrieval.forget import forget, undo
from retrieval.store import Store, physical
from retrieval.types import Principal
from tests.knowledge import Killed, KilledStore, Shelf, WordEmbedder, own_store

SECRET = Compare("doc_id", "==", "secret")
BASE = BaseRef(source="tiny:llama", dtype="float32", tokenizer="t", chat_template="c", architecture="a")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    with own_store(tmp_path_factory.mktemp("milvus")) as store:
        yield store


@pytest.fixture
def shelf(store: Store, tmp_path: Path) -> Iterator[Shelf]:
    """Version 1 without the document, 2 and 3 with it in two wordings, 4 in another collection."""
    shelf = Shelf(store, tmp_path, tmp_path.name.replace("_", "-")[:60])
    shelf.write({"fares": "# Fares\n\nA dog costs 3 crowns."})
    shelf.ingest()
    shelf.write({"secret": "# Vault\n\n## Door\n\nThe vault opens with 1234.\n\n## Lamp\n\nThe vault lamp is red."})
    shelf.ingest()
    shelf.write({"secret": "# Vault\n\n## Door\n\nThe vault opens with 9999.\n\n## Lamp\n\nThe vault lamp is red."})
    shelf.ingest()
    shelf.others["small"] = WordEmbedder(32, "small")
    shelf.reindex(shelf.others["small"])
    shelf.embedder, shelf.others["words"] = shelf.others["small"], shelf.embedder
    yield shelf
    shelf.close()


def test_it_is_gone_from_every_version_and_collection_at_once(shelf: Shelf) -> None:
    for version in (2, 3, 4):
        assert any("vault" in text for text in shelf.find("the vault opens", version))
    plan = forget(shelf.registry, shelf.store, shelf.name, "secret", dry_run=True)
    assert (plan.rows, plan.versions, len(plan.chunks)) == (5, (2, 3, 4), 3)
    assert plan.collections == (physical(shelf.name, 1), physical(shelf.name, 4))
    assert {chunk.heading for chunk in plan.chunks} == {"Door", "Lamp"}
    assert shelf.count(SECRET) == 5 and not shelf.registry.knowledge_forgotten(shelf.name)

    report = forget(shelf.registry, shelf.store, shelf.name, "secret")
    assert report == plan and report.reached.answers is None
    assert json.loads(json.dumps(report.to_dict()))["reached"]["answers"] is None
    assert shelf.count(SECRET) == 0
    for version in (1, 2, 3, 4):
        for mode in ("dense", "bm25"):
            assert set(shelf.find("the vault opens with 1234 9999 lamp dog", version, mode=mode)) == {
                "A dog costs 3 crowns."
            }


def test_it_does_not_come_back_until_that_is_undone(shelf: Shelf) -> None:
    forget(shelf.registry, shelf.store, shelf.name, "secret")
    embedded = shelf.embedder.embedded
    report = shelf.ingest()
    assert (report.version, report.documents, shelf.embedder.embedded) == (4, 1, embedded)
    [problem] = report.problems
    assert problem.source == "secret.md" and "`metier knowledge forget --undo`" in problem.reason
    again = forget(shelf.registry, shelf.store, shelf.name, "secret")
    assert (again.rows, again.versions) == (0, ()), "nothing is left of it"
    undo(shelf.registry, shelf.name, "secret")
    with pytest.raises(NotFound, match="was not forgotten"):
        undo(shelf.registry, shelf.name, "secret")
    assert shelf.ingest().version == 5
    assert shelf.find("the vault opens", mode="bm25", top_k=1) == ["The vault opens with 9999."]
    assert shelf.find("the vault opens", 3, mode="bm25", top_k=1) == []


def test_a_killed_forget_is_finished_by_the_next(shelf: Shelf) -> None:
    with pytest.raises(Killed):
        forget(shelf.registry, KilledStore(shelf.store, 1), shelf.name, "secret")  # type: ignore[arg-type]
    assert 0 < shelf.count(SECRET) < 5
    shelf.ingest()
    assert forget(shelf.registry, shelf.store, shelf.name, "secret").rows > 0
    assert shelf.count(SECRET) == 0
    [noted] = shelf.registry.knowledge_forgotten(shelf.name)
    assert (noted.doc_id, noted.tenant) == ("secret", None)


def test_nobody_forgets_what_they_may_not_read(shelf: Shelf) -> None:
    shelf.ingest(tenant="other", groups=("crew",))
    mine, theirs = shelf.count(Compare("tenant", "==", "default")), shelf.count(Compare("tenant", "==", "other"))
    for stranger in (Principal("nobody"), Principal("other", ("everyone",)), Principal("default", ())):
        with pytest.raises(NotFound, match="has no document 'secret'"):
            forget(shelf.registry, shelf.store, shelf.name, "secret", principal=stranger)
    assert shelf.count(Compare("tenant", "==", "other")) == theirs
    report = forget(shelf.registry, shelf.store, shelf.name, "secret", principal=Principal("other", ("crew",)))
    assert (report.tenant, report.rows) == ("other", 2)
    assert (shelf.count(Compare("tenant", "==", "default")), shelf.count(SECRET)) == (mine, 5)
    assert shelf.ingest().version == 5, "the other tenant's is another document"
    assert shelf.count(SECRET) == 5
    shelf.ingest(tenant="other", groups=("crew",))
    assert shelf.count(Compare("tenant", "==", "other")) == theirs - 2


def test_what_nobody_has_is_not_forgotten(shelf: Shelf) -> None:
    with pytest.raises(NotFound, match="has no document 'nothing'"):
        forget(shelf.registry, shelf.store, shelf.name, "nothing")
    assert not shelf.registry.knowledge_forgotten(shelf.name)
    with shelf.registry.knowledge_claim(shelf.name, "a test"), pytest.raises(Mismatch, match=r"\(a test\)"):
        forget(shelf.registry, shelf.store, shelf.name, "secret")


def test_the_report_names_releases_that_show_it(shelf: Shelf) -> None:
    for name, version in (("pinned", 2), ("before", 1), ("follows", "head")):
        made = Release(
            base=BASE,
            knowledge=KnowledgeRef(name=shelf.name, version=version),
            embedder=EmbedderRef(source="words"),
            prompt=PromptConfig(),
            retrieval=RetrievalConfig(),
        )
        shelf.registry.create_release(name, made)
    shelf.registry.promote("pinned", "pinned")
    report = forget(shelf.registry, shelf.store, shelf.name, "secret")
    assert [(use.ref, use.aliases, use.through) for use in report.reached.releases] == [
        ("follows@1", (), ("knowledge head",)),
        ("pinned@1", ("prod",), ("knowledge v2",)),
    ]
    assert knowledge.compact(shelf.registry, shelf.store, shelf.name, 1).kept == {
        1: "release before@1", 2: "release pinned@1", 4: "head",
    }  # fmt: skip


def test_a_document_of_a_first_ingest_that_was_killed_is_forgotten_too(store: Store, tmp_path: Path) -> None:
    shelf = Shelf(store, tmp_path, "killed-first")
    shelf.write({"secret": "The vault opens with 1234."})
    with pytest.raises(Killed):
        shelf.ingest(KilledStore(store, 3))
    assert shelf.count(SECRET) == 1
    assert forget(shelf.registry, store, shelf.name, "secret").rows == 1
    assert shelf.count(SECRET) == 0
    shelf.close()
