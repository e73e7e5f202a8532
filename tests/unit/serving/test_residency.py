"""Residency of adapters without the engine: read once, checked, in its slot while leased, gone in the right order, within its memory."""

from __future__ import annotations

import json
import random
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from safetensors.torch import load_file, save_file

from cluster.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from cluster.errors import BadInput, ConfigError, MetierError, Mismatch, NotFound, ResourcesShort, Unavailable
from serving.engine.native.executor import Memory, Part
from serving.engine.native.lora import LoraWeights, read_lora
from serving.engine.native.modules import ModulesExecutor
from serving.engine.native.residency import Residency

A, B, C, BAD = "a" * 64, "b" * 64, "c" * 64, "d" * 64
MAX_RANK = 8
PROMPT = [5, 80, 99, 7, 200]
read = partial(read_lora, dtype=torch.float32, max_rank=MAX_RANK)


class Shelf:
    """Keeps what is put into slots, for tests of who is where."""

    vocabulary, pages, page_tokens = 1, 1, 1

    def __init__(self, slots: int) -> None:
        self.memory = Memory(0, 0, slots * 10_000_000)
        self.slots: dict[int, LoraWeights] = {}
        self.thread = threading.get_ident()

    def forward(self, parts: Any) -> Any:
        raise NotImplementedError

    def check_adapter(self, weights: LoraWeights) -> None:
        """Everything fits."""

    def load_adapter(self, slot: int, weights: LoraWeights) -> None:
        assert threading.get_ident() == self.thread
        self.slots[slot] = weights

    def clear_adapter(self, slot: int) -> None:
        assert threading.get_ident() == self.thread
        del self.slots[slot]


def made(kilobytes: int = 1) -> LoraWeights:
    """Weights of so many bytes."""
    return LoraWeights(1, {"layer": (torch.zeros(1, 128 * kilobytes), torch.zeros(128 * kilobytes, 1))})


class Desk:
    """A residency over a shelf; the test is the engine's thread. Every directory is named as its digest is."""

    def __init__(
        self, slots: int, host_kilobytes: int = 100, *digests: str, size: Callable[[str], int] = lambda _: 1
    ) -> None:
        self.shelf = Shelf(slots)
        self.changed = threading.Condition()
        self.changes = 0
        self.weights: dict[str, LoraWeights] = {}
        self.size = size
        self.residency = Residency(self.shelf, slots=slots, host_bytes=host_kilobytes * 1024, read=self.read)
        for digest in digests:
            self.residency.add(digest, Path(digest))

    def read(self, directory: Path) -> LoraWeights:
        return self.weights.setdefault(directory.name, made(self.size(directory.name)))

    def change(self) -> None:
        with self.changed:
            self.changes += 1
            self.changed.notify_all()

    def fetch(self, digest: str) -> None:
        done = threading.Event()

        def told() -> None:
            done.set()
            self.change()

        self.residency.prefetch(digest, told)
        assert done.wait(30)

    def lease(self, digest: str | None) -> int | None:
        """A lease, with what comes before it."""
        if digest is not None:
            self.fetch(digest)
        while True:
            before = self.changes
            if self.residency.state(digest) == "ready":
                assert self.residency.can_lease(digest)
                return self.residency.lease(digest)
            with self.changed:
                assert self.changed.wait_for(lambda before=before: self.changes > before, 30)

    def use(self, *digests: str) -> None:
        for digest in digests:
            self.lease(digest)
            self.residency.release(digest)


# -- who stays, who goes


def test_the_least_recently_leased_leaves_first() -> None:
    desk = Desk(2, 100, A, B, C)
    desk.use(A, B, A, C)
    assert desk.residency.resident() == (A, C)
    assert desk.residency.hosted() == (B,)


def test_an_adapter_comes_back_from_host_memory_without_another_read() -> None:
    desk = Desk(1, 100, A, B)
    desk.use(A, B, A, B, A)
    assert desk.residency.loads == 2


def test_a_leased_adapter_stays() -> None:
    desk = Desk(2, 100, A, B, C)
    residency = desk.residency
    desk.lease(A)
    desk.use(B)
    desk.lease(C)
    assert residency.resident() == (A, C)
    desk.fetch(B)
    assert residency.state(B) == "ready"
    assert not residency.can_lease(B)
    assert residency.lease(A) is not None
    residency.release(A)
    assert not residency.can_lease(B)
    residency.release(A)
    assert residency.can_lease(B)


