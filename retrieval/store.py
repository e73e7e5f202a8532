"""Milvus: the schema of a collection, and the few calls that ingest and retrieval make. The only file with pymilvus.

Each knowledge name is a Milvus *alias* of a physical collection, so that re-embedding can fill a new collection and
move the alias. Rows are versioned (``born <= v < died``) and carry who may read them; conditions arrive as
:mod:`retrieval.filters`, never as text. Reads are strongly consistent: what a registry entry makes visible is there.
Uses what Milvus 2.5 and milvus-lite 3.2 both offer (of these, tests run the latter). Not covered: moving the alias,
creating databases and users.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
from pymilvus import CollectionSchema, DataType, Function, FunctionType, MilvusClient, MilvusException

from cluster.config import StoreConfig
from cluster.errors import Mismatch, NotFound, Unavailable
from retrieval.filters import Condition, In, expression
from retrieval.types import Passage

# pymilvus logs a traceback with the filter text for every error it raises; we raise a sentence instead.
logging.getLogger("pymilvus").setLevel(logging.CRITICAL)

Row = dict[str, Any]
ALIVE = 2**53 - 1
"""``died`` of a row that is live: beyond any version, and exact in every JSON reader."""
PAGE = 500
"""Rows per call; with 1024 dimensions about 3 MB, far below the 64 MB that a server takes."""
EMBEDDER_PROPERTY = "metier.embedder"
MAX_BYTES = 65_535
"""Longest VARCHAR of Milvus."""
COLUMNS = {"row_id": 128, "chunk_id": 64, "doc_id": 1024, "title": MAX_BYTES, "heading": MAX_BYTES, "text": MAX_BYTES}
COLUMNS |= {"source": 4096, "tenant": 64}
"""VARCHAR columns and their longest value in bytes."""
NUMBERS = ("position", "born", "died")
STORED = (*COLUMNS, "search_text", "groups", *NUMBERS, "metadata", "dense")
"""Every column but ``sparse``, which the server computes from ``search_text``."""
PASSAGE = ("chunk_id", "doc_id", "title", "heading", "text", "source", "position")
COLLECTION_NOT_FOUND = 100
CANNOT_CONNECT = 2
ESCAPES = str.maketrans({"_": "__", ".": "_d", "-": "_h"})


def alias(knowledge: str) -> str:
    """The Milvus name of a knowledge name: no two share one, and none looks like a physical collection's."""
    return "k_" + knowledge.translate(ESCAPES)


