"""What is done with versions of a knowledge, against a real milvus-lite server: back, apart, away, and never two at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from cluster.config import StoreConfig
from cluster.errors import BadInput, Mismatch, NotFound
from retrieval import knowledge
from retrieval.collection import STORED
from retrieval.embedded import serve
from retrieval.filters import Compare, live
from retrieval.forget import forget, undo
from retrieval.ingest import IngestReport
from retrieval.reindex import abort
from retrieval.store import Store, physical
from retrieval.types import Snapshot
from tests.knowledge import Killed, KilledStore, Shelf, WordEmbedder
from tests.trade import wait_for

FARES = "# Fares\n\nOwner: desk.\n\n## Dogs\n\nA dog costs 3 crowns.\n\n## Bicycles\n\nA bicycle costs 5 crowns.\n"
WATCH = "# Crew\n\nThe watch changes at noon."


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serve(StoreConfig(data_dir=str(tmp_path_factory.mktemp("milvus")))) as uri:
        yield uri


@pytest.fixture(scope="module")
def store(uri: str) -> Iterator[Store]:
    store = Store(StoreConfig(), uri)
    yield store
    store.close()


@pytest.fixture
def shelf(store: Store, tmp_path: Path) -> Iterator[Shelf]:
    shelf = Shelf(store, tmp_path, tmp_path.name.replace("_", "-")[:60])
    yield shelf
    shelf.close()


def three_versions(shelf: Shelf) -> None:
    """1: fares and crew; 2: a dog costs 4; 3: without crew, with a harbour."""
    shelf.write({"fares": FARES, "crew": WATCH})
    shelf.ingest()
    shelf.write({"fares": FARES.replace("3 crowns", "4 crowns")})
    shelf.ingest()
    shelf.write({"crew": None, "harbour": "# Harbour\n\nThe quay lamp is lit at night."})
    shelf.ingest()


# -- back --------------------------------------------------------------------------------------------------------


def test_a_rollback_shows_what_was_there_and_an_ingest_goes_on_from_it(shelf: Shelf) -> None:
    three_versions(shelf)
    before = [shelf.passages("what does a dog cost", version, mode="dense") for version in (1, 2, 3)]
    made = knowledge.rollback(shelf.registry, shelf.store, shelf.name, 1)
    assert (made.number, made.kind, made.reads, made.details) == (4, "rollback", 1, {"to": 1})
    assert shelf.passages("what does a dog cost", mode="dense") == before[0] != before[1]
    assert [shelf.passages("what does a dog cost", version, mode="dense") for version in (1, 2, 3)] == before
    assert knowledge.rollback(shelf.registry, shelf.store, shelf.name, 1).number == 4, "it is there already"
    assert knowledge.rollback(shelf.registry, shelf.store, shelf.name, 4).number == 4

    embedded = shelf.embedder.embedded
    report = shelf.ingest()
    assert (report.version, report.added, report.removed, report.embedded) == (5, 2, 2, 0)
    assert shelf.embedder.embedded == embedded, "its vectors were there"
    assert shelf.texts() == shelf.texts(3) != shelf.texts(4) == shelf.texts(1)
    assert shelf.store.aliased(shelf.name) == physical(shelf.name, 1)


def test_what_goes_on_from_a_rollback_leaves_the_others_as_they_were_rolled_back(shelf: Shelf) -> None:
    """Other tenants, and other documents of an upload, do not jump to where they were before the rollback."""
    shelf.write({"fares": FARES, "crew": WATCH})
    shelf.ingest()
    shelf.ingest(tenant="other")
    shelf.write({"fares": FARES.replace("3 crowns", "4 crowns"), "crew": None, "harbour": "A lamp."})
    shelf.ingest(tenant="other")
    shelf.ingest()

    def shown(tenant: str, version: int | str = "head") -> list[str]:
        return sorted(shelf.find("dog watch lamp crowns owner", version, tenant=tenant, mode="dense"))

    theirs, mine = shown("other", 2), shown("default", 2)
    assert theirs == mine == shown("default", 1) != shown("default", 4)
    knowledge.rollback(shelf.registry, shelf.store, shelf.name, 2)
    before = {version: (shown("default", version), shown("other", version)) for version in range(1, 6)}
    with pytest.raises(Killed):  # in the middle of what is done for the others
        shelf.upload({"fares": "A horse costs 9 crowns."}, KilledStore(shelf.store, 5))
    assert before == {version: (shown("default", version), shown("other", version)) for version in range(1, 6)}
    assert shelf.upload({"fares": "A horse costs 9 crowns."}).version == 6
    assert shown("other") == theirs
    assert shown("default") == ["A horse costs 9 crowns.", "The watch changes at noon."]
    knowledge.rollback(shelf.registry, shelf.store, shelf.name, 2)
    assert shelf.ingest().version == 8
    assert (shown("default"), shown("other")) == (shown("default", 4), theirs)
    assert shelf.ingest(tenant="other").version == 9
    assert shown("other") == shown("default") == shown("other", 4)
    assert before == {version: (shown("default", version), shown("other", version)) for version in range(1, 6)}


def test_a_rollback_to_what_is_not_there_is_refused(shelf: Shelf) -> None:
    with pytest.raises(NotFound, match="is empty or not there"):
        knowledge.rollback(shelf.registry, shelf.store, shelf.name, 1)
    three_versions(shelf)
    with pytest.raises(NotFound, match="has no version 9; `metier knowledge versions"):
        knowledge.rollback(shelf.registry, shelf.store, shelf.name, 9)
    assert shelf.registry.knowledge_head(shelf.name) == 3


def test_the_rows_of_a_rollback_are_byte_for_byte_those_of_the_version(shelf: Shelf) -> None:
    def shown(version: int | str) -> list[dict[str, Any]]:
        snapshot = shelf.snapshot(version)
        columns = [column for column in STORED if column != "died"]
        return sorted(store_rows(snapshot, columns), key=lambda row: row["row_id"])

    def store_rows(snapshot: Snapshot, columns: list[str]) -> list[dict[str, Any]]:
        return list(shelf.store.rows(snapshot.collection, live(snapshot.reads), columns))

    shelf.write({"fares": FARES, "crew": WATCH})
    shelf.ingest()
    first = shown(1)
    three_versions(shelf)
    knowledge.rollback(shelf.registry, shelf.store, shelf.name, 1)
    assert shown("head") == shown(1) == first and len(first) == 4


# -- apart -------------------------------------------------------------------------------------------------------


def test_a_difference_names_documents_and_chunks(shelf: Shelf) -> None:
    three_versions(shelf)
    found = knowledge.diff(shelf.registry, shelf.store, shelf.name, 1, 3)
    assert [(d.doc_id, d.kind, [(c.kind, c.heading) for c in d.chunks]) for d in found] == [
        ("crew", "removed", [("removed", "")]),
        ("fares", "changed", [("added", "Dogs"), ("removed", "Dogs")]),
        ("harbour", "added", [("added", "")]),
    ]
    back = knowledge.diff(shelf.registry, shelf.store, shelf.name, 3, 1)
    assert [(d.doc_id, d.kind) for d in back] == [("crew", "added"), ("fares", "changed"), ("harbour", "removed")]
    assert knowledge.diff(shelf.registry, shelf.store, shelf.name, 2, 2) == []


def test_a_change_of_rights_is_a_changed_chunk_and_what_came_back_is_none(shelf: Shelf) -> None:
    shelf.write({"crew": WATCH})
    shelf.ingest()
    shelf.ingest(groups=("crew",))
    shelf.ingest()
    [document] = knowledge.diff(shelf.registry, shelf.store, shelf.name, 1, 2)
    assert document.kind == "changed" and [chunk.kind for chunk in document.chunks] == ["changed"]
    assert shelf.count() == 3 and knowledge.diff(shelf.registry, shelf.store, shelf.name, 1, 3) == []


# -- away --------------------------------------------------------------------------------------------------------


def test_a_compaction_leaves_kept_versions_as_they_were(shelf: Shelf) -> None:
    three_versions(shelf)
    shelf.write({"harbour": "# Harbour\n\nThe quay lamp is out."})
    shelf.ingest()
    shelf.registry.knowledge_pin(shelf.name, 2, "audit")
    kept = {version: shelf.texts(version) for version in (2, 4)}
    rows = shelf.count()
    plan = knowledge.compact(shelf.registry, shelf.store, shelf.name, 1, dry_run=True)
    assert (plan.kept, plan.gone, plan.rows, shelf.count()) == ({2: "pin audit", 4: "head"}, (1, 3), 2, rows)
    assert knowledge.compact(shelf.registry, shelf.store, shelf.name, 1) == plan
    assert shelf.count() == rows - 2
    assert {version: shelf.texts(version) for version in (2, 4)} == kept
    for gone in (1, 3):
        with pytest.raises(NotFound, match=f"version {gone} of knowledge .* was compacted"):
            shelf.snapshot(gone)
    again = knowledge.compact(shelf.registry, shelf.store, shelf.name, 1)
    assert (again.gone, again.rows) == ((), 0)
    shelf.registry.knowledge_unpin(shelf.name, 2)
    assert knowledge.compact(shelf.registry, shelf.store, shelf.name, 1).gone == (2,)
    assert shelf.count() == sum(map(len, shelf.texts().values()))
    assert shelf.ingest().version == 4, "nothing changed"


def test_a_compaction_killed_after_its_record_is_finished_by_the_next(shelf: Shelf) -> None:
    three_versions(shelf)
    with pytest.raises(Killed):
        knowledge.compact(shelf.registry, KilledStore(shelf.store, 0), shelf.name, 1)  # type: ignore[arg-type]
    with pytest.raises(NotFound, match="was compacted"):
        shelf.snapshot(2)
    assert knowledge.compact(shelf.registry, shelf.store, shelf.name, 1).rows == 2


def test_what_a_killed_ingest_left_survives_a_compaction(shelf: Shelf) -> None:
    three_versions(shelf)
    shelf.write({"new": "# New\n\nA gull sits on the mast."})
    with pytest.raises(Killed):
        shelf.ingest(KilledStore(shelf.store, 3), tenant="other")
    knowledge.compact(shelf.registry, shelf.store, shelf.name, 1)
    assert shelf.count(Compare("tenant", "==", "other")) > 0
    embedded = shelf.embedder.embedded
    shelf.ingest(tenant="other")
    assert shelf.embedder.embedded == embedded


def test_a_dropped_knowledge_is_gone_and_can_begin_anew(shelf: Shelf) -> None:
    three_versions(shelf)
    shelf.registry.knowledge_pin(shelf.name, 2)
    with pytest.raises(BadInput, match="named by pin 2"):
        knowledge.drop(shelf.registry, shelf.store, shelf.name)
    shelf.registry.knowledge_unpin(shelf.name, 2)
    plan = knowledge.drop(shelf.registry, shelf.store, shelf.name, dry_run=True)
    assert (plan.versions, plan.rows, plan.collections) == (3, 6, (physical(shelf.name, 1),))
    assert shelf.count() == 6
    with pytest.raises(Killed):
        knowledge.drop(shelf.registry, KilledStore(shelf.store, 0), shelf.name)  # type: ignore[arg-type]
    with pytest.raises(NotFound, match="is empty"):
        shelf.snapshot()
    assert knowledge.drop(shelf.registry, shelf.store, shelf.name).rows == 6
    assert shelf.store.aliased(shelf.name) is None and not shelf.store.exists(physical(shelf.name, 1))
    with pytest.raises(NotFound, match="there is no knowledge"):
        knowledge.drop(shelf.registry, shelf.store, shelf.name)
    assert shelf.ingest().version == 5
    assert shelf.snapshot().collection == physical(shelf.name, 5)
    with pytest.raises(NotFound, match="has no version 3"):
        shelf.snapshot(3)


# -- one writer --------------------------------------------------------------------------------------------------

WRITER = """
import sys, time
from pathlib import Path
from cluster.config import StoreConfig
from retrieval.store import Store
from tests.knowledge import Shelf

