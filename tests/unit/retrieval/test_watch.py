"""What a change of files becomes: which documents are indexed anew, and what is left alone."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from cluster.config import KnowledgeConfig
from cluster.errors import NotFound, Unavailable
from retrieval.ingest import IngestReport
from retrieval.steps import Read
from retrieval.watch import Follower, follow


class Indexed:
    """Stands for the index: what each ingest was given."""

    def __init__(self) -> None:
        self.calls: list[tuple[set[str], list[str] | None]] = []
        self.failure: Exception | None = None

    def __call__(self, read: Read, only: Sequence[str] | None) -> IngestReport:
        if self.failure is not None:
            raise self.failure
        self.calls.append(({document.doc_id for document in read.documents}, None if only is None else sorted(only)))
        return IngestReport("k", len(self.calls), read.count, 0, 0, 0, 0, 0, 0, tuple(read.problems), 0.0)


@pytest.fixture
def indexed() -> Indexed:
    return Indexed()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("ferry", "fares", "dogs"):
        write(tmp_path / "d" / f"{name}.md", f"# {name}\n\nAll about {name}.")
    return tmp_path / "d"


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def follower(root: Path, indexed: Indexed, **knowledge: Any) -> Follower:
    return Follower(KnowledgeConfig(documents=str(root), **knowledge), {}, indexed)


def test_only_what_changed_is_indexed(root: Path, indexed: Indexed) -> None:
    following = follower(root, indexed)
    assert following.pending
    assert following.step() is not None and indexed.calls == [({"ferry", "fares", "dogs"}, None)]
    assert following.step() is None and not following.pending and len(indexed.calls) == 1

    write(root / "fares.md", "# fares\n\nA ticket costs five now.")
    write(root / "night.md", "# night\n\nBoats sail at night.")
    (root / "dogs.md").unlink()
    assert following.step() is not None
    assert indexed.calls[1:] == [({"fares", "night"}, ["dogs", "fares", "night"])]
    (root / "night.md").rename(root / "late.md")
    following.step()
    assert indexed.calls[2:] == [({"late"}, ["late", "night"])]


def test_a_repetition_comes_back_when_the_first_goes(root: Path, indexed: Indexed) -> None:
    write(root / "zebra.md", (root / "dogs.md").read_text())
    following = follower(root, indexed)
    report = following.step()
    assert indexed.calls[0][0] == {"ferry", "fares", "dogs"}
    assert report is not None and "zebra" in report.problems[0].reason
    (root / "dogs.md").unlink()
    following.step()
    assert indexed.calls[1] == ({"zebra"}, ["dogs", "zebra"])


def test_a_failed_ingest_is_done_again_with_all_it_was_for(root: Path, indexed: Indexed) -> None:
    following = follower(root, indexed)
    following.step()
    (root / "dogs.md").unlink()
    indexed.failure = Unavailable("Milvus is away")
    with pytest.raises(Unavailable):
        following.step()
    assert following.pending
    write(root / "fares.md", "# fares\n\nFree.")
    indexed.failure = None
    following.step()
    assert indexed.calls[1] == ({"fares"}, ["dogs", "fares"])


def test_nothing_goes_when_the_place_is_empty_or_gone(root: Path, indexed: Indexed) -> None:
    following = follower(root, indexed)
    following.step()
    root.rename(root.with_name("away"))
    with pytest.raises(NotFound, match="no such directory"):
        following.step()
    root.mkdir()
    with pytest.raises(NotFound, match="what is indexed stays"):
        following.step()
    assert following.pending and len(indexed.calls) == 1
    root.rmdir()
    root.with_name("away").rename(root)
    assert following.step() is None and len(indexed.calls) == 1


def test_a_file_that_is_unreadable_for_a_moment_keeps_its_documents(root: Path, indexed: Indexed) -> None:
    following = follower(root, indexed)
    following.step()
    good = (root / "fares.md").read_text()
    write(root / "fares.md", "")
    assert following.step() is None and following.pending
    write(root / "fares.md", good + "More.")
    following.step()
    assert indexed.calls[1] == ({"fares"}, ["fares"]) and not following.pending

    write(root / "fares.md", "")
    assert following.step() is None and following.pending
    report = following.step()  # the same once more
    assert indexed.calls[2] == (set(), ["fares"]) and not following.pending
    assert report is not None and report.problems[0].reason == "empty"


def test_following_sees_changes_and_outlives_failures(root: Path, indexed: Indexed) -> None:
    stop, said, done = threading.Event(), [], []
    happened = threading.Condition()

    def note(into: list[Any], what: Any) -> None:
        with happened:
            into.append(what)
            happened.notify_all()

    def wait(ready: Any) -> None:
        with happened:
            assert happened.wait_for(ready, timeout=60)

    thread = threading.Thread(
        target=follow,
        args=(follower(root, indexed), str(root), 0.2),
        kwargs={"done": lambda r: note(done, r), "tell": lambda s: note(said, s), "stop": stop},
    )
    thread.start()
    try:
        wait(lambda: len(done) == 1)
        write(root / "night.md", "# night\n\nBoats sail at night.")
        wait(lambda: len(done) == 2)
        indexed.failure = Unavailable("Milvus is away")
        (root / "dogs.md").unlink()
        wait(lambda: said)
        indexed.failure = None
        wait(lambda: len(done) == 3)
        root.rename(root.with_name("away"))
        wait(lambda: len(said) == 2)
        root.with_name("away").rename(root)
        write(root / "last.md", "# last\n\nThe last boat.")
        wait(lambda: len(done) == 4)
    finally:
        stop.set()
        thread.join(60)
    assert not thread.is_alive()
    assert said[0] == "Milvus is away; trying again every 0.2 s" and "no such directory" in said[1]
    assert [only for _, only in indexed.calls] == [None, ["night"], ["dogs"], ["last"]]
