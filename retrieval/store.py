"""Milvus: the few calls that ingest, retrieval and the verbs make. Collections are named by their physical name.

Each knowledge name is a Milvus *alias* of a physical collection, so that re-embedding can fill a new collection and
move the alias. Rows are versioned (``born <= v < died``) and carry who may read them; conditions arrive as
:mod:`retrieval.filters`, never as text. Whoever reads for somebody builds the condition with
:func:`retrieval.filters.readable`; conditions without rights are for ingest and maintenance.

Uses what Milvus 2.5 and milvus-lite 3.2 both offer; where they differ, :mod:`retrieval.lite` says so. What a call does
when Milvus is away: :mod:`retrieval.calls`. Not covered: creating databases and users.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from pymilvus import MilvusClient, MilvusException

from cluster.config import StoreConfig
from cluster.errors import ConfigError, Mismatch
from retrieval import lite
from retrieval.calls import patiently, transient
from retrieval.collection import (
    EMBEDDER_PROPERTY,
    PASSAGE,
    SCHEMA,
    SCHEMA_PROPERTY,
    SETTINGS_PROPERTY,
    STORED,
    changed,
    check_row,
    check_search,
    indexes,
    schema,
    search_parameters,
    settings,
)
from retrieval.filters import EVERY_ROW, Condition, In, expression, readers
from retrieval.types import Passage

# pymilvus logs a traceback with the filter text for every error it raises; we raise a sentence instead.
logging.getLogger("pymilvus").setLevel(logging.CRITICAL)
log = logging.getLogger(__name__)

Row = dict[str, Any]
T = TypeVar("T")
DIGITS = 6
"""Decimals of a score."""
ALIVE = 2**53 - 1
"""``died`` of a row that is live: beyond any version, and exact in every JSON reader."""
PAGE = 500
"""Rows per call; with 1024 dimensions about 3 MB, far below the 64 MB that a server takes."""
LIGHT_PAGE = 5_000
"""Rows per call when they come without their vectors and texts."""
HEAVY = ("dense", "text", "search_text")
SEARCH_SHARE = 0.1
"""Of ``store.retry_s``: how long a search waits for a Milvus that is away. Somebody is waiting for the answer."""
CREATE_LOOKS = 20
"""How often, every 0.1 s, a collection that could not be made is looked for: another process may be at it."""
CONNECTION = {
    "grpc.use_local_subchannel_pool": 1,
    "grpc.initial_reconnect_backoff_ms": 100,
    "grpc.max_reconnect_backoff_ms": 1000,
}
"""Without these gRPC connects to a server that was away only after up to two minutes, however often it is asked."""
SAFE_VERSIONS = {(2, 5): (2, 5, 27), (2, 6): (2, 6, 10)}
"""Release line -> its first version without CVE-2025-64513 and CVE-2026-26190; older lines have none."""
ESCAPES = str.maketrans({"_": "__", ".": "_d", "-": "_h"})


def alias(knowledge: str) -> str:
    """The Milvus alias of a knowledge name: no two share one, and none looks like a physical collection's."""
    return "k_" + knowledge.translate(ESCAPES)


def physical(knowledge: str, number: int) -> str:
    """The Milvus name of the `number`-th collection of a knowledge, from 1."""
    return f"{alias(knowledge)}_v{number}"


def pages(values: Sequence[T]) -> Iterator[Sequence[T]]:
    """`values` in parts of :data:`PAGE`."""
    return (values[start : start + PAGE] for start in range(0, len(values), PAGE))