class Store:
    """A connection to Milvus. Thread-safe; make one per process."""

    def __init__(self, config: StoreConfig, uri: str) -> None:
        """Connect to `uri` within ``config.timeout_s``.

        Raises:
            Unavailable: nothing there speaks Milvus.
        """
        self._uri = uri
        self._timeout = config.timeout_s
        token = config.token.get_secret_value() if config.token else ""
        try:
            self._client = MilvusClient(uri, token=token, timeout=self._timeout)
        except MilvusException as error:
            raise Unavailable(f"Milvus at {uri} does not answer ({error.message}); check store.uri") from None
        self._loaded: set[str] = set()

    def close(self) -> None:
        self._client.close()

    # -- collections ---------------------------------------------------------------------------------------------

    def create(self, knowledge: str, *, embedder: str, dimension: int) -> None:
        """Make the collection of `knowledge`, unless it is there.

        Raises:
            Mismatch: it is there and holds the vectors of another embedder.
        """
        if self.exists(knowledge):
            self.check_embedder(knowledge, embedder=embedder, dimension=dimension)
            return
        physical = alias(knowledge) + "_v1"
        with self._calling(knowledge):
            # One without its alias was never reachable: its maker was killed right here.
            self._client.drop_collection(physical, timeout=self._timeout)
            self._client.create_collection(
                physical,
                schema=_schema(dimension),
                index_params=_indexes(),
                properties={EMBEDDER_PROPERTY: embedder},
                consistency_level="Strong",
                timeout=self._timeout,
            )
            self._client.create_alias(physical, alias(knowledge), timeout=self._timeout)

    def exists(self, knowledge: str) -> bool:
        with self._calling(knowledge):
            return bool(self._client.has_collection(alias(knowledge), timeout=self._timeout))

    def check_embedder(self, knowledge: str, *, embedder: str, dimension: int) -> None:
        """Refuse vectors that do not compare with those of the collection.

        Raises:
            Mismatch: the collection was filled by another embedder.
            NotFound: there is no such collection.
        """
        with self._calling(knowledge):
            description = self._client.describe_collection(alias(knowledge), timeout=self._timeout)
        sizes = [field["params"]["dim"] for field in description["fields"] if field["name"] == "dense"]
        if (description["properties"].get(EMBEDDER_PROPERTY), *sizes) != (embedder, dimension):
            raise Mismatch(
                f"knowledge '{knowledge}' was embedded by another model ({sizes[0]} dimensions, not the {dimension} of "
                "this embedder, or other weights); set embedder back, or ingest under another knowledge.name",
                param="embedder",
            )

    def drop(self, knowledge: str) -> None:
        """Delete the collection and all its versions; nothing happens if it is not there."""
        if not self.exists(knowledge):
            return
        with self._calling(knowledge):
            physical = self._client.describe_alias(alias(knowledge), timeout=self._timeout)["collection_name"]
            self._client.drop_alias(alias(knowledge), timeout=self._timeout)
            self._client.drop_collection(physical, timeout=self._timeout)
        self._loaded.discard(knowledge)

    # -- rows ----------------------------------------------------------------------------------------------------

    def upsert(self, knowledge: str, rows: Sequence[Row]) -> None:
        """Write rows of all :data:`STORED` columns; one whose ``row_id`` is there is replaced."""
        with self._calling(knowledge):
            for start in range(0, len(rows), PAGE):
                page = list(rows[start : start + PAGE])
                self._client.upsert(alias(knowledge), page, timeout=self._timeout)

    def rows(self, knowledge: str, condition: Condition, columns: Sequence[str]) -> Iterator[Row]:
        """All rows under `condition`, in no promised order."""
        with self._calling(knowledge):
            name = self._ready(knowledge)
            iterator = self._client.query_iterator(
                name, filter=expression(condition), output_fields=list(columns), batch_size=PAGE, timeout=self._timeout
            )
            try:
                while page := iterator.next():
                    yield from ({column: row[column] for column in columns} for row in page)
            finally:
                iterator.close()

    def set_died(self, knowledge: str, row_ids: Sequence[str], died: int) -> None:
        """Let rows be dead from version `died` on (:data:`ALIVE`: bring them back)."""
        for start in range(0, len(row_ids), PAGE):
            page = list(self.rows(knowledge, In("row_id", row_ids[start : start + PAGE]), STORED))
            self.upsert(knowledge, [row | {"died": died} for row in page])

    def delete(self, knowledge: str, condition: Condition) -> None:
        """Remove rows from every version."""
        with self._calling(knowledge):
            self._client.delete(self._ready(knowledge), filter=expression(condition), timeout=self._timeout)

    def count(self, knowledge: str, condition: Condition) -> int:
        with self._calling(knowledge):
            found = self._client.query(
                self._ready(knowledge),
                filter=expression(condition),
                output_fields=["count(*)"],
                timeout=self._timeout,
            )
        return int(found[0]["count(*)"])

    # -- search --------------------------------------------------------------------------------------------------

    def search_dense(
        self, knowledge: str, vector: npt.NDArray[np.float32], condition: Condition, k: int
    ) -> list[Passage]:
        """The `k` nearest rows by cosine, best first."""
        return self._search(knowledge, "dense", "dense", vector.tolist(), condition, k)

    def search_bm25(self, knowledge: str, text: str, condition: Condition, k: int) -> list[Passage]:
        """The `k` best rows by BM25, best first. Word statistics are of the whole collection, dead rows included."""
        return self._search(knowledge, "sparse", "bm25", text, condition, k)

    def _search(
        self, knowledge: str, field: str, stage: str, query: list[float] | str, condition: Condition, k: int
    ) -> list[Passage]:
        with self._calling(knowledge):
            hits = self._client.search(
                self._ready(knowledge),
                [query],
                anns_field=field,
                filter=expression(condition),
                limit=k,
                output_fields=list(PASSAGE),
                timeout=self._timeout,
            )[0]
        return [_passage(hit, stage) for hit in hits]

    def _ready(self, knowledge: str) -> str:
        """The name to call, with the collection in memory: a milvus-lite that was restarted has none loaded."""
        if knowledge not in self._loaded:
            self._client.load_collection(alias(knowledge), timeout=self._timeout)
            self._loaded.add(knowledge)
        return alias(knowledge)

    @contextmanager
    def _calling(self, knowledge: str) -> Iterator[None]:
        """Milvus's errors as ours; what is neither absence nor silence is a defect and passes as it is."""
        try:
            yield
        except MilvusException as error:
            if error.code == COLLECTION_NOT_FOUND:
                raise NotFound(
                    f"there is no knowledge '{knowledge}' in Milvus at {self._uri}; run `metier ingest`, or check "
                    "knowledge.name and store.uri"
                ) from None
            if error.code == CANNOT_CONNECT:
                raise Unavailable(f"Milvus at {self._uri} does not answer; check store.uri") from None
            raise
        except grpc.RpcError as error:
            raise Unavailable(
                f"Milvus at {self._uri} gave no answer within store.timeout_s = {self._timeout:g} ({error.code().name})"
            ) from None


def _passage(hit: Mapping[str, Any], stage: str) -> Passage:
    # BM25 and cosine over unit vectors: milvus-lite reports BM25 negated, Milvus as it is; it is never below 0.
    score = abs(hit["distance"]) if stage == "bm25" else hit["distance"]
    return Passage(**{column: hit["entity"][column] for column in PASSAGE}, score=score, scores={stage: score})


def _schema(dimension: int) -> CollectionSchema:
    schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False)
    for name, max_bytes in COLUMNS.items():
        schema.add_field(
            name,
            DataType.VARCHAR,
            max_length=max_bytes,
            is_primary=name == "row_id",
            is_partition_key=name == "tenant",
        )
    for name in NUMBERS:
        schema.add_field(name, DataType.INT64)
    schema.add_field("groups", DataType.ARRAY, element_type=DataType.VARCHAR, max_capacity=256, max_length=64)
    schema.add_field("metadata", DataType.JSON)
    schema.add_field("search_text", DataType.VARCHAR, max_length=MAX_BYTES, enable_analyzer=True)
    schema.add_field("sparse", DataType.SPARSE_FLOAT_VECTOR)
    schema.add_field("dense", DataType.FLOAT_VECTOR, dim=dimension)
    schema.add_function(
        Function(
            name="bm25",
            function_type=FunctionType.BM25,
            input_field_names=["search_text"],
            output_field_names=["sparse"],
        )
    )
    return schema


def _indexes() -> Any:
    indexes = MilvusClient.prepare_index_params()
    indexes.add_index("dense", index_type="HNSW", metric_type="COSINE", params={"M": 16, "efConstruction": 200})
    # k1 and b as in Anserini, which suit passages better than the 1.2 and 0.75 of Lucene.
    indexes.add_index(
        "sparse", index_type="SPARSE_INVERTED_INDEX", metric_type="BM25", params={"bm25_k1": 0.9, "bm25_b": 0.4}
    )
    return indexes
