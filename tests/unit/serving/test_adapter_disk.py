"""Adapter files on disk: fetched once by whoever comes first, never taken from under a reader, whole after any end of a process."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from filelock import FileLock

from cluster.adapter_files import PEFT_FILES, WEIGHTS_FILE
from cluster.errors import BadInput, Mismatch, NotFound, Unavailable
from cluster.materialize import MARKER
from cluster.registry import Registry
from cluster.release import AdapterCard, BaseRef
from cluster.storage import Storage
from serving.adapter_disk import AdapterDisk

REPOSITORY = Path(__file__).resolve().parents[3]
CARD = AdapterCard(
    base=BaseRef(source="tiny:llama", dtype="float32", tokenizer="t", chat_template="c", architecture="a"),
    rank=2,
    alpha=4,
    target_modules=["q_proj"],
)
WORDS = 3000
"""Values in each side of the adapters here, so that sizes are about 24 kB."""


class Counting(Registry):
    """Counts what it hands out."""

    def __init__(self, storage: Storage) -> None:
        super().__init__(storage)
        self.copies: list[str] = []

    def copy_adapter(self, digest: str, out: Path) -> None:
        self.copies.append(digest)
        super().copy_adapter(digest, out)


@pytest.fixture
def registry(tmp_path: Path) -> Counting:
    return Counting(Storage(str(tmp_path / "storage")))


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def digests(registry: Counting, tmp_path: Path) -> list[str]:
    """Four published adapters of one size."""
    return [publish(registry, tmp_path / f"made-{seed}", seed) for seed in range(4)]


def publish(registry: Registry, directory: Path, seed: int) -> str:
    directory.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    half = WORDS // 2
    entries = {"x.q_proj.lora_A.weight": ([2, half], [0, 4 * WORDS])}
    entries["x.q_proj.lora_B.weight"] = ([half, 2], [4 * WORDS, 8 * WORDS])
    head = json.dumps({k: {"dtype": "F32", "shape": s, "data_offsets": o} for k, (s, o) in entries.items()}).encode()
    weights = struct.pack("<Q", len(head)) + head + struct.pack(f"<{2 * WORDS}f", *[seed] * (2 * WORDS))
    (directory / WEIGHTS_FILE).write_bytes(weights)
    return registry.publish_adapter(f"made-{seed}", directory, CARD).digest


def there(cache: Path) -> set[str]:
    """What one sees in the cache: adapters, and what should not be there."""
    return {path.name for path in cache.iterdir() if not path.name.endswith(".lock")}


def size(cache: Path, digest: str) -> int:
    return sum(file.stat().st_size for file in (cache / digest).iterdir())


def use(disk: AdapterDisk, *digests: str) -> None:
    for digest in digests:
        with disk.hold(digest):
            pass


def test_an_adapter_is_fetched_once_and_is_what_was_published(
    registry: Counting, cache: Path, digests: list[str], tmp_path: Path
) -> None:
    disk = AdapterDisk(registry, cache)
    assert disk.try_acquire(digests[0]) is None
    for _ in range(3):
        with disk.hold(digests[0]) as directory:
            for name in PEFT_FILES:
                assert (directory / name).read_bytes() == (tmp_path / "made-0" / name).read_bytes()
            assert disk.card(digests[0]) == CARD
    use(AdapterDisk(registry, cache), digests[0])
    assert registry.copies == [digests[0]]


def test_a_directory_that_an_earlier_version_fetched_is_taken_over(
    registry: Counting, cache: Path, digests: list[str]
) -> None:
    registry.fetch_adapter(digests[0], cache)
    disk = AdapterDisk(registry, cache)
    with disk.hold(digests[0]):
        assert disk.card(digests[0]) == CARD
    assert registry.copies == []


def test_sixteen_threads_fetch_once(registry: Counting, cache: Path, digests: list[str]) -> None:
    disk = AdapterDisk(registry, cache)
    together = threading.Barrier(16)
    seen: list[Path] = []

    def ask() -> None:
        together.wait(30)
        with disk.hold(digests[1]) as directory:
            seen.append(directory)
            together.wait(30)  # all hold it at once

    threads = [threading.Thread(target=ask) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert seen == [cache / digests[1]] * 16
    assert registry.copies == [digests[1]]


@pytest.mark.parametrize("name", ["../storage", "/etc", "", "A" * 64, "a" * 63, "a" * 64 + "\n"])
def test_what_is_no_digest_reaches_no_file(registry: Counting, cache: Path, name: str) -> None:
    disk = AdapterDisk(registry, cache)
    for ask in (disk.acquire, disk.try_acquire):
        with pytest.raises(BadInput, match="is not a digest"):
            ask(name)
    assert not cache.exists()


# -- making room


def test_the_least_recently_used_leave_first(registry: Counting, cache: Path, digests: list[str]) -> None:
    a, b, c, d = digests
    use(AdapterDisk(registry, cache), a)
    disk = AdapterDisk(registry, cache, limit=3 * size(cache, a) + 100)
    use(disk, b, c, a)
    assert there(cache) == {a, b, c}
    use(disk, d)
    assert there(cache) == {a, c, d}
    use(disk, b)
    assert there(cache) == {a, d, b}
    assert registry.copies == [a, b, c, d, b]


def test_what_is_held_stays_and_the_others_make_room(registry: Counting, cache: Path, digests: list[str]) -> None:
    a, b, c, d = digests
    use(AdapterDisk(registry, cache), a)
    disk = AdapterDisk(registry, cache, limit=2 * size(cache, a) + 100)
    with disk.hold(a), disk.hold(a):
        use(disk, b, c)
        assert there(cache) == {a, c}
    use(disk, b, d)
    assert there(cache) == {b, d}


def test_more_may_be_held_than_there_is_room_for(
    registry: Counting, cache: Path, digests: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    disk = AdapterDisk(registry, cache, limit=1)
    with ExitStack() as held:
        for digest in digests:
            held.enter_context(disk.hold(digest))
        assert there(cache) == set(digests)
    assert "more than serving.generator.adapters_disk_bytes allows" in caplog.text
    with disk.hold(digests[0]):  # nothing is fetched, so nothing is removed
        assert there(cache) == set(digests)


def test_a_bound_holds_for_many_threads_that_come_and_go(registry: Counting, cache: Path, digests: list[str]) -> None:
    use(AdapterDisk(registry, cache), digests[0])
    limit = 2 * size(cache, digests[0]) + 100
    disk = AdapterDisk(registry, cache, limit)
    wrong: list[str] = []

    def work(first: int) -> None:
        for turn in range(12):
            digest = digests[(first + turn * (first + 1)) % 4]
            with disk.hold(digest) as directory:
                if not all((directory / name).is_file() for name in PEFT_FILES):
                    wrong.append(digest)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert wrong == []
    use(disk, *digests)
    assert sum(size(cache, digest) for digest in there(cache)) <= limit
    assert there(cache) <= set(digests), "nothing half done is left"


# -- other processes


PROCESS = """
import json, sys
from pathlib import Path
from cluster.registry import Registry
from cluster.storage import Storage
from serving.adapter_disk import AdapterDisk
url, cache, digest = json.loads(sys.argv[1])
registry = Registry(Storage(url))
def say(word):
    print(word, flush=True)
    sys.stdin.readline()
