"""A knowledge for tests of its versions: documents in a directory, a registry in storage, embedders that need no model."""

from __future__ import annotations

import re
import threading
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from cluster.config import Config, IndexConfig, KnowledgeConfig, RetrievalConfig, StoreConfig
from cluster.knowledge import EmbedderState
from cluster.registry import Registry
from cluster.storage import Storage
from retrieval.embed import Vectors
from retrieval.embedded import serve
from retrieval.filters import And, Condition, live
from retrieval.ingest import IngestReport, apply, ingest
from retrieval.knowledge import collections
from retrieval.reindex import ReindexReport, reindex
from retrieval.retriever import Retriever
from retrieval.steps import Read
from retrieval.store import Store
from retrieval.types import Document, Passage, Principal, Snapshot

ALL = And(())


@contextmanager
def own_store(directory: Path) -> Iterator[Store]:
    """A store on an embedded Milvus of its own, which ends with it."""
    config = StoreConfig(data_dir=str(directory))
    with serve(config) as uri:
        store = Store(config, uri)
        yield store
        store.close()


class WordEmbedder:
    """Hash-of-words vectors: texts that share words are near. Counts what it embeds."""

    def __init__(self, dimension: int = 64, fingerprint: str = "words") -> None:
        self.dimension, self.fingerprint = dimension, fingerprint
        self.embedded = 0
        self._lock = threading.Lock()

    def count_tokens(self, text: str) -> int:
        return len(text.split())

    def embed(self, texts: Sequence[str], *, query: bool = False) -> Vectors:
        if not query:
            with self._lock:
                self.embedded += len(texts)
        vectors = np.full((len(texts), self.dimension), 1e-3, dtype=np.float32)
        for row, text in enumerate(texts):
            for word in re.findall(r"\w+", text.lower()):
                vectors[row, zlib.crc32(word.encode()) % self.dimension] += 1
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


class Killed(Exception):
    """Stands for SIGKILL at a call of the store."""


class KilledStore:
    """The store, for a process that dies at its `calls`-th write."""

    def __init__(self, store: Store, calls: int) -> None:
        self._store, self._calls = store, calls

    def __getattr__(self, name: str) -> Any:
        if name in ("upsert", "set_died", "delete", "drop"):
            self._calls -= 1
            if self._calls < 0:
                raise Killed
        return getattr(self._store, name)


class Shelf:
    """One knowledge: its documents, registry, embedder and store."""

    def __init__(self, store: Store, directory: Path, name: str) -> None:
        self.store, self.name = store, name
        self.documents = directory / "documents"
        self.documents.mkdir(parents=True, exist_ok=True)
        self.registry = Registry(Storage(str(directory / "storage")))
        self.embedder = WordEmbedder()
        self.others: dict[str, Any] = {}
        """Embedders of other fingerprints, for queries of versions that they made."""

    def config(self, **changes: Any) -> Config:
        store = StoreConfig(index=changes.pop("index", IndexConfig()))
        knowledge = {"name": self.name, "documents": str(self.documents), "chunk_tokens": 16} | changes
        return Config(knowledge=KnowledgeConfig(**knowledge), store=store)

    def write(self, documents: Mapping[str, str | None]) -> None:
        """Name -> text; None removes it."""
        for name, text in documents.items():
            file = self.documents / f"{name}.md"
            if text is None:
                file.unlink(missing_ok=True)
            else:
                file.write_text(text)

    def ingest(self, store: Any = None, **changes: Any) -> IngestReport:
        return ingest(self.config(**changes), store or self.store, self.embedder, self.registry)

    def upload(self, documents: Mapping[str, str], store: Any = None, **changes: Any) -> IngestReport:
        """These documents alone, as through the API."""
        made = [Document(name, name, text, name) for name, text in documents.items()]
        read = Read(made, len(made))
        return apply(
            self.config(**changes), read, store or self.store, self.embedder, self.registry, only=list(documents)
        )

    def reindex(self, embedder: Any = None, store: Any = None, **options: Any) -> ReindexReport:
        changes = {key: options.pop(key) for key in ("chunk_tokens", "tenant", "index") if key in options}
        return reindex(self.config(**changes), store or self.store, embedder or self.embedder, self.registry, **options)

    def embedders(self, state: EmbedderState) -> Any:
        return self.others.get(state.fingerprint, self.embedder)

    def snapshot(self, version: int | str = "head") -> Snapshot:
        return Snapshot.of(self.name, self.registry.knowledge_version(self.name, version))  # type: ignore[arg-type]

    def passages(self, query: str, version: int | str = "head", **changes: Any) -> list[Passage]:
        principal = Principal(changes.pop("tenant", "default"))
        settings = RetrievalConfig(**{"min_score": -1, "top_k": 20, "candidates": 50} | changes)
        retriever = Retriever(self.store, self.embedders)
        return list(retriever.retrieve(query, self.snapshot(version), principal=principal, settings=settings).passages)

    def find(self, query: str, version: int | str = "head", **changes: Any) -> list[str]:
        return [passage.text for passage in self.passages(query, version, **changes)]

    def texts(self, version: int | str = "head") -> dict[str, list[str]]:
        """Document (of another tenant: ``tenant/document``) -> its chunks' texts in order, as a version shows them."""
        shown = self.snapshot(version)
        found: dict[str, list[tuple[int, str]]] = {}
        for row in self.store.rows(shown.collection, live(shown.reads), ["doc_id", "tenant", "position", "text"]):
            name = row["doc_id"] if row["tenant"] == "default" else f"{row['tenant']}/{row['doc_id']}"
            found.setdefault(name, []).append((row["position"], row["text"]))
        return {doc: [text for _, text in sorted(rows)] for doc, rows in found.items()}

    def count(self, condition: Condition = ALL) -> int:
        """Rows in all collections of it that are there."""
        return sum(self.store.count(name, condition) for name in collections(self.registry, self.store, self.name))

    def close(self) -> None:
        self.store.unpoint(self.name)
        for name in collections(self.registry, self.store, self.name):
            self.store.drop(name)


def tiny_embedder(directory: Path, dimension: int, seed: int = 0) -> Path:
    """A sentence-transformers model of random weights in `directory`, of a few thousand parameters."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    torch.manual_seed(seed)
    base = directory / "base"
    base.mkdir(parents=True)
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)] + [str(digit) for digit in range(10)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters), ".", "#"]
    (base / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(vocab_file=str(base / "vocab.txt")).save_pretrained(base)
    shape = BertConfig(
        vocab_size=len(words), hidden_size=dimension, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=128,
    )  # fmt: skip
    BertModel(shape).save_pretrained(base)
    words_ = Transformer(str(base), max_seq_length=64)
    SentenceTransformer(modules=[words_, Pooling(words_.get_embedding_dimension())]).save_pretrained(
        str(directory / "model")
    )
    return directory / "model"
