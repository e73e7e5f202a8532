"""What a document reached, read from cards, datasets, runs and releases."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cluster.config import PromptConfig, RetrievalConfig
from cluster.lineage import DatasetUse, ReleaseUse, lineage
from cluster.registry import AdapterVersion, Registry
from cluster.release import AdapterCard, AdapterRef, BaseRef, DatasetRef, EmbedderRef, KnowledgeRef, Release
from cluster.storage import Storage

BASE = BaseRef(source="tiny:llama", dtype="float32", tokenizer="t", chat_template="c", architecture="a")


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(Storage(str(tmp_path / "storage")))


def adapter(
    registry: Registry, directory: Path, name: str, documents: list[str], knowledge: str | None
) -> AdapterVersion:
    directory = directory / name
    directory.mkdir()
    weights = {
        f"base_model.model.model.layers.0.self_attn.q_proj.lora_{side}.weight": torch.ones(shape)
        for side, shape in (("A", (2, 4)), ("B", (4, 2)))
    }
    save_file(weights, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    (directory / "adapter_config.json").write_text(json.dumps(config | {"bias": "none"}))
    card = AdapterCard(
        base=BASE, rank=2, alpha=4, target_modules=["q_proj"],
        dataset=DatasetRef(digest=f"of-{name}", rows=3, documents=documents),
        knowledge=KnowledgeRef(name=knowledge, version=1) if knowledge else None,
    )  # fmt: skip
    return registry.publish_adapter(name, directory, card)


def release(registry: Registry, name: str, made: AdapterVersion | None, knowledge: KnowledgeRef | None) -> None:
    ref = AdapterRef(name=made.name, version=made.version, digest=made.digest) if made else None
    registry.create_release(
        name,
        Release(
            base=BASE, adapter=ref, knowledge=knowledge, embedder=EmbedderRef(source="words"),
            prompt=PromptConfig(), retrieval=RetrievalConfig(),
        ),
    )  # fmt: skip


def test_a_document_is_followed_through_datasets_adapters_and_releases(registry: Registry, tmp_path: Path) -> None:
    lamps = adapter(registry, tmp_path, "lamps", ["alder", "birch"], "workshop")
    adapter(registry, tmp_path, "elsewhere", ["alder"], "another")
    free = adapter(registry, tmp_path, "free", ["alder"], None)
    adapter(registry, tmp_path, "dogs", ["dog"], "workshop")
    rows = [
        {"id": "1", "documents": ["alder"]},
        {"id": "2", "documents": ["birch"]},
        {"id": "3", "documents": ["alder"]},
    ]
    registry.storage.write("datasets/of-lamps.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    registry.storage.write("datasets/unpublished.jsonl", json.dumps(rows[0]).encode())
    registry.storage.write("datasets/of-dogs.jsonl", b'{"id": "1", "documents": ["dog"]}\n')
    registry.log("runs/lamps-1/attempts").append({"dataset": "of-lamps"})
    registry.log("runs/failed/attempts").append({"dataset": "unpublished"})
    release(registry, "shop", lamps, None)
    release(registry, "pinned", None, KnowledgeRef(name="workshop", version=3))
    release(registry, "older", None, KnowledgeRef(name="workshop", version=2))
    release(registry, "both", free, KnowledgeRef(name="workshop"))
    release(registry, "other", None, KnowledgeRef(name="another"))
    registry.promote("both", "both", "canary")

    found = lineage(registry, "workshop", "alder", versions=(3, 4))
    assert found.adapters == ("free@1", "lamps@1") and found.models == () and found.answers is None
    assert found.datasets == (
        DatasetUse("of-free", None, ()),
        DatasetUse("of-lamps", 2, ("lamps-1",)),
        DatasetUse("unpublished", 1, ("failed",)),
    )
    assert found.releases == (
        ReleaseUse("both@1", ("canary",), ("adapter free@1", "knowledge head")),
        ReleaseUse("pinned@1", (), ("knowledge v3",)),
        ReleaseUse("shop@1", (), ("adapter lamps@1",)),
    )


def test_what_reached_nothing_has_an_empty_lineage(registry: Registry) -> None:
    found = lineage(registry, "workshop", "alder", versions=())
    assert (found.datasets, found.adapters, found.models, found.releases) == ((), (), (), ())
