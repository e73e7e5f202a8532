"""What a collection is made of: columns, indexes, and the settings it remembers it was made with.

Not covered: creating it (:mod:`retrieval.store`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pymilvus import CollectionSchema, DataType, Function, FunctionType, MilvusClient
from pymilvus.milvus_client.index import IndexParams

from cluster.config import IndexConfig, IndexType, StoreConfig
from cluster.errors import BadInput, ConfigError
from retrieval import lite

SCHEMA = "3"
"""Raise it when columns change: collections made before must be built anew."""
EMBEDDER_PROPERTY = "metier.embedder"
SCHEMA_PROPERTY = "metier.schema"
SETTINGS_PROPERTY = "metier.settings"
MAX_BYTES = 65_535
"""Longest VARCHAR, and JSON, of Milvus."""
MAX_GROUPS = 256
COLUMNS = {"row_id": 128, "chunk_id": 64, "doc_id": 1024, "title": MAX_BYTES, "heading": MAX_BYTES, "text": MAX_BYTES}
COLUMNS |= {"source": 4096, "tenant": 64, "digest": 64, "vector_key": 64}
"""VARCHAR columns and their longest value in bytes."""
NUMBERS = ("position", "page", "start", "end", "born", "died")
STORED = (*COLUMNS, "search_text", "groups", *NUMBERS, "metadata", "dense")
"""Every column that rows bring; ``readers`` and ``sparse`` are made from them."""
PASSAGE = ("chunk_id", "doc_id", "title", "heading", "text", "source", "position", "page", "metadata")
READER_BYTES = 34
"""Of one group in ``readers``."""

Parameters = dict[str, int | float | str]
HNSW: Parameters = {"M": 16, "efConstruction": 200}
BUILD: dict[IndexType, Parameters] = {
    "HNSW": HNSW,
    "HNSW_SQ": HNSW | {"sq_type": "SQ8"},
    "IVF_FLAT": {"nlist": 128},
    "IVF_SQ8": {"nlist": 128},
    "IVF_PQ": {"nlist": 128, "m": 8, "nbits": 8},
    "SCANN": {"nlist": 128},
    "GPU_CAGRA": {"intermediate_graph_degree": 64, "graph_degree": 32},
    "GPU_IVF_FLAT": {"nlist": 128},
    "GPU_IVF_PQ": {"nlist": 128, "m": 8, "nbits": 8},
}
"""How an index is built where ``store.index.build`` does not say otherwise; types that are absent take nothing."""
MORE_BUILD: dict[IndexType, tuple[str, ...]] = {
    "HNSW_SQ": ("refine", "refine_type"),
    "SCANN": ("with_raw_data",),
    "DISKANN": ("max_degree", "search_list_size", "pq_code_budget_gb_ratio", "search_cache_budget_gb_ratio"),
    "GPU_CAGRA": ("build_algo", "cache_dataset_on_device", "adapt_for_cpu"),
    "GPU_IVF_FLAT": ("cache_dataset_on_device",),
    "GPU_IVF_PQ": ("cache_dataset_on_device",),
}
SEARCH: dict[IndexType, tuple[str, ...]] = {
    "AUTOINDEX": ("level",),
    "HNSW": ("ef",),
    "HNSW_SQ": ("ef", "refine_k"),
    "IVF_FLAT": ("nprobe",),
    "IVF_SQ8": ("nprobe",),
    "IVF_PQ": ("nprobe",),
    "SCANN": ("nprobe", "reorder_k"),
    "DISKANN": ("search_list",),
    "GPU_CAGRA": ("itopk_size", "search_width", "min_iterations", "max_iterations", "team_size", "ef"),
    "GPU_IVF_FLAT": ("nprobe",),
    "GPU_IVF_PQ": ("nprobe",),
}
BEAMS = ("ef", "search_list", "itopk_size", "reorder_k")
"""Milvus refuses a search in which one of these is under the number of hits."""
ANALYZERS = {"standard": {"type": "standard"}, "english": {"type": "english"}, "chinese": {"type": "chinese"}}


def schema(config: StoreConfig, dimension: int, *, embedded: bool) -> CollectionSchema:
    """The columns; vectors have `dimension` floats."""
    made = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False)
    for name, max_bytes in COLUMNS.items():
        made.add_field(
            name,
            DataType.VARCHAR,
            max_length=max_bytes,
            is_primary=name == "row_id",
            is_partition_key=name == "tenant",
        )
    for name in NUMBERS:
        made.add_field(name, DataType.INT64)
    made.add_field("groups", DataType.ARRAY, element_type=DataType.VARCHAR, max_capacity=MAX_GROUPS, max_length=64)
    made.add_field("readers", DataType.VARCHAR, max_length=MAX_GROUPS * READER_BYTES)
    made.add_field("metadata", DataType.JSON)
    analyzer = (lite.ANALYZERS if embedded else ANALYZERS)[config.bm25.analyzer]
    made.add_field(
        "search_text", DataType.VARCHAR, max_length=MAX_BYTES, enable_analyzer=True, analyzer_params=analyzer
    )
    made.add_field("sparse", DataType.SPARSE_FLOAT_VECTOR)
    made.add_field("dense", DataType.FLOAT_VECTOR, dim=dimension)
    made.add_function(
        Function(
            name="bm25",
            function_type=FunctionType.BM25,
            input_field_names=["search_text"],
            output_field_names=["sparse"],
        )
    )
    return made


def indexes(config: StoreConfig) -> IndexParams:
    """The indexes of the two vector columns.

    Raises:
        ConfigError: a parameter does not fit the type.
    """
    made = MilvusClient.prepare_index_params()
    # pymilvus 3 takes one level of `params` apart; milvus-lite reads only what is in them, servers read both.
    dense = {"params": build_parameters(config.index)}
    words = {"params": {"bm25_k1": config.bm25.k1, "bm25_b": config.bm25.b}}
    made.add_index("dense", index_type=config.index.type, metric_type="COSINE", params=dense)
    made.add_index("sparse", index_type="SPARSE_INVERTED_INDEX", metric_type="BM25", params=words)
    return made


def build_parameters(index: IndexConfig) -> Parameters:
    """What the dense index is built with: the defaults of its type, and ``store.index.build`` over them.

    Raises:
        ConfigError: one does not fit the type.
    """
    defaults = BUILD.get(index.type, {})
    _check("build", index.type, index.build, (*defaults, *MORE_BUILD.get(index.type, ())))
    return defaults | index.build


def check_search(index: IndexConfig) -> None:
    """Refuse what the dense index cannot be searched with.

    Raises:
        ConfigError: a parameter of ``store.index.search`` does not fit the type.
    """
    _check("search", index.type, index.search, SEARCH.get(index.type, ()))


def search_parameters(index: IndexConfig, k: int) -> Parameters:
    """What the dense index is searched with for `k` hits: ``store.index.search``, and never a beam narrower than `k`."""
    return {
        name: max(value, k) if name in BEAMS and isinstance(value, int) else value
        for name, value in index.search.items()
    }


def check_row(row: Mapping[str, Any]) -> None:
    """Refuse a row that Milvus would refuse, with a whole page of others.

    Raises:
        BadInput: a value is too long, or the document names too many groups.
    """
    limits = COLUMNS | {"search_text": MAX_BYTES, "metadata": MAX_BYTES}
    for column, most in limits.items():
        text = json.dumps(row[column], ensure_ascii=False) if column == "metadata" else row[column]
        if (size := len(text.encode())) > most:
            raise BadInput(
                f"document {row['doc_id'][:80]!r}: {column} of chunk {row['position']} has {size} bytes, and Milvus takes "
                f"{most}; shorten it",
                param=column,
            )
    if len(row["groups"]) > MAX_GROUPS:
        raise BadInput(
            f"document {row['doc_id'][:80]!r} names {len(row['groups'])} groups, and a row takes {MAX_GROUPS}; join some",
            param="groups",
        )


def settings(config: StoreConfig) -> str:
    """What a collection is made with and cannot change, as it remembers it."""
    made = {
        "index.type": config.index.type,
        "index.build": build_parameters(config.index),
        "bm25.k1": config.bm25.k1,
        "bm25.b": config.bm25.b,
        "bm25.analyzer": config.bm25.analyzer,
    }
    return json.dumps(made, sort_keys=True)


def changed(remembered: str, config: StoreConfig) -> list[str]:
    """The settings under ``store`` in which `remembered` differs from `config`."""
    before, now = json.loads(remembered), json.loads(settings(config))
    return [f"store.{name}" for name in now if before.get(name) != now[name]]


def _check(which: str, kind: IndexType, given: Parameters, known: tuple[str, ...]) -> None:
    for name in given:
        if name not in known:
            fits = f"known: {', '.join(known)}" if known else "it takes none"
            raise ConfigError(
                f"store.index.{which}: {name} is no parameter of {kind}; {fits}", param=f"store.index.{which}"
            )
