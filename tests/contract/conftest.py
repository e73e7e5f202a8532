"""The servers of the contract tests: Milvus (an embedded one of their own, or with ``MILVUS_URI`` any) and S3 (moto's).

On a shared Milvus, every collection made here has a name nobody else has and is dropped at the end; nothing else is
touched. A token goes into ``METIER_MILVUS_TOKEN``, as for metier itself.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from uuid import uuid4

import pytest
from pydantic import SecretStr

from cluster.config import MILVUS_TOKEN_VARIABLE, StoreConfig
from retrieval.embedded import EMBEDDED, serve
from retrieval.store import Row, Store
from tests.rows import DIMENSION, EMBEDDER

MakeCollection = Callable[..., str]


@pytest.fixture(scope="session")
def store_config(tmp_path_factory: pytest.TempPathFactory) -> StoreConfig:
    token = os.environ.get(MILVUS_TOKEN_VARIABLE)
    return StoreConfig(
        uri=os.environ.get("MILVUS_URI", EMBEDDED),
        data_dir=str(tmp_path_factory.mktemp("milvus")),
        token=SecretStr(token) if token else None,
    )


@pytest.fixture(scope="session")
def uri(store_config: StoreConfig) -> Iterator[str]:
    with serve(store_config) as uri:
        yield uri


@pytest.fixture(scope="session")
def store(store_config: StoreConfig, uri: str) -> Iterator[Store]:
    store = Store(store_config, uri)
    yield store
    store.close()


@pytest.fixture(scope="session")
def make_collection(store: Store) -> Iterator[MakeCollection]:
    """``make_collection(rows)``: the name of a new collection that holds them."""
    made: list[str] = []

    def make(rows: Sequence[Row] = (), *, by: Store = store) -> str:
        made.append(f"test_{uuid4().hex}")
        by.create(made[-1], embedder=EMBEDDER, dimension=DIMENSION)
        by.upsert(made[-1], rows)
        return made[-1]

    yield make
    for name in made:
        store.drop(name)


S3_SERVER = """
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server
server = make_server("127.0.0.1", 0, DomainDispatcherApplication(create_backend_app))
print(server.port, flush=True)
server.serve_forever()
"""


@pytest.fixture(scope="module")
def s3() -> Iterator[dict[str, Any]]:
    """Options of a file system on the S3 server."""
    with subprocess.Popen(
        [sys.executable, "-c", S3_SERVER], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as server:
        assert server.stdout is not None
        try:
            port = int(server.stdout.readline())
            yield {"endpoint_url": f"http://127.0.0.1:{port}", "key": "test", "secret": "test"}
        finally:
            server.terminate()