"""


@contextmanager
def process(registry: Registry, cache: Path, digest: str, body: str) -> Iterator[subprocess.Popen[str]]:
    """A Python process that says ready and waits for a line before it goes on with `body`."""
    arguments = json.dumps([registry.storage.root, str(cache), digest])
    with subprocess.Popen(
        [sys.executable, "-c", PROCESS + "say('ready')\n" + body, arguments],
        cwd=REPOSITORY,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as child:
        try:
            assert heard(child) == "ready"
            yield child
        finally:
            child.kill()


def heard(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    return child.stdout.readline().strip()


def tell(child: subprocess.Popen[str]) -> None:
    assert child.stdin is not None
    child.stdin.write("go\n")
    child.stdin.flush()


HOLD = """
copied = []
plain = registry.copy_adapter
registry.copy_adapter = lambda *a: (copied.append(1), plain(*a))
with AdapterDisk(registry, Path(cache)).hold(digest):
    say(f'held {len(copied)}')
say('released')
"""


def test_processes_of_a_node_fetch_once(registry: Counting, cache: Path, digests: list[str]) -> None:
    with ExitStack() as stack:
        children = [stack.enter_context(process(registry, cache, digests[0], HOLD)) for _ in range(3)]
        for child in children:
            tell(child)
        assert sorted(map(heard, children)) == ["held 0", "held 0", "held 1"]
    assert there(cache) == {digests[0]}


def test_what_another_process_holds_stays_until_it_is_killed(
    registry: Counting, cache: Path, digests: list[str]
) -> None:
    a, b, c, d = digests
    disk = AdapterDisk(registry, cache, limit=1)
    with process(registry, cache, a, HOLD) as child:
        tell(child)
        assert heard(child) == "held 1"
        use(disk, b)
        assert there(cache) == {a, b}
        use(disk, c)
        assert there(cache) == {a, c}
        child.send_signal(signal.SIGKILL)
        child.wait(30)
    use(disk, d)
    assert there(cache) == {d}


KILLED_FETCHING = """
plain = registry.copy_adapter
def half(digest, out):
    plain(digest, out)
    (out / 'adapter_config.json').unlink()
    say('half')
registry.copy_adapter = half
AdapterDisk(registry, Path(cache)).acquire(digest)
"""
KILLED_REMOVING = """
import shutil
disk = AdapterDisk(registry, Path(cache), limit=1)
def half(path, **_):
    (path / 'adapter_config.json').unlink()
    say('half')