class Store:
    """A connection to Milvus. Thread-safe; make one per process."""

    def __init__(self, config: StoreConfig, uri: str) -> None:
        """Connect to `uri`, trying for ``config.retry_s``. A server with known holes is logged as a warning.

        Raises:
            Unavailable: nothing there speaks Milvus, or it refuses the token.
            ConfigError: the server does not offer what `config` asks for, or a parameter of the index does not fit.
        """
        self._uri = uri
        self._config = config
        self._timeout = config.timeout_s
        check_search(config.index)
        token = config.token.get_secret_value() if config.token else ""
        # pymilvus shares connections between clients and then never closes them; this one is ours.
        self._client = self._call(
            uri,
            MilvusClient,
            uri,
            token=token,
            timeout=self._timeout,
            dedicated=True,
            grpc_options=CONNECTION,
        )
        self.server_version = str(self._call(uri, self._client.get_server_version, timeout=self._timeout))
        """As the server gives it: ``v2.6.10``, ``milvus_lite-3.2.2``."""
        self._embedded = lite.is_lite(self.server_version)
        if self._embedded:
            lite.check(config)
        elif outdated(self.server_version):
            log.warning(
                "Milvus at %s is %s, which lets anybody who reaches its ports in (CVE-2025-64513, CVE-2026-26190); "
                "upgrade to 2.5.27, 2.6.10 or later",
                uri,
                self.server_version,
            )

    def close(self) -> None:
        self._client.close()

    # -- collections ---------------------------------------------------------------------------------------------

    def create(self, collection: str, *, embedder: str, dimension: int) -> None:
        """Make `collection` with the configured index and analyzer, unless it is there; what a killed run began is completed.

        Args:
            embedder: fingerprint of the model whose vectors it is for.

        Raises:
            Mismatch: it is there with the vectors of another embedder, other index or analyzer settings, or the
                columns of an earlier metier. It can be searched as it is.
            ConfigError: the server does not offer the index or analyzer; nothing was made.
        """
        build = indexes(self._config)
        new = not self.exists(collection)
        if new:
            self._call(collection, self._create, collection, embedder, dimension)
        properties = self.check_embedder(collection, embedder=embedder, dimension=dimension)
        if names := changed(properties[SETTINGS_PROPERTY], self._config):
            raise Mismatch(
                f"collection {collection} was made with other {', '.join(names)}; set them back, or move to a new "
                "collection with `metier knowledge reindex`",
                param=names[0],
            )
        there = self._call(collection, self._client.list_indexes, collection)
        for index in build:
            if index.field_name not in there:
                try:
                    self._call(collection, self._index, collection, index)
                except ConfigError:
                    if new:
                        self.drop(collection)
                    raise
        self._call(collection, self._load, collection)

    def exists(self, collection: str) -> bool:
        return bool(self._call(collection, self._client.has_collection, collection, timeout=self._timeout))

    def check_embedder(self, collection: str, *, embedder: str, dimension: int) -> Mapping[str, str]:
        """Refuse vectors that do not compare with those of the collection; return what the collection remembers.

        Raises:
            Mismatch: the collection was filled by another embedder, or has the columns of an earlier metier.
            NotFound: there is no such collection.
        """
        description = self._call(collection, self._client.describe_collection, collection, timeout=self._timeout)
        properties: Mapping[str, str] = description["properties"]
        if properties.get(SCHEMA_PROPERTY) != SCHEMA:
            raise Mismatch(
                f"collection {collection} was made by an earlier metier and lacks columns; ingest under another "
                "knowledge.name, or drop it with `metier knowledge drop` and ingest again",
                param="knowledge.name",
            )
        sizes = [field["params"]["dim"] for field in description["fields"] if field["name"] == "dense"]
        if (properties.get(EMBEDDER_PROPERTY), *sizes) != (embedder, dimension):
            raise Mismatch(
                f"collection {collection} was embedded by another model ({sizes[0]} dimensions, not the {dimension} of "
                "this embedder, or other weights); set embedder back, or move to the new one with `metier knowledge reindex`",
                param="embedder",
            )
        return properties

    def drop(self, collection: str) -> None:
        """Delete the collection; nothing happens if it is not there."""
        self._call(collection, self._client.drop_collection, collection, timeout=self._timeout)

    def point(self, knowledge: str, collection: str) -> None:
        """Let the alias of `knowledge` name `collection`, at once for everybody."""
        now = self.aliased(knowledge)
        if now == collection:
            return
        move = self._client.create_alias if now is None else self._client.alter_alias
        self._call(collection, move, collection, alias(knowledge), timeout=self._timeout)

    def unpoint(self, knowledge: str) -> None:
        """Remove the alias of `knowledge`; nothing happens if it is not there."""
        if self.aliased(knowledge) is not None:
            self._call(knowledge, self._client.drop_alias, alias(knowledge), timeout=self._timeout)

    def aliased(self, knowledge: str) -> str | None:
        """The collection that the alias of `knowledge` names, if there is one."""
        if not self.exists(alias(knowledge)):
            return None
        described = self._call(knowledge, self._client.describe_alias, alias(knowledge), timeout=self._timeout)
        return str(described["collection_name"])

    # -- rows ----------------------------------------------------------------------------------------------------

    def upsert(self, collection: str, rows: Sequence[Row]) -> None:
        """Write rows of all :data:`STORED` columns; one whose ``row_id`` is there is replaced.

        Raises:
            BadInput: a value is longer than its column; nothing was written.
        """
        for row in rows:
            check_row(row)
        for part in pages(rows):
            page = [row | {"readers": readers(row["groups"])} for row in part]
            self._call(collection, self._client.upsert, collection, page, timeout=self._timeout)

    def rows(self, collection: str, condition: Condition, columns: Sequence[str]) -> Iterator[Row]:
        """All rows under `condition`, in no promised order, a page at a time."""
        iterator = self._call(collection, self._iterator, collection, condition, columns)
        try:
            while page := self._call(collection, iterator.next):
                yield from ({column: row[column] for column in columns} for row in page)
        finally:
            iterator.close()

    def some(self, collection: str, condition: Condition, columns: Sequence[str], limit: int) -> list[Row]:
        """At most `limit` rows under `condition`, in no promised order, in one call: for reads that somebody waits for.

        Args:
            limit: up to 16,384, as everywhere in Milvus.
        """
        found = self._ask(
            collection,
            self._client.query,
            collection,
            filter=_filter(condition),
            output_fields=list(columns),
            limit=limit,
            timeout=self._timeout,
            consistency_level=self._config.consistency,
        )
        return [{column: row[column] for column in columns} for row in found]

    def set_died(self, collection: str, row_ids: Sequence[str], died: int) -> None:
        """Let rows be dead from version `died` on (:data:`ALIVE`: bring them back)."""
        for part in pages(row_ids):
            page = self._call(  # by keys alone and in one call: milvus-lite then looks at no other row
                collection,
                self._client.query,
                collection,
                filter=expression(In("row_id", part)),
                output_fields=list(STORED),
                timeout=self._timeout,
                consistency_level="Strong",
            )
            self.upsert(collection, [{column: row[column] for column in STORED} | {"died": died} for row in page])

    def delete(self, collection: str, condition: Condition) -> None:
        """Remove rows from every version."""
        parts = [condition]
        if self._embedded and not isinstance(condition, In):
            gone = [row["row_id"] for row in self.rows(collection, condition, ["row_id"])]
            parts = [In("row_id", page) for page in pages(gone)]
        for part in parts:
            self._call(collection, self._client.delete, collection, filter=expression(part), timeout=self._timeout)

    def count(self, collection: str, condition: Condition) -> int:
        """How many rows are under `condition`."""
        if self._embedded:
            return sum(1 for _ in self.rows(collection, condition, ["row_id"]))
        found = self._call(
            collection,
            self._client.query,
            collection,
            filter=_filter(condition),
            output_fields=["count(*)"],
            timeout=self._timeout,
            consistency_level="Strong",
        )
        return int(found[0]["count(*)"])

    def flush(self, collection: str) -> None:
        """After the last of many writes: have them searched by index at once.

        A Milvus server does so by itself; milvus-lite searches what was not flushed row by row, 30 times slower.
        """
        if self._embedded:
            self._call(collection, self._client.flush, collection)

    # -- search --------------------------------------------------------------------------------------------------

    def search_dense(
        self, collection: str, vector: npt.NDArray[np.float32], condition: Condition, k: int
    ) -> list[Passage]:
        """The `k` nearest rows by cosine, best first."""
        return self._search(
            collection, "dense", "dense", vector, {"params": search_parameters(self._config.index, k)}, condition, k
        )

    def search_bm25(self, collection: str, text: str, condition: Condition, k: int) -> list[Passage]:
        """The `k` best rows by BM25, best first. Word statistics are of the whole collection, dead rows included."""
        return self._search(collection, "sparse", "bm25", text, {}, condition, k)

    def _search(
        self,
        collection: str,
        field: str,
        stage: str,
        query: npt.NDArray[np.float32] | str,
        parameters: dict[str, Any],
        condition: Condition,
        k: int,
    ) -> list[Passage]:
        found = self._ask(
            collection,
            self._client.search,
            collection,
            [query],
            anns_field=field,
            filter=_filter(condition),
            limit=k,
            output_fields=list(PASSAGE),
            search_params=parameters,
            timeout=self._timeout,
            consistency_level=self._config.consistency,
        )
        # How a server holds rows (in memory, flushed, merged) moves the seventh digit, and ties with it.
        return sorted(
            (_passage(hit, stage) for hit in found[0]), key=lambda passage: (-passage.score, passage.chunk_id)
        )

    # -- how calls are made --------------------------------------------------------------------------------------

    def _call(self, name: str, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """``function(*args, **kwargs)``, waiting for a Milvus that is away; `name` is the collection it is about."""
        return self._patiently(self._config.retry_s, name, partial(function, *args, **kwargs))

    def _ask(self, name: str, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """The same for a read that somebody waits for."""
        return self._patiently(self._config.retry_s * SEARCH_SHARE, name, partial(function, *args, **kwargs))

    def _patiently(self, patience_s: float, name: str, function: Callable[[], T]) -> T:
        return patiently(function, uri=self._uri, name=name, patience_s=patience_s, load=partial(self._load, name))

    def _create(self, collection: str, embedder: str, dimension: int) -> None:
        """Make the bare collection; another process may have done so, or an attempt whose answer was lost."""
        try:
            self._client.create_collection(
                collection,
                schema=schema(self._config, dimension, embedded=self._embedded),
                properties={
                    EMBEDDER_PROPERTY: embedder,
                    SCHEMA_PROPERTY: SCHEMA,
                    SETTINGS_PROPERTY: settings(self._config),
                },
                num_partitions=self._config.partitions,
                consistency_level=self._config.consistency,
                timeout=self._timeout,
            )
        except MilvusException as error:
            if transient(error):
                raise
            for _ in range(CREATE_LOOKS):
                if self._client.has_collection(collection, timeout=self._timeout):
                    return
                time.sleep(0.1)
            raise

    def _index(self, collection: str, index: Any) -> None:
        one = MilvusClient.prepare_index_params()
        one.append(index)
        try:
            # Waiting for the index of an empty collection would take half a second, and nobody needs it.
            self._client.create_index(collection, one, timeout=self._timeout, sync=False)
        except MilvusException as error:
            if transient(error):
                raise
            if index.field_name in self._client.list_indexes(collection):
                return  # another process was faster
            raise ConfigError(
                f"store.index.type: Milvus at {self._uri} does not make an index {self._config.index.type} with "
                f"{self._config.index.build or 'its defaults'} ({error.message}); take another type",
                param="store.index.type",
            ) from None

    def _iterator(self, collection: str, condition: Condition, columns: Sequence[str]) -> Any:
        # pymilvus describes the collection of an iterator without a deadline; whether the server hangs is asked before.
        self._client.has_collection(collection, timeout=self._timeout)
        return self._client.query_iterator(
            collection,
            filter=_filter(condition),
            output_fields=list(columns),
            batch_size=PAGE if set(columns) & set(HEAVY) else LIGHT_PAGE,
            timeout=self._timeout,
            consistency_level="Strong",
        )

    def _load(self, collection: str) -> None:
        self._client.load_collection(collection, replica_number=self._config.replicas, timeout=self._timeout)


def outdated(version: str) -> bool:
    """Whether a Milvus server of this `version` (``v2.6.9``) is known to let strangers in."""
    found = re.search(r"(\d+)\.(\d+)\.(\d+)", version)
    if found is None:
        return False
    major, minor, patch = map(int, found.groups())
    return (major, minor, patch) < SAFE_VERSIONS.get((major, minor), (2, 6, 0))


def _filter(condition: Condition) -> str:
    """`condition` for a read, where no filter at all is what finds every row fastest."""
    text = expression(condition)
    return "" if text == EVERY_ROW else text


def _passage(hit: Mapping[str, Any], stage: str) -> Passage:
    score = round(lite.bm25_score(hit["distance"]) if stage == "bm25" else hit["distance"], DIGITS)
    row = hit["entity"]
    return Passage(**{column: row[column] for column in PASSAGE}, score=score, scores={stage: score})
