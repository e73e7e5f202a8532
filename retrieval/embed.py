"""Texts -> unit vectors, by a sentence-transformers model from a local directory.

Texts are sorted by length and batched by padded tokens, so that a batch of short texts is large and a batch of long
ones fits. What a chunk is embedded as is decided here (:func:`embedding_text`). Not covered: training an embedder.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol, cast

import numpy as np
import numpy.typing as npt

from cluster.config import EmbedderConfig
from retrieval.types import Chunk

Vectors = npt.NDArray[np.float32]
SHAPING_FILES = ("config.json", "modules.json", "tokenizer.json", "vocab.txt", "sentence_bert_config.json")


def embedding_text(chunk: Chunk) -> str:
    """What is embedded and indexed for BM25: title, heading path and text, so that headings can be searched for."""
    return "\n".join(part for part in (chunk.title, chunk.heading, chunk.text) if part)


class Embeds(Protocol):
    """What ingest and retrieval need of an embedder; :class:`Embedder` is it."""

    @property
    def fingerprint(self) -> str: ...
    @property
    def dimension(self) -> int: ...
    def count_tokens(self, text: str) -> int: ...
    def embed(self, texts: Sequence[str], *, query: bool = False) -> Vectors: ...


class Embedder:
    """One loaded model; load one per process. Thread-safe: a fast tokenizer is not, so one call runs at a time."""

    def __init__(self, directory: Path, config: EmbedderConfig) -> None:
        from sentence_transformers import SentenceTransformer

        self._model = SentenceTransformer(
            str(directory), trust_remote_code=config.trust_remote_code, local_files_only=True
        )
        own_limit = self._model.max_seq_length or config.max_tokens
        self._model.max_seq_length = min(own_limit, config.max_tokens)
        self._batch_tokens = config.batch_tokens
        self._lock = threading.RLock()
        self.fingerprint = _digest(directory)
        """Names the model by content, wherever it came from; a collection remembers whose vectors it holds."""

    @property
    def dimension(self) -> int:
        """Components of a vector."""
        return cast(int, self._model.get_embedding_dimension())

    def count_tokens(self, text: str) -> int:
        """Tokens of `text` without the special ones around it, and without the limit of the model."""
        with self._lock:
            return len(self._model.tokenizer.encode(text, add_special_tokens=False, verbose=False))

    def embed(self, texts: Sequence[str], *, query: bool = False) -> Vectors:
        """float32 ``[len(texts), dimension]``, L2-normalized, in the order of `texts`.

        Args:
            query: use the prompt that the model's own configuration has for queries, where it has one.
        """
        vectors = np.empty((len(texts), self.dimension), dtype=np.float32)
        encode = self._model.encode_query if query else self._model.encode_document
        with self._lock:
            for batch in self._batches(texts):
                vectors[batch] = encode(
                    [texts[index] for index in batch],
                    batch_size=len(batch),
                    normalize_embeddings=True,
                    show_progress_bar=False,
                )
        return vectors

    def _batches(self, texts: Sequence[str]) -> Iterator[list[int]]:
        limit = self._model.max_seq_length
        return batches([min(self.count_tokens(text) + 2, limit) for text in texts], self._batch_tokens)


def batches(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Indices of `lengths` in batches of at most `budget` padded tokens (count x longest), longest first.

    An item over the budget makes a batch of its own.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > budget:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _digest(directory: Path) -> str:
    """128 bits of SHA-256 over the files that decide what a vector is: weights, tokenizer, modules and their settings."""
    total = hashlib.sha256()
    for path in sorted(directory.rglob("*")):
        if path.suffix == ".safetensors" or path.name in SHAPING_FILES:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            total.update(f"{path.relative_to(directory).as_posix()} {digest}\n".encode())
    return total.hexdigest()[:32]