shutil.rmtree = half
disk._remove(Path(cache) / digest)
"""


@pytest.mark.parametrize("body", [KILLED_FETCHING, KILLED_REMOVING], ids=["fetching", "removing"])
@pytest.mark.parametrize("back", ["same adapter", "start"])
def test_what_a_killed_process_leaves_is_removed(
    body: str, back: str, registry: Counting, cache: Path, digests: list[str]
) -> None:
    if body == KILLED_REMOVING:
        use(AdapterDisk(registry, cache), digests[0])
    with process(registry, cache, digests[0], body) as child:
        tell(child)
        assert heard(child) == "half"
        (left,) = there(cache)
        assert left.startswith(f".{digests[0]}.")
        AdapterDisk(registry, cache)
        assert there(cache) == {left}, "a living process is still at it"
        child.send_signal(signal.SIGKILL)
        child.wait(30)
    assert there(cache) == {left}
    disk = AdapterDisk(registry, cache) if back == "start" else AdapterDisk(registry, cache / "elsewhere")
    disk.directory = cache
    assert (there(cache) - {"elsewhere"} == set()) is (back == "start")
    with disk.hold(digests[0]) as directory:
        assert {*PEFT_FILES, MARKER} == {file.name for file in directory.iterdir()}
    assert there(cache) - {"elsewhere"} == {digests[0]}


# -- removed by hand, storage gone


@pytest.mark.parametrize("lost", ["everything", *PEFT_FILES, MARKER])
@pytest.mark.parametrize("held", [False, True], ids=["not held", "held"])
def test_what_was_removed_by_hand_is_fetched_again(
    lost: str, held: bool, registry: Counting, cache: Path, digests: list[str]
) -> None:
    a = digests[0]
    disk = AdapterDisk(registry, cache)
    use(disk, a)
    with ExitStack() as stack:
        if held:
            stack.enter_context(disk.hold(a))
        if lost == "everything":
            shutil.rmtree(cache / a)
        else:
            (cache / a / lost).unlink()
        with disk.hold(a) as directory:
            assert {file.name for file in directory.iterdir()} == {*PEFT_FILES, MARKER}
            assert disk._remove(directory) is False, "it is held, although it is not the directory of before"
    assert registry.copies == [a, a]
    assert disk._remove(cache / a) is True
    assert there(cache) == set()


def test_without_the_storage_what_is_here_is_served(
    registry: Counting, cache: Path, digests: list[str], tmp_path: Path
) -> None:
    use(AdapterDisk(registry, cache), digests[0])
    (tmp_path / "storage").rename(tmp_path / "away")
    (tmp_path / "storage").write_text("not a directory")
    disk = AdapterDisk(Registry(Storage(str(tmp_path / "storage"))), cache)
    with disk.hold(digests[0]):
        assert disk.card(digests[0]) == CARD
    with pytest.raises((NotFound, Unavailable)):
        disk.acquire(digests[1])
    (tmp_path / "storage").unlink()
    (tmp_path / "away").rename(tmp_path / "storage")
    use(disk, digests[1])


def test_an_adapter_that_is_not_in_the_registry_is_said(registry: Counting, cache: Path, digests: list[str]) -> None:
    disk = AdapterDisk(registry, cache)
    with pytest.raises(NotFound, match=rf"adapter {'e' * 12} is not in .*storage; publish it again"):
        disk.acquire("e" * 64)
    with disk.hold(digests[0]):
        registry.storage.delete(f"objects/adapters/{digests[0]}")
        use(disk, digests[0])
    registry.storage.delete(f"objects/adapters/{digests[1]}")
    with pytest.raises(NotFound, match="publish it again"):
        disk.acquire(digests[1])
    assert there(cache) == {digests[0]}


def test_damaged_files_are_not_kept(registry: Counting, cache: Path, digests: list[str]) -> None:
    registry.storage.write(f"objects/adapters/{digests[0]}/{WEIGHTS_FILE}", b"other bytes")
    with pytest.raises(Mismatch, match="damaged"):
        AdapterDisk(registry, cache).acquire(digests[0])
    assert there(cache) == set()


def test_handles_are_given_back(registry: Counting, cache: Path, digests: list[str]) -> None:
    disk = AdapterDisk(registry, cache)
    use(disk, *digests)
    before = len(os.listdir("/proc/self/fd"))
    with ExitStack() as held:
        for digest in [*digests, *digests]:
            held.enter_context(disk.hold(digest))
        assert len(os.listdir("/proc/self/fd")) == before + len(digests)
    assert len(os.listdir("/proc/self/fd")) == before


def test_two_makers_wait_for_each_other(registry: Counting, cache: Path, digests: list[str]) -> None:
    """The lock is the one that :mod:`cluster.materialize` takes; if that changes its name, removing races with fetching."""
    disk = AdapterDisk(registry, cache)
    use(disk, digests[0])
    with FileLock(cache / f".{digests[0]}.lock"):
        assert disk._remove(cache / digests[0]) is False
    assert (cache / f".{digests[0]}.lock").exists()
