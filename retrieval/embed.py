"""Texts -> unit vectors, by a sentence-transformers model from a local directory.

All texts of a call are tokenized at once and batched by padded tokens, longest first, so that a batch of short texts is
large and a batch of long ones fits. On a CPU the batches are small, to stay in its caches, and each core takes one of
its own instead of sharing one with the others, which would wait for each other after every operation.

Documents run in bfloat16 where that is faster (``embedder.dtype: auto``); their vectors stay within a cosine of 0.999 of
those in float32 and compare with them, so the fingerprint does not name the precision. Questions run in float32: one
costs little, and its vector should not depend on which others it was batched with.

What a chunk is embedded as is decided here (:func:`embedding_text`). Not covered: training an embedder; models that are
no transformer with a fast tokenizer (static embeddings, bags of words); several GPUs in one process.
"""

from __future__ import annotations

import copy
import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import numpy as np
import numpy.typing as npt

from cluster.config import EmbedderConfig
from cluster.models import LOADING
from retrieval.chunk import CountTokens

Vectors = npt.NDArray[np.float32]
SHAPING_FILES = ("config.json", "modules.json", "tokenizer.json", "vocab.txt", "sentence_bert_config.json")
CPU_BATCH_TOKENS = 1024
"""Padded tokens of a batch on a CPU at most: larger ones fall out of its caches (4,096 cost 15 % here)."""
RAGGED = {"text": {"padding": False}, "common": {"return_tensors": None}}


def embedding_text(title: str, heading: str, text: str) -> str:
    """What of a chunk is embedded and indexed for BM25: also title and heading path, so that they can be searched for."""
    return "\n".join(part for part in (title, heading, text) if part)


class Embeds(Protocol):
    """What ingest and retrieval need of an embedder; :class:`Embedder` is it."""

    @property
    def fingerprint(self) -> str: ...
    @property
    def dimension(self) -> int: ...
    def count_tokens(self, text: str) -> int: ...
    def embed(self, texts: Sequence[str], *, query: bool = False) -> Vectors: ...


class Embedder:
    """One loaded model; load one per process. Thread-safe."""

    def __init__(self, directory: Path, config: EmbedderConfig, *, threads: int = 0) -> None:
        """`threads`: cores it computes on, on a CPU; 0 takes what torch would."""
        import torch
        from sentence_transformers import SentenceTransformer
        from transformers import DataCollatorWithPadding

        cuda = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
        self._device = torch.device("cuda" if cuda else "cpu")
        with LOADING:
            self._model = SentenceTransformer(
                str(directory),
                device=self._device.type,
                trust_remote_code=config.trust_remote_code,
                local_files_only=True,
                model_kwargs={"dtype": torch.bfloat16 if config.dtype == "bfloat16" else torch.float32},
            ).eval()
        own_limit = self._model.max_seq_length or config.max_tokens
        self._model.max_seq_length = min(own_limit, config.max_tokens)
        self._fast = config.dtype == "auto" and (cuda or _multiplies_bfloat16())
        self._batch_tokens = config.batch_tokens if cuda else min(config.batch_tokens, CPU_BATCH_TOKENS)
        self._threads = threads or torch.get_num_threads()
        self._pad = DataCollatorWithPadding(self._model.tokenizer)
        self._lock = threading.Lock()
        """Held while tokenizing: the settings of a call are kept in the tokenizer."""
        self.count_tokens = _counter(self._model.tokenizer)
        """Tokens of a text without the special ones around it, and without the limit of the model."""
        self.fingerprint = _digest(directory)
        """Names the model by content, wherever it came from; a collection remembers whose vectors it holds."""

    @property
    def dimension(self) -> int:
        """Components of a vector."""
        return cast(int, self._model.get_embedding_dimension())

    def embed(self, texts: Sequence[str], *, query: bool = False) -> Vectors:
        """float32 ``[len(texts), dimension]``, L2-normalized, in the order of `texts`.

        Args:
            query: they are questions: in float32, and with the prompt that the model's own configuration has for them.
        """
        vectors = np.empty((len(texts), self.dimension), dtype=np.float32)
        if not texts:
            return vectors
        task: Literal["query", "document"] = "query" if query else "document"
        prompt = self._model.prompts.get(task)
        with self._lock:
            encoded = dict(
                self._model.preprocess(list(texts), prompt=prompt, task=task, processing_kwargs=RAGGED).items()
            )
        order = list(batches([len(ids) for ids in encoded["input_ids"]], self._batch_tokens))

        def forward(batch: Sequence[int]) -> Vectors:
            return self._forward(self._padded(encoded, batch), task)

        if self._device.type == "cuda" or len(order) == 1:
            for batch in order:
                vectors[batch] = forward(batch)
        else:
            self._spread(forward, order, vectors)
        return vectors

    def _spread(
        self, forward: Callable[[Sequence[int]], Vectors], order: Sequence[list[int]], vectors: Vectors
    ) -> None:
        """One batch on each core at a time."""
        import torch

        pool = ThreadPoolExecutor(self._threads, "metier-embed", initializer=torch.set_num_threads, initargs=(1,))
        try:
            for batch, found in zip(order, pool.map(forward, order), strict=True):
                vectors[batch] = found
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(self._threads)  # the number of later threads is that of the last call

    def _padded(self, encoded: Mapping[str, Any], batch: Sequence[int]) -> dict[str, Any]:
        """The features of `batch`, as tensors; what is not per text is the same for all."""
        per_text = [name for name, values in encoded.items() if isinstance(values, list)]
        shared = {name: value for name, value in encoded.items() if name not in per_text}
        return shared | dict(self._pad([{name: encoded[name][index] for name in per_text} for index in batch]))

    def _forward(self, features: Mapping[str, Any], task: str) -> Vectors:
        import torch
        from sentence_transformers.util import batch_to_device

        fast = self._fast and task == "document"
        with torch.inference_mode(), torch.autocast(self._device.type, torch.bfloat16, enabled=fast):
            found = self._model(batch_to_device(dict(features), self._device), task=task)["sentence_embedding"]
            return cast(Vectors, torch.nn.functional.normalize(found.float(), dim=1).cpu().numpy())


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


def token_counter(directory: Path, config: EmbedderConfig) -> CountTokens:
    """What :attr:`Embedder.count_tokens` of the same model counts, without its weights: for who only cuts."""
    from transformers import AutoTokenizer

    return _counter(
        AutoTokenizer.from_pretrained(directory, trust_remote_code=config.trust_remote_code, local_files_only=True)
    )


def _counter(tokenizer: Any) -> CountTokens:
    own = copy.deepcopy(tokenizer.backend_tokenizer)  # the other one may be told to cut, in the middle of a count
    own.no_truncation()
    own.no_padding()
    return lambda text: len(own.encode(text, add_special_tokens=False))


def _multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for bfloat16 products; without them float32 is faster."""
    import torch

    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def _digest(directory: Path) -> str:
    """128 bits of SHA-256 over the files that decide what a vector is: weights, tokenizer, modules and their settings."""
    total = hashlib.sha256()
    for path in sorted(directory.rglob("*")):
        if path.suffix == ".safetensors" or path.name in SHAPING_FILES:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            total.update(f"{path.relative_to(directory).as_posix()} {digest}\n".encode())
    return total.hexdigest()[:32]