def test_the_base_needs_no_room() -> None:
    desk = Desk(1, 100, A)
    desk.lease(A)
    assert desk.residency.state(None) == "ready"
    assert desk.residency.can_lease(None)
    assert desk.residency.lease(None) is None
    desk.residency.release(None)


def test_an_adapter_that_was_never_added_is_not_found() -> None:
    residency = Desk(1).residency
    asked: list[Callable[[], Any]] = [
        lambda: residency.prefetch(A, print),
        lambda: residency.state(A),
        lambda: residency.lease(A),
        lambda: residency.pin(A),
    ]
    for ask in asked:
        with pytest.raises(NotFound, match=f"adapter {'a' * 12} was not added"):
            ask()
    assert not residency.known(A)


def test_a_pinned_adapter_stays_and_no_more_are_pinned_than_there_are_slots() -> None:
    desk = Desk(2, 100, A, B, C)
    residency = desk.residency
    residency.pin(A)
    desk.use(A, B, C, B, C)
    assert set(residency.resident()) == {A, C}
    residency.pin(C)
    residency.pin(C)
    with pytest.raises(ConfigError, match=r"2 others are, in as many slots.*adapters_resident") as refused:
        residency.pin(B)
    assert refused.value.param == "serving.generator.pinned_adapters"
    with pytest.raises(ResourcesShort, match="pinned adapters have all 2"):
        residency.state(B)
    residency.unpin(A)
    desk.use(B)
    assert set(residency.resident()) == {B, C}


def test_a_dropped_adapter_serves_its_leases_to_the_end_and_nobody_else() -> None:
    desk = Desk(2, 100, A, B)
    residency = desk.residency
    slot = desk.lease(A)
    assert slot is not None
    residency.drop(A)
    assert not residency.known(A)
    assert residency.resident() == residency.hosted() == ()
    assert desk.shelf.slots == {slot: desk.weights[A]}
    with pytest.raises(NotFound):
        residency.state(A)
    with pytest.raises(NotFound):
        residency.lease(A)
    residency.release(A)
    assert desk.shelf.slots == {}

    desk.use(B)
    residency.drop(B)
    residency.state(None)
    assert residency.can_lease(None)
    residency.add(A, Path(A))
    desk.use(A)
    assert list(desk.shelf.slots.values()) == [desk.weights[A]]


def test_an_adapter_that_is_added_again_while_it_is_leased_is_whole() -> None:
    desk = Desk(1, 100, A)
    slot = desk.lease(A)
    desk.residency.drop(A)
    desk.residency.add(A, Path(A))
    assert desk.lease(A) == slot
    for _ in range(2):
        desk.residency.release(A)
    assert desk.residency.resident() == (A,)
    assert len(desk.shelf.slots) == 1


def test_a_read_that_ends_after_the_adapter_was_dropped_keeps_nothing() -> None:
    desk = Desk(1, 100, A)
    inside, go_on = threading.Event(), threading.Event()
    plain = desk.read

    def slow(directory: Path) -> LoraWeights:
        inside.set()
        assert go_on.wait(30)
        return plain(directory)

    desk.residency._read = slow
    done = threading.Event()
    desk.residency.prefetch(A, done.set)
    assert inside.wait(30)
    desk.residency.drop(A)
    go_on.set()
    assert done.wait(30)
    assert desk.residency.hosted() == ()
    assert desk.residency.hosted_bytes == 0