class Slow(Store):
    calls = 0
    def upsert(self, collection, rows):
        super().upsert(collection, rows)
        self.calls += 1
        if self.calls == 2:
            Path(sys.argv[4]).touch()
            time.sleep(600)

Shelf(Slow(StoreConfig(), sys.argv[1]), Path(sys.argv[2]), sys.argv[3]).ingest()
"""


def writer(shelf: Shelf, uri: str, directory: Path) -> subprocess.Popen[bytes]:
    """A process in the middle of an ingest: it stands still once it wrote two pages."""
    reached = directory / "reached"
    child = subprocess.Popen(
        [sys.executable, "-c", WRITER, uri, str(directory), shelf.name, str(reached)], cwd=Path(__file__).parents[2]
    )
    wait_for("the ingest is in the middle", reached.exists)
    return child


def test_a_second_writer_is_refused_and_a_killed_one_is_taken_over(shelf: Shelf, uri: str, tmp_path: Path) -> None:
    shelf.write({f"note-{n:04}": f"# Note {n}\n\nLamp {n} burns {n} hours." for n in range(1700)})
    child = writer(shelf, uri, tmp_path)
    try:
        refused = rf"is being written by pid {child.pid} on .* since 20.* \(an ingest\)"
        with pytest.raises(Mismatch, match=refused):
            shelf.ingest()
        with pytest.raises(Mismatch, match=refused):
            knowledge.drop(shelf.registry, shelf.store, shelf.name)
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    written = shelf.count()
    assert 0 < written < 1700
    report = shelf.ingest()
    assert (report.version, report.chunks, report.embedded, shelf.embedder.embedded) == (1, 1700, *[1700 - written] * 2)
    assert shelf.count() == 1700 and len(shelf.texts()) == 1700


# -- any order ---------------------------------------------------------------------------------------------------

NAMES = st.sampled_from(["fares", "crew", "harbour"])
WORDS = st.sampled_from(["dog", "gull", "lamp", "quay"])
CALLS = st.integers(0, 8)


class Versions(RuleBasedStateMachine):
    """Random work on a knowledge, beside what it should be in plain dicts: version -> document -> its text."""

    store: Store
    directory: Path
    made = 0

    @initialize()
    def begin(self) -> None:
        Versions.made += 1
        name = f"any-order-{Versions.made}"
        self.shelf = Shelf(self.store, self.directory / name, name)
        self.files: dict[str, str] = {}
        self.gone: set[str] = set()
        self.versions: dict[int, dict[str, str]] = {}
        self.change("fares", "dog")
        self.ingest()

    @property
    def wanted(self) -> dict[str, str]:
        return {name: text for name, text in self.files.items() if name not in self.gone}

    def head(self) -> int:
        """The newest version; from here on the embedder is the one of its collection, as a configuration would say."""
        latest = self.shelf.registry.knowledge_latest(self.shelf.name)
        if latest is None:
            return 0
        self.shelf.embedder = WordEmbedder(latest.embedder.dimension, latest.embedder.fingerprint)
        return latest.number

    @rule(name=NAMES, word=WORDS)
    def change(self, name: str, word: str) -> None:
        self.files[name] = f"The {word} of {name}."
        self.shelf.write({name: self.files[name]})

    @rule(name=NAMES)
    def remove(self, name: str) -> None:
        if len(self.files) > 1 and self.files.pop(name, None):
            self.shelf.write({name: None})

    @rule()
    def ingest(self) -> None:
        self.expect(lambda: self.shelf.ingest(), self.wanted | self.others())

    def others(self) -> dict[str, str]:
        """What the head has of the other tenant."""
        shown = self.versions.get(self.head(), {})
        return {name: text for name, text in shown.items() if name.startswith("other/")}

    def expect(self, run: Callable[[], IngestReport], after: dict[str, str]) -> None:
        """`run` makes a version that shows `after`, unless the head does."""
        head = self.head()
        version = run().version
        assert version >= head
        assert version > head or self.versions[head] == after
        self.versions[version] = after

    @rule(name=NAMES, word=WORDS, tenant=st.sampled_from(["default", "other"]))
    def upload(self, name: str, word: str, tenant: str) -> None:
        self.uploaded(name, word, tenant, self.store)

    def uploaded(self, name: str, word: str, tenant: str, store: Any) -> None:
        text = f"The {word} of {name}."
        shown = dict(self.versions[self.head()])
        if name not in self.gone:
            shown[name if tenant == "default" else f"other/{name}"] = text
        self.expect(lambda: self.shelf.upload({name: text}, store, tenant=tenant), shown)

    @rule(calls=CALLS, name=NAMES, word=WORDS, tenant=st.sampled_from(["default", "other"]))
    def upload_killed(self, calls: int, name: str, word: str, tenant: str) -> None:
        store = KilledStore(self.store, calls)
        with suppress(Killed):
            self.uploaded(name, word, tenant, store)

    @rule(calls=CALLS, name=NAMES, word=WORDS)
    def ingest_killed(self, calls: int, name: str, word: str) -> None:
        self.change(name, word)
        with suppress(Killed):
            self.expect(lambda: self.shelf.ingest(KilledStore(self.store, calls)), self.wanted | self.others())

    @rule(pick=st.randoms(use_true_random=False))
    def rollback(self, pick: Any) -> None:
        target = pick.choice(sorted(self.versions))
        made = knowledge.rollback(self.shelf.registry, self.store, self.shelf.name, target)
        self.versions[made.number] = self.versions[target]

    @rule(keep=st.integers(1, 3))
    def compact(self, keep: int) -> None:
        for number in knowledge.compact(self.shelf.registry, self.store, self.shelf.name, keep).gone:
            del self.versions[number]

    @rule(name=NAMES)
    def forget(self, name: str) -> None:
        try:
            forget(self.shelf.registry, self.store, self.shelf.name, name)
        except NotFound:
            assert not any({name, f"other/{name}"} & shown.keys() for shown in self.versions.values())
            assert name not in self.gone
        else:
            self.gone.add(name)
            for shown in self.versions.values():
                shown.pop(name, None)
                shown.pop(f"other/{name}", None)
            self.versions = {number: dict(shown) for number, shown in self.versions.items()}

    @rule(name=NAMES)
    def lift(self, name: str) -> None:
        if name in self.gone:
            undo(self.shelf.registry, self.shelf.name, name)
            self.gone.discard(name)

    @rule(dimension=st.sampled_from([32, 64]), killed=st.none() | st.integers(0, 1))
    def reindex(self, dimension: int, killed: int | None) -> None:
        other = WordEmbedder(dimension, f"words-{dimension}")
        head = self.head()
        store = self.store if killed is None else KilledStore(self.store, killed)
        try:
            report = self.shelf.reindex(other, store)
        except Killed:
            assert self.head() == head
        except Mismatch as refused:
            assert "was begun" in str(refused)  # by one that was killed, to another embedder
            abort(self.shelf.registry, self.store, self.shelf.name)
        else:
            self.versions[report.version] = dict(self.versions[head])

    @invariant()
    def every_version_shows_what_it_showed(self) -> None:
        if not hasattr(self, "shelf"):
            return
        kept = self.shelf.registry.knowledge_versions(self.shelf.name)
        assert {version.number for version in kept} == set(self.versions)
        for number, shown in self.versions.items():
            assert self.shelf.texts(number) == {name: [text] for name, text in shown.items()}, number

    def teardown(self) -> None:
        if hasattr(self, "shelf"):
            self.shelf.close()


def test_every_kept_version_shows_what_it_showed_after_any_order_of_work(store: Store, tmp_path: Path) -> None:
    Versions.store, Versions.directory = store, tmp_path
    run_state_machine_as_test(
        Versions,
        settings=settings(
            max_examples=15,
            stateful_step_count=14,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=(Phase.generate,),
        ),
    )


def test_a_snapshot_of_a_rollback_names_both_numbers(shelf: Shelf) -> None:
    three_versions(shelf)
    made = knowledge.rollback(shelf.registry, shelf.store, shelf.name, 2)
    snapshot = Snapshot.of(shelf.name, made)
    assert (snapshot.version, snapshot.reads) == (4, 2)
