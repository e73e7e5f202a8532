"""Vector stores without Milvus: that work converges whatever happens meanwhile, who sees what, pages, names."""

from __future__ import annotations

import asyncio
import uuid
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from cluster.config import Config, StorageConfig
from cluster.errors import BadInput, NotFound
from cluster.registry import Entry, Registry
from cluster.storage import Storage
from retrieval.types import Passage, Principal
from serving.knowledge.api import KnowledgeApi, unit_score
from serving.knowledge.backend import Backend
from serving.knowledge.files import FILENAME_BYTES, Files, plain_name
from serving.knowledge.library import Indexed, IndexJob, documents_of, file_of
from serving.knowledge.page import page
from serving.knowledge.shapes import CreateStore, ListFiles, ListStoreFiles, ListStores, attributes_of, made_store
from serving.knowledge.state import State, fold
from serving.knowledge.stores import Stores, knowledge_name
from serving.knowledge.worker import next_job

FILES = ("f0", "f1", "f2", "f3")
BATCHES = ("b0", "b1")


class Work(RuleBasedStateMachine):
    """A store that clients change while a worker, which may die at any point, does what is to be done."""

    def __init__(self) -> None:
        super().__init__()
        self.state = State("store")
        self.rows: dict[str, int] = {}
        self.earlier: set[str] = set()
        """Files of which any version has rows."""
        self.batches = 0
        self.stage = 0
        self.job: IndexJob | None = None
        self.seen = self.state
        self.event(op="create", title="", description=None, metadata={}, tenant="t", groups=["g"])

    def event(self, **data: Any) -> None:
        self.state = fold(self.state, Entry(self.state.number + 1, "2026-01-01T00:00:00Z", data))

    @rule(
        files=st.lists(st.sampled_from(FILES), min_size=1, unique=True), value=st.integers(0, 9), batched=st.booleans()
    )
    def attach(self, files: list[str], value: int, batched: bool) -> None:
        items = [
            {"id": f, "filename": f, "path": f, "bytes": 1, "attributes": {"v": value}, "chunking": None} for f in files
        ]
        self.batches += batched
        self.event(op="attach", files=items, batch=f"b{self.batches}" if batched else None)

    @rule(file=st.sampled_from(FILES), value=st.integers(0, 9))
    def change(self, file: str, value: int) -> None:
        if file in self.state.files and self.state.files[file].wanted:
            self.event(op="attributes", file=file, attributes={"v": value})

    @rule(file=st.sampled_from(FILES), forget=st.booleans())
    def detach(self, file: str, forget: bool) -> None:
        self.event(op="detach", files=[file], forget=forget)

    @rule(number=st.integers(1, 3))
    def cancel(self, number: int) -> None:
        if f"b{number}" in self.state.batches:
            self.event(op="cancel", batch=f"b{number}")

    @rule()
    def advance(self) -> None:
        """The worker takes its next step."""
        if self.stage == 0:
            self.seen = self.state
            self.job = next_job(self.state)
            self.stage = 1 if self.job else 0
        elif self.stage == 1:
            assert self.job is not None
            if self.job.files:
                self.event(op="begin", files=[file.id for file in self.job.files])
            self.stage = 2
        elif self.stage == 2:
            assert self.job is not None
            for file in self.job.files:
                self.rows[file.id] = file.attributes["v"]
                self.earlier.add(file.id)
            for file_id in self.job.remove:
                self.rows.pop(file_id, None)
            self.earlier -= set(self.job.forget)
            self.stage = 3
        else:
            assert self.job is not None
            outcomes = {
                file.id: {
                    "revision": self.seen.files[file.id].revision,
                    "error": None,
                    "usage_bytes": 1,
                    "groups": None,
                }
                for file in self.job.files
            }
            if self.job.files:
                self.event(op="applied", files=outcomes)
            else:
                self.event(op="removed", files=list(self.job.remove), forgotten=list(self.job.forget))
            self.stage = 0

    @rule()
    def die(self) -> None:
        self.stage = 0

    def teardown(self) -> None:
        for _ in range(200):
            if self.stage == 0 and not self.state.is_unfinished:
                break
            self.advance()
        wanted = {key: file.attributes["v"] for key, file in self.state.files.items() if file.wanted}
        assert self.rows == wanted
        assert not self.earlier & {key for key, file in self.state.files.items() if file.forget}
        for file in self.state.files.values():
            assert file.status == ("cancelled" if file.cancelled else "completed") or not file.is_shown


Work.TestCase.settings = settings(max_examples=300, stateful_step_count=40, deadline=None)
TestWork = Work.TestCase


# -- rights ------------------------------------------------------------------------------------------------------

TENANTS, GROUPS = ("a", "b"), ("x", "y", "z")
principals = st.builds(Principal, st.sampled_from(TENANTS), st.lists(st.sampled_from(GROUPS), unique=True).map(tuple))


@settings(max_examples=40, deadline=None)
@given(
    uploads=st.lists(principals, max_size=4),
    made=st.lists(st.tuples(principals, st.lists(st.integers(0, 3), unique=True)), max_size=4),
    asks=principals,
)
def test_everybody_sees_exactly_what_they_share_a_group_with(
    uploads: list[Principal], made: list[tuple[Principal, list[int]]], asks: Principal
) -> None:
    asyncio.run(_sees(uploads, made, asks))


