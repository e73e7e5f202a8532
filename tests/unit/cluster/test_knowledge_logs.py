"""What is kept beside the versions of a knowledge: pins, compactions, builds, tombstones; on a real directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.config import PromptConfig, RetrievalConfig
from cluster.errors import BadInput, Mismatch, NotFound
from cluster.knowledge import KnowledgeVersion, kept
from cluster.registry import Registry
from cluster.release import BaseRef, EmbedderRef, KnowledgeRef, Release
from cluster.storage import Storage

EMBEDDER = {"source": "words", "max_tokens": 64, "fingerprint": "f", "dimension": 8}
ENTRY: dict[str, Any] = {"collection": "k_a_v1", "embedder": EMBEDDER, "chunk_tokens": 16, "overlap_tokens": 0}


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(Storage(str(tmp_path)))


def fill(registry: Registry, count: int) -> None:
    for _ in range(count):
        registry.knowledge_append("a", ENTRY)


def numbers(registry: Registry) -> list[int]:
    return [version.number for version in registry.knowledge_versions("a")]


def test_pins_are_labelled_and_lifted(registry: Registry) -> None:
    fill(registry, 3)
    assert registry.knowledge_pin("a", 2, "audit").number == 2
    registry.knowledge_pin("a", 2, "audit 2026")
    registry.knowledge_pin("a", 3)
    assert registry.knowledge_pins("a") == {2: "audit 2026", 3: ""}
    registry.knowledge_unpin("a", 2)
    assert registry.knowledge_pins("a") == {3: ""}
    with pytest.raises(NotFound, match="version 2 of knowledge 'a' is not pinned"):
        registry.knowledge_unpin("a", 2)
    with pytest.raises(NotFound, match="has no version 9"):
        registry.knowledge_pin("a", 9)
    with pytest.raises(BadInput):
        registry.knowledge_pins("../a")


def test_a_compacted_version_is_refused_in_a_sentence(registry: Registry) -> None:
    fill(registry, 4)
    registry.knowledge_compacted("a", [3, 1])
    assert numbers(registry) == [2, 4]
    assert [version.number for version in registry.knowledge_history("a")] == [1, 2, 3, 4]
    assert registry.knowledge_version("a", 2).number == 2 and registry.knowledge_version("a").number == 4
    with pytest.raises(NotFound, match="version 3 of knowledge 'a' was compacted: its rows are gone"):
        registry.knowledge_version("a", 3)


def test_versions_are_kept_for_a_reason(registry: Registry) -> None:
    fill(registry, 6)
    registry.knowledge_append("a", ENTRY | {"kind": "rollback", "reads": 4})
    registry.knowledge_pin("a", 1, "audit")
    base = BaseRef(source="tiny:llama", dtype="float32", tokenizer="t", chat_template="c", architecture="a")
    for version in (2, "head", 9):
        registry.create_release(
            "shop",
            Release(
                base=base, knowledge=KnowledgeRef(name="a", version=version), embedder=EmbedderRef(source="words"),
                prompt=PromptConfig(), retrieval=RetrievalConfig(),
            ),
        )  # fmt: skip
    assert registry.knowledge_releases("a") == {2: ["shop@1"], "head": ["shop@2"], 9: ["shop@3"]}
    assert registry.knowledge_kept("a", 2) == {
        1: "pin audit", 2: "release shop@1", 4: "head reads it", 6: "newest", 7: "head",
    }  # fmt: skip
    assert kept([], keep=3, pinned={1: ""}, released={}) == {}
    [only] = registry.knowledge_versions("a")[:1]
    assert kept([only], keep=5, pinned={1: "x"}, released={}) == {1: "head"}


def test_a_dropped_knowledge_begins_anew_with_the_next_number(registry: Registry) -> None:
    fill(registry, 2)
    registry.knowledge_append("a", ENTRY | {"kind": "drop"})
    assert numbers(registry) == [] and registry.knowledge_head("a") == 0 and registry.knowledge_names() == []
    registry.knowledge_append("a", ENTRY | {"collection": "k_a_v4"})
    assert numbers(registry) == [4] and registry.knowledge_names() == ["a"]
    assert registry.knowledge_collections("a") == ["k_a_v1", "k_a_v4"]
    assert isinstance(registry.knowledge_version("a"), KnowledgeVersion)


def test_a_build_stands_until_it_is_ended(registry: Registry) -> None:
    fields = ENTRY | {"number": 3, "collection": "k_a_v3", "source": "rows", "index": {"vector": {}, "bm25": {}}}
    assert registry.knowledge_build("a") is None
    build = registry.knowledge_build_begin("a", fields)
    assert (build.collection, build.embedder.dimension) == ("k_a_v3", 8)
    assert registry.knowledge_build("a") == build
    assert registry.knowledge_collections("a") == ["k_a_v3"]
    registry.knowledge_build_end("a", "k_a_v3", "aborted")
    assert registry.knowledge_build("a") is None


def test_what_is_forgotten_stays_away_for_whom_it_was_forgotten(registry: Registry) -> None:
    registry.knowledge_forget("a", "door", None)
    registry.knowledge_forget("a", "lamp", "acme")
    registry.knowledge_forget("a", "lamp", "blue")
    assert [(f.doc_id, f.tenant) for f in registry.knowledge_forgotten("a")] == [
        ("door", None), ("lamp", "acme"), ("lamp", "blue"),
    ]  # fmt: skip
    registry.knowledge_unforget("a", "lamp", "acme")
    with pytest.raises(NotFound, match="document 'door' of tenant acme of knowledge 'a' was not forgotten"):
        registry.knowledge_unforget("a", "door", "acme")
    assert [(f.doc_id, f.tenant) for f in registry.knowledge_forgotten("a")] == [("door", None), ("lamp", "blue")]
    registry.knowledge_unforget("a", "lamp", None)
    registry.knowledge_unforget("a", "door", None)
    assert registry.knowledge_forgotten("a") == []


def test_writer_and_builder_do_not_keep_each_other_out(registry: Registry) -> None:
    with registry.knowledge_claim("a", "an ingest"), registry.knowledge_build_claim("a", "a move") as building:
        with pytest.raises(Mismatch, match=r"knowledge 'a' is being written by this process .*\(an ingest\)"):
            registry.knowledge_claim("a", "another").__enter__()
        building.check()
    with registry.knowledge_claim("a", "another"), registry.knowledge_claim("b", "another knowledge"):
        pass