def test_a_slot_that_could_not_be_written_is_free_again(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(1, 100, A)

    def fail(slot: int, weights: LoraWeights) -> None:
        desk.shelf.slots[slot] = weights
        raise RuntimeError("device is lost")

    with monkeypatch.context() as patch:
        patch.setattr(desk.shelf, "load_adapter", fail)
        with pytest.raises(RuntimeError, match="device is lost"):
            desk.lease(A)
    assert desk.shelf.slots == {}
    assert desk.residency.resident() == ()
    desk.use(A)
    assert desk.residency.resident() == (A,)


# -- reading


def test_sixteen_threads_that_ask_for_one_adapter_make_one_read() -> None:
    desk = Desk(1, 100, A)
    everybody = threading.Barrier(17)
    reads: list[Path] = []
    plain = desk.read

    def slow(directory: Path) -> LoraWeights:
        reads.append(directory)
        everybody.wait(30)  # until all have asked
        return plain(directory)

    desk.residency._read = slow
    told = [threading.Event() for _ in range(16)]

    def ask(event: threading.Event) -> None:
        desk.residency.prefetch(A, event.set)
        everybody.wait(30)

    threads = [threading.Thread(target=ask, args=(event,)) for event in told]
    for thread in threads:
        thread.start()
    assert all(event.wait(30) for event in told)
    for thread in threads:
        thread.join(30)
    assert reads == [Path(A)]
    assert desk.residency.loads == 1
    assert desk.residency.state(A) == "ready"


def test_who_asks_for_what_is_there_is_told_at_once() -> None:
    desk = Desk(1, 100, A)
    desk.use(A)
    told: list[str] = []
    desk.residency.prefetch(A, lambda: told.append("resident"))
    desk.residency.drop(A)
    desk.residency.add(A, Path(A))
    assert told == ["resident"]


def test_an_unexpected_failure_is_a_sentence_and_everybody_gets_it() -> None:
    desk = Desk(1, 100, A)

    def fail(directory: Path) -> LoraWeights:
        raise OSError(5, "Input/output error")

    plain, desk.residency._read = desk.residency._read, fail
    desk.fetch(A)
    seen = []
    for _ in range(3):
        with pytest.raises(Unavailable, match=f"adapter {'a' * 12} cannot be read.*Input/output error") as failed:
            desk.residency.state(A)
        seen.append(failed.value)
    assert len(set(map(id, seen))) == 3, "an error that several tasks raise at once would mix up their tracebacks"
    desk.residency._read = plain
    desk.use(A)


def test_who_asks_anew_is_not_given_the_old_error() -> None:
    desk = Desk(1, 0, A, B)
    inside, go_on = threading.Event(), threading.Event()
    plain = desk.read

    def fail(directory: Path) -> LoraWeights:
        raise BadInput("damaged")

    def slow(directory: Path) -> LoraWeights:
        inside.set()
        assert go_on.wait(30)
        return plain(directory)

    desk.residency._read = fail
    desk.fetch(A)
    desk.residency._read = slow
    done = threading.Event()
    desk.residency.prefetch(A, done.set)
    assert inside.wait(30)
    assert desk.residency.state(A) == "loading"
    go_on.set()
    assert done.wait(30)
    desk.use(A, B)
    assert (desk.residency.resident(), desk.residency.hosted()) == ((B,), ())
    assert desk.residency.state(A) == "loading", "it is read once more"


# -- memory


def test_two_hundred_random_loads_stay_within_the_budget() -> None:
    chance = random.Random(11)
    digests = [f"{number:064x}" for number in range(40)]
    sizes = {digest: chance.randrange(1, 20) for digest in digests}
    desk = Desk(4, 50, *digests, size=sizes.__getitem__)
    leased: list[str] = []
    while desk.residency.loads < 200:
        digest = chance.choice(digests)
        desk.fetch(digest)
        assert desk.residency.hosted_bytes <= 50 * 1024
        if desk.residency.state(digest) == "ready" and desk.residency.can_lease(digest):
            desk.residency.lease(digest)
            leased.append(digest)
        assert desk.residency.hosted_bytes <= 50 * 1024
        if len(leased) > 3 or chance.random() < 0.5:
            desk.residency.release(leased.pop(chance.randrange(len(leased)))) if leased else None
        assert len(desk.shelf.slots) <= 4
        held = sum(desk.weights[each].bytes for each in desk.residency.hosted())
        assert held <= desk.residency.hosted_bytes


@pytest.mark.parametrize("budget", [0, 1, 3])
def test_with_next_to_no_memory_everybody_still_gets_a_turn(budget: int) -> None:
    digests = [f"{number:064x}" for number in range(12)]
    desk = Desk(2, budget, *digests, size=lambda _: 2)
    for digest in digests:
        desk.residency.prefetch(digest, desk.change)
    waiting = list(digests)
    while waiting:
        before = desk.changes
        ready = [digest for digest in waiting if desk.residency.state(digest) == "ready"]
        for digest in ready:
            if desk.residency.can_lease(digest):
                desk.residency.lease(digest)
                desk.residency.release(digest)
                waiting.remove(digest)
        if not ready:
            with desk.changed:
                assert desk.changed.wait_for(lambda before=before: desk.changes > before, 30)
        assert desk.residency.hosted_bytes <= max(budget, 2) * 1024


def test_an_adapter_larger_than_the_budget_is_held_alone_until_it_has_its_slot() -> None:
    desk = Desk(1, 4, A, B, C, size=lambda name: 9 if name == B else 2)
    desk.fetch(A)
    desk.fetch(C)
    assert desk.residency.hosted() == (A, C)
    desk.fetch(B)
    assert desk.residency.hosted() == (B,)
    desk.use(B)
    assert desk.residency.hosted() == ()
    assert desk.residency.hosted_bytes == 0


class Histories(RuleBasedStateMachine):
    """Any order of requests, pins and drops: what is leased is in its slot and whole, and memory stays within its bounds."""

    DIGESTS = tuple(f"{number:064x}" for number in range(6))

    @initialize(slots=st.integers(1, 3), budget=st.integers(0, 8))
    def begin(self, slots: int, budget: int) -> None:
        self.desk = Desk(slots, budget, *self.DIGESTS, size=lambda digest: 1 + int(digest, 16) % 3)
        self.slots, self.budget = slots, budget
        self.leased: list[tuple[str, int]] = []
        self.pinned: set[str] = set()
        self.known = set(self.DIGESTS)

    @rule(digest=st.sampled_from(DIGESTS))
    def ask(self, digest: str) -> None:
        residency = self.desk.residency
        if digest not in self.known:
            with pytest.raises(NotFound):
                residency.state(digest)
            return
        self.desk.fetch(digest)
        if len(self.pinned) >= self.slots and digest not in self.pinned and digest not in residency.resident():
            with pytest.raises(ResourcesShort):
                residency.state(digest)
            return
        held = {each for each, _ in self.leased} | (self.pinned & set(residency.resident()))
        room = digest in residency.resident() or len(held) < self.slots
        if residency.can_lease(digest):
            assert room
            slot = self.desk.lease(digest)
            assert slot is not None
            self.leased.append((digest, slot))
        else:
            assert len(residency.resident()) + len({d for d, _ in self.leased} - self.known) == self.slots
            assert digest not in residency.resident()

    @precondition(lambda self: self.leased)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        digest, _ = self.leased.pop(data.draw(st.integers(0, len(self.leased) - 1)))
        self.desk.residency.release(digest)

    @rule(digest=st.sampled_from(DIGESTS))
    def pin(self, digest: str) -> None:
        if digest not in self.known:
            return
        if digest in self.pinned or len(self.pinned) < self.slots:
            self.desk.residency.pin(digest)
            self.pinned.add(digest)
        else:
            with pytest.raises(ConfigError):
                self.desk.residency.pin(digest)

    @rule(digest=st.sampled_from(DIGESTS))
    def unpin(self, digest: str) -> None:
        self.desk.residency.unpin(digest)
        self.pinned.discard(digest)

    @rule(digest=st.sampled_from(DIGESTS))
    def drop(self, digest: str) -> None:
        self.desk.residency.drop(digest)
        self.known.discard(digest)
        self.pinned.discard(digest)

    @rule(digest=st.sampled_from(DIGESTS))
    def add(self, digest: str) -> None:
        self.desk.residency.add(digest, Path(digest))
        self.known.add(digest)

    @invariant()
    def what_is_leased_is_in_its_slot(self) -> None:
        if not hasattr(self, "desk"):
            return
        for digest, slot in self.leased:
            assert self.desk.shelf.slots[slot] is self.desk.weights[digest]
        taken = dict(self.leased)
        assert len(set(taken.values())) == len(taken), "two adapters share a slot"
        assert set(self.desk.shelf.slots) <= set(range(self.slots))
        assert {digest for digest, _ in self.leased} & self.known <= set(self.desk.residency.resident())

    @invariant()
    def memory_stays_within_its_bounds(self) -> None:
        if not hasattr(self, "desk"):
            return
        residency = self.desk.residency
        pins = sum(self.desk.size(digest) for digest in self.pinned - set(residency.resident()))
        assert residency.hosted_bytes <= max(self.budget, 3) * 1024 + pins * 1024
        assert len(residency.resident()) <= self.slots

    def teardown(self) -> None:
        if hasattr(self, "desk"):
            self.desk.residency.close()


Histories.TestCase.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
TestHistories = Histories.TestCase


# -- what is checked before an adapter is ready, on real files and a real model


@contextmanager
def real(base_model: Any, slots: int = 2) -> Iterator[tuple[ModulesExecutor, Residency]]:
    import copy

    executor = ModulesExecutor(
        copy.deepcopy(base_model),
        pages=8,
        page_tokens=16,
        slots=slots,
        max_rank=MAX_RANK,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    residency = Residency(executor, slots=slots, host_bytes=1 << 20, read=read)
    try:
        yield executor, residency
    finally:
        residency.close()


def fetched(residency: Residency, digest: str) -> None:
    done = threading.Event()
    residency.prefetch(digest, done.set)
    assert done.wait(30)


def logits(executor: ModulesExecutor, slot: int | None) -> torch.Tensor:
    """Of the token after :data:`PROMPT`."""
    return executor.forward([Part(PROMPT, 0, [0], slot)])[0]


@pytest.fixture(scope="module")
def expected(base_model: Any, adapters: dict[str, Path]) -> dict[str | None, torch.Tensor]:
    """What plain PEFT makes of the prompt, and the base alone."""
    import copy

    from peft import PeftModel

    ids = torch.tensor([PROMPT])
    with torch.inference_mode():
        alone: dict[str | None, torch.Tensor] = {None: base_model(input_ids=ids).logits[0, -1]}
        for digest, directory in adapters.items():
            model = PeftModel.from_pretrained(copy.deepcopy(base_model), directory).eval()
            alone[digest] = model(input_ids=ids).logits[0, -1]
    return alone


def rewritten(directory: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    tensors = change(load_file(directory / WEIGHTS_FILE))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / WEIGHTS_FILE)


def missing(directory: Path) -> None:
    (directory / WEIGHTS_FILE).unlink()


def gone(directory: Path) -> None:
    shutil.rmtree(directory)


def pickled(directory: Path) -> None:
    (directory / WEIGHTS_FILE).rename(directory / "adapter_model.bin")


def cut_short(directory: Path) -> None:
    data = (directory / WEIGHTS_FILE).read_bytes()
    (directory / WEIGHTS_FILE).write_bytes(data[: len(data) // 2])


def no_header(directory: Path) -> None:
    (directory / WEIGHTS_FILE).write_bytes(b"\x80\x04\x95" + b"x" * 500)


def other_base(directory: Path) -> None:
    rewritten(directory, lambda tensors: {name.replace("layers.1", "layers.9"): t for name, t in tensors.items()})


def other_shape(directory: Path) -> None:
    rewritten(directory, lambda tensors: {n: t.repeat(1, 2) if "lora_A" in n else t for n, t in tensors.items()})


def too_wide(directory: Path) -> None:
    def widened(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {n: t.repeat(3, 1) if "lora_A" in n else t.repeat(1, 3) for n, t in tensors.items()}

    rewritten(directory, widened)
    config = json.loads((directory / CONFIG_FILE).read_text())
    (directory / CONFIG_FILE).write_text(json.dumps(config | {"r": 3 * config["r"]}))


def huge(directory: Path) -> None:
    with (directory / WEIGHTS_FILE).open("r+b") as file:
        file.truncate(40 << 30)  # sparse: nothing of it may be read


def not_a_number(directory: Path) -> None:
    rewritten(directory, lambda tensors: tensors | {n: t * torch.nan for n, t in tensors.items() if "lora_B" in n})


DAMAGES: list[tuple[Callable[[Path], None], type[MetierError], str]] = [
    (missing, NotFound, r"adapter_model\.safetensors: no such file"),
    (gone, NotFound, r"its directory is not a PEFT adapter: it has no adapter_config\.json"),
    (pickled, BadInput, r"adapter_model\.bin is a pickle"),
    (cut_short, BadInput, r"adapter_model\.safetensors has \d+ bytes, its header says \d+"),
    (no_header, BadInput, r"adapter_model\.safetensors is not a safetensors file"),
    (other_base, Mismatch, r"adapts 'model\.layers\.9.*proj', which is no linear layer of this base"),
    (other_shape, Mismatch, r"'model\.layers\..*proj' maps \d+ to \d+ features, this base model's"),
    (too_wide, Mismatch, r"r is 24 in adapter_config\.json.*max_rank"),
    (
        huge,
        Mismatch,
        r"adapter_model\.safetensors has 42949\.7 MB.*has at most .* MB at rank serving\.generator\.max_rank",
    ),
    (not_a_number, Mismatch, r"'model\.layers\..*proj' holds values that float32 cannot"),
]


@pytest.mark.parametrize(("damage", "kind", "sentence"), DAMAGES, ids=[damage.__name__ for damage, *_ in DAMAGES])
def test_what_cannot_be_served_is_a_sentence_and_others_are_served(
    damage: Callable[[Path], None],
    kind: type[MetierError],
    sentence: str,
    base_model: Any,
    adapters: dict[str, Path],
    expected: dict[str | None, torch.Tensor],
    tmp_path: Path,
) -> None:
    bad = tmp_path / "adapter"
    shutil.copytree(adapters[C], bad)
    damage(bad)
    with real(base_model) as (executor, residency):
        residency.add(A, adapters[A])
        residency.add(BAD, bad)
        fetched(residency, A)
        slot = residency.lease(A)
        fetched(residency, BAD)
        for _ in range(2):  # each of two who waited
            with pytest.raises(kind, match=sentence) as refused:
                residency.state(BAD)
            assert str(tmp_path) not in str(refused.value), "a client would see a path of this machine"
            assert str(refused.value).startswith(f"adapter {BAD[:12]}: ")
        assert residency.resident() == (A,)
        assert residency.hosted() == ()
        torch.testing.assert_close(logits(executor, slot), expected[A], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(logits(executor, None), expected[None], rtol=1e-4, atol=1e-4)

        shutil.rmtree(bad, ignore_errors=True)
        shutil.copytree(adapters[C], bad)
        fetched(residency, BAD)
        assert residency.state(BAD) == "ready"
        mended = residency.lease(BAD)
        torch.testing.assert_close(logits(executor, mended), expected[C], rtol=1e-4, atol=1e-4)


def test_nothing_of_a_huge_file_is_read(base_model: Any, adapters: dict[str, Path], tmp_path: Path) -> None:
    bad = tmp_path / "adapter"
    shutil.copytree(adapters[A], bad)
    huge(bad)
    opened: list[Path] = []
    with real(base_model) as (_, residency):
        residency._read = lambda directory: opened.append(directory) or read(directory)  # type: ignore[func-returns-value]
        residency.add(BAD, bad)
        fetched(residency, BAD)
        with pytest.raises(Mismatch, match="MB"):
            residency.state(BAD)
    assert opened == []


def test_the_largest_adapter_that_is_served_is_not_too_large(base_model: Any, tmp_path: Path) -> None:
    from copy import deepcopy

    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=MAX_RANK, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(deepcopy(base_model), config).save_pretrained(tmp_path)
    with real(base_model) as (_, residency):
        residency.add(A, tmp_path)
        fetched(residency, A)
        assert residency.state(A) == "ready"


def test_each_has_its_own_weights_through_a_long_history_of_evictions(
    base_model: Any, adapters: dict[str, Path], expected: dict[str | None, torch.Tensor]
) -> None:
    chance = random.Random(7)
    with real(base_model, slots=2) as (executor, residency):
        for digest, directory in adapters.items():
            residency.add(digest, directory)
        leased: list[tuple[str, int | None]] = []
        for _ in range(60):
            digest = chance.choice([A, B, C])
            fetched(residency, digest)
            if residency.state(digest) == "ready" and residency.can_lease(digest):
                leased.append((digest, residency.lease(digest)))
            for held, slot in leased:
                torch.testing.assert_close(logits(executor, slot), expected[held], rtol=1e-4, atol=1e-4)
            if leased and chance.random() < 0.6:
                residency.release(leased.pop(chance.randrange(len(leased)))[0])