async def _sees(uploads: list[Principal], made: list[tuple[Principal, list[int]]], asks: Principal) -> None:
    async def index(job: IndexJob) -> dict[str, Indexed]:
        return {file.id: Indexed(1, job.groups) for file in job.files}

    async def unused(*_: Any) -> Any:
        raise AssertionError

    config = Config(storage=StorageConfig(url=f"memory://{uuid.uuid4().hex}"))
    api = KnowledgeApi(
        config, Registry(Storage.of(config.storage)), Backend(unused, unused, unused, unused, unused, index)
    )

    def shares(other: Principal) -> bool:
        return asks.tenant == other.tenant and bool(set(asks.groups) & set(other.groups))

    files = [
        (who, (await api.upload(Path(__file__), 1, f"{n}.txt", "assistants", who))["id"])
        for n, who in enumerate(uploads)
    ]
    stores = []
    for who, numbers in made:
        chosen = [files[number] for number in numbers if number < len(files)]
        try:
            stores.append(
                (who, chosen, (await api.create_store(CreateStore(file_ids=[key for _, key in chosen]), who))["id"])
            )
        except NotFound:
            assert not all(who.tenant == owner.tenant and set(who.groups) & set(owner.groups) for owner, _ in chosen)
    seen_files = {item["id"] for item in (await api.list_files(ListFiles(), asks))["data"]}
    assert seen_files == {key for owner, key in files if shares(owner)}
    seen_stores = {item["id"]: item for item in (await api.list_stores(ListStores(), asks))["data"]}
    assert set(seen_stores) == {key for owner, _, key in stores if shares(owner)}
    for owner, chosen, key in stores:
        if shares(owner):
            assert seen_stores[key]["file_counts"]["total"] == len(chosen)
            continue
        for call in (
            api.get_store(key, asks),
            api.list_store_files(key, ListStoreFiles(), asks),
            api.delete_store(key, asks),
        ):
            with pytest.raises(NotFound):
                await call
    await api.close()


# -- the rest ----------------------------------------------------------------------------------------------------


@given(st.integers(0, 30), st.integers(1, 7), st.sampled_from(["asc", "desc"]))
def test_pages_one_after_another_are_the_list(count: int, limit: int, order: Any) -> None:
    items = [f"i{number}" for number in range(count)]
    ordered = items if order == "asc" else items[::-1]
    seen: list[str] = []
    more = True
    while more:
        cut, more = page(items, str, limit=limit, order=order, after=seen[-1] if seen else None)
        assert len(cut) == limit or not more
        seen += cut
    assert seen == ordered
    back: list[str] = []
    while (back and back[0] != ordered[0]) or (ordered and not back):
        cut, more = page(items, str, limit=limit, order=order, before=back[0] if back else ordered[-1])
        if not back:
            cut = [*cut, ordered[-1]]
        back = [*cut, *back]
        assert more == (back[0] != ordered[0])
    assert back == ordered
    with pytest.raises(BadInput, match="not in this list"):
        page(items, str, limit=limit, after="elsewhere")


@given(st.text())
def test_a_name_is_one_part_of_a_path_that_can_be_shown(name: str) -> None:
    plain = plain_name(name)
    assert plain and plain not in (".", "..") and "/" not in plain and "\\" not in plain
    assert len(plain.encode()) <= FILENAME_BYTES and not any(ord(char) < 32 for char in plain)
    assert plain_name(plain) == plain


def test_an_upload_that_was_not_finished_is_not_there(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / "store"))
    local = tmp_path / "a.MD"
    local.write_text("# A")
    me = Principal()
    made = Files(storage).add(local, 3, "a.MD", "assistants", me)
    assert made.path.endswith("/content.md")
    storage.delete(f"files/{made.id}/meta.json")
    assert Files(storage).list(me) == []
    with pytest.raises(NotFound):
        Files(storage).get(made.id, me)


def test_what_another_process_did_is_seen(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    one, two = Stores(Registry(storage)), Stores(Registry(storage))
    name = one.create("First", {}, None, Principal()).name
    assert two.state(name).title == "First"
    two.add(name, op="update", title="Second")
    assert one.state(name).title == "Second"
    one.add(name, op="delete")
    assert two.get(f"vs_{name}", Principal()) is None and two.list(Principal()) == []


@pytest.mark.parametrize("store", ["", "vs_", "vs_..", "vs_../x", "vs_a/b", "vs_A", "file-1", "a", "vs_" + "a" * 64])
def test_only_names_of_knowledge_are_ids(store: str) -> None:
    assert knowledge_name(store) is None


def test_parts_of_a_file_are_its_and_no_others() -> None:
    assert file_of("file-12#7") == file_of("file-12") == "file-12"
    assert documents_of("file-1") != documents_of("file-12")


def test_scores_are_in_the_unit_interval() -> None:
    def score(value: float, **stages: float) -> float:
        return unit_score(Passage("c", "d", "", "", "", "", 0, value, stages))

    assert score(7.0, bm25=7.0) > score(2.0, bm25=2.0) > score(0.0, bm25=0.0) == 0
    assert score(-0.2, dense=-0.2) == 0 and score(0.8, dense=0.8) == 0.8
    assert score(0.9, dense=0.2, bm25=30.0, rerank=0.9) == 0.9 and score(30.0, bm25=30.0) < 1


def test_attributes_are_what_openai_lets_them_be() -> None:
    wild = {"a": "x" * 600, "b": [1], "c": None, "d": True, "k" * 65: "v", **{f"n{n}": n for n in range(20)}}
    kept = attributes_of(wild)
    assert len(kept) == 16 and len(kept["a"]) == 512 and kept["d"] is True
    assert "b" not in kept and "c" not in kept and "k" * 65 not in kept


def test_an_empty_store_is_complete() -> None:
    state = State("s", 1, created="2026-01-01T00:00:00Z", active="2026-01-01T00:00:00Z")
    shown = made_store(state, [])
    assert (shown["status"], shown["file_counts"]["total"], shown["usage_bytes"]) == ("completed", 0, 0)
