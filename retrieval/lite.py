"""What milvus-lite, the embedded server, does otherwise than a Milvus server; the rest of the room need not know.

| | milvus-lite 3.2 | Milvus 2.5 and later |
|---|---|---|
| BM25 score of a hit | negated | as it is |
| analyzers | ``standard``, and with the package jieba ``chinese`` | also ``english`` |
| vector indexes | AUTOINDEX, FLAT, HNSW, HNSW_SQ, IVF_FLAT, IVF_SQ8 | all of :data:`cluster.config.IndexType` |
| partitions, replicas, consistency | one process that sees what it wrote; partitions are always 16 | as asked for |
| rows written last | searched one by one in Python until they are flushed | in growing segments, which are fast |
| filters on arrays and on attributes | row by row in Python: 0.05 ms a row | compiled |
| ``count(*)`` and delete by filter | read whole rows, 0.2 ms each: done here in pages of ids, none longer than a timeout | at once |
| ``in`` on an attribute, ``filter_params`` | unknown | known |
| ``true`` and ``1`` of an attribute | equal | different |
| ``not (year < 2024)`` where ``year`` is text | does not find the row | finds it |
| a collection after a restart | not loaded | loaded |
| index parameters | read only inside ``params`` | also beside it, as pymilvus 3 sends them |
| users and tokens | none: loopback only | RBAC |

Filters are written so that the two agree (:mod:`retrieval.filters.conditions`), but for the two lines on attributes
above. Pure data and small functions; no Milvus here.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from cluster.config import StoreConfig
from cluster.errors import ConfigError

VERSION_PREFIX = "milvus_lite"
INDEXES = ("AUTOINDEX", "FLAT", "HNSW", "HNSW_SQ", "IVF_FLAT", "IVF_SQ8")
ANALYZERS: dict[str, dict[str, Any]] = {"standard": {"tokenizer": "standard"}, "chinese": {"tokenizer": "jieba"}}


def is_lite(version: str) -> bool:
    """Whether a server that gives `version` is milvus-lite."""
    return version.startswith(VERSION_PREFIX)


def check(config: StoreConfig) -> None:
    """Refuse settings that milvus-lite has nothing for.

    Raises:
        ConfigError: it names the setting.
    """
    if config.index.type not in INDEXES:
        raise ConfigError(
            f"store.index.type: the embedded Milvus does not offer {config.index.type}; take one of "
            f"{', '.join(INDEXES)}, or set store.uri to a Milvus server",
            param="store.index.type",
        )
    if config.bm25.analyzer not in ANALYZERS:
        raise ConfigError(
            f"store.bm25.analyzer: the embedded Milvus does not offer {config.bm25.analyzer}; take one of "
            f"{', '.join(ANALYZERS)}, or set store.uri to a Milvus server",
            param="store.bm25.analyzer",
        )
    if config.bm25.analyzer == "chinese" and find_spec("jieba") is None:
        raise ConfigError(
            "store.bm25.analyzer: the embedded Milvus needs a package for chinese; `pip install jieba`, or set "
            "store.uri to a Milvus server",
            param="store.bm25.analyzer",
        )
    if config.replicas > 1:
        raise ConfigError(
            f"store.replicas: the embedded Milvus has one, not {config.replicas}; set it to 1, or store.uri to a "
            "Milvus server",
            param="store.replicas",
        )


def bm25_score(distance: float) -> float:
    """The BM25 score of a hit, never below 0, whichever sign the server gave it."""
    return abs(distance)
