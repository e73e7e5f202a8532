"""Question and passage read together by a cross-encoder, which orders the best candidates anew.

A sentence-transformers cross-encoder from a local directory: a BERT-like model with one output, or whatever its
``modules.json`` says. Pairs are batched by padded tokens, as texts are in :mod:`retrieval.embed`. Not covered: models
with an output for each class, and training one.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from cluster.config import Config, RerankerConfig
from cluster.errors import BadInput
from cluster.models import LOADING, resolve
from retrieval.embed import batches, embedding_text
from retrieval.types import Passage

Scores = npt.NDArray[np.float32]
PAIR_TOKENS = 3
"""Special tokens around a pair."""
CHARACTERS_A_TOKEN = 32
"""Far above what words have; text beyond that many for each token a model reads is cut before it is tokenized."""
HEAD = "ForSequenceClassification"
MODULES = "modules.json"


class Reranks(Protocol):
    """What retrieval needs of a cross-encoder; :class:`Reranker` is it."""

    def scores(self, query: str, texts: Sequence[str]) -> Scores: ...


class Reranker:
    """One loaded cross-encoder; load one per process. Thread-safe: one call runs at a time."""

    def __init__(self, directory: Path, config: RerankerConfig) -> None:
        """Load it.

        Raises:
            BadInput: the model in `directory` is no cross-encoder.
        """
        _check_head(directory, config.source)
        from sentence_transformers import CrossEncoder

        with LOADING:
            self._model = CrossEncoder(
                str(directory), trust_remote_code=config.trust_remote_code, local_files_only=True
            )
        if self._model.num_labels != 1:
            raise BadInput(
                f"{config.source} gives {self._model.num_labels} scores for a pair; a reranker gives one, so choose another",
                param="reranker.source",
            )
        own_limit = self._model.max_seq_length or config.max_tokens
        self._limit = self._model.max_seq_length = min(own_limit, config.max_tokens)
        self._batch_tokens = config.batch_tokens
        self._lock = threading.Lock()

    def scores(self, query: str, texts: Sequence[str]) -> Scores:
        """float32 ``[len(texts)]`` in [0, 1], the sigmoid of what the model says: how well each text answers `query`."""
        from torch.nn import Sigmoid

        longest = CHARACTERS_A_TOKEN * self._limit
        query, texts = query[:longest], [text[:longest] for text in texts]
        found = np.empty(len(texts), dtype=np.float32)
        with self._lock:
            for batch in batches(self._lengths(query, texts), self._batch_tokens):
                pairs = [(query, texts[index]) for index in batch]
                found[batch] = self._model.predict(
                    pairs, batch_size=len(batch), activation_fn=Sigmoid(), show_progress_bar=False
                )
        return found

    def _lengths(self, query: str, texts: Sequence[str]) -> list[int]:
        if not texts:
            return []
        first, *others = self._model.tokenizer([query, *texts], add_special_tokens=False, verbose=False)["input_ids"]
        return [min(len(first) + len(other) + PAIR_TOKENS, self._limit) for other in others]


def load_reranker(config: Config) -> Reranker | None:
    """The cross-encoder that `config` names, if it names one; fetched on this node.

    Raises:
        BadInput, NotFound, Unavailable: it is no cross-encoder, not there, or its source cannot be reached.
    """
    if config.reranker is None:
        return None
    return Reranker(resolve(config.reranker, config.models_cache), config.reranker)


def rerank(query: str, passages: Sequence[Passage], reranker: Reranks) -> list[Passage]:
    """`passages` by what `reranker` says of each, best first; equal ones keep their order.

    It reads what was embedded: a chunk often means nothing without its title and heading.
    """
    texts = [embedding_text(passage.title, passage.heading, passage.text) for passage in passages]
    read = reranker.scores(query, texts).tolist()
    scored = [
        replace(passage, score=score, scores=passage.scores | {"rerank": score})
        for passage, score in zip(passages, read, strict=True)
    ]
    return sorted(scored, key=lambda passage: -passage.score)


def _check_head(directory: Path, source: str) -> None:
    if (directory / MODULES).exists():
        kinds = [module["type"] for module in json.loads((directory / MODULES).read_text(encoding="utf-8"))]
        if not any(kind.endswith((".Pooling", ".Normalize")) for kind in kinds):
            return
    else:
        architectures = json.loads((directory / "config.json").read_text(encoding="utf-8")).get("architectures") or []
        if any(name.endswith(HEAD) for name in architectures):
            return
    raise BadInput(
        f"{source} is not a cross-encoder (it has no head that scores a pair); choose a reranker, or set retrieval.rerank=0",
        param="reranker.source",
    )
