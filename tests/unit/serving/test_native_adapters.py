"""Residency of adapters, without the engine: who may come, who must stay, and that each pass speaks with its own."""

import copy
import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.errors import NotFound
from serving.engine.native.adapters import Adapters

A, B, C = "a" * 64, "b" * 64, "c" * 64
IDS = torch.tensor([[5, 80, 99, 7, 200]])
Expected = dict[str | None, torch.Tensor]


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS).logits


@pytest.fixture(scope="module")
def expected(base_model: Any, adapters: dict[str, Path]) -> Expected:
    """What the base and each adapter alone, through plain PEFT, make of the same ids."""
    from peft import PeftModel

    alone: Expected = {None: logits(base_model)}
    for digest, directory in adapters.items():
        alone[digest] = logits(PeftModel.from_pretrained(copy.deepcopy(base_model), directory).eval())
    assert all((alone[x] - alone[y]).abs().max() > 0.1 for x, y in itertools.combinations(alone, 2))
    return alone


def resident(base_model: Any, adapters: dict[str, Path], capacity: int) -> Adapters:
    made = Adapters(copy.deepcopy(base_model), capacity)
    for digest, directory in adapters.items():
        made.add(digest, directory)
    return made


def check(residency: Adapters, digest: str | None, expected: Expected) -> None:
    residency.activate(digest)
    torch.testing.assert_close(logits(residency.model), expected[digest], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("order", list(itertools.permutations([None, A, B])))
def test_each_speaks_for_itself_in_every_order(
    order: tuple[str | None, ...], base_model: Any, adapters: dict[str, Path], expected: Expected
) -> None:
    residency = resident(base_model, adapters, capacity=2)
    for digest in order:
        residency.lease(digest)
        check(residency, digest, expected)
    for digest in reversed(order):
        check(residency, digest, expected)


def test_the_base_speaks_as_before_while_an_adapter_is_resident(
    base_model: Any, adapters: dict[str, Path], expected: Expected
) -> None:
    residency = resident(base_model, adapters, capacity=1)
    residency.lease(A)
    check(residency, None, expected)
    residency.lease(A)
    check(residency, None, expected)


@pytest.mark.parametrize("active", [A, B, None])
def test_eviction_is_right_whoever_is_active(
    active: str | None, base_model: Any, adapters: dict[str, Path], expected: Expected
) -> None:
    residency = resident(base_model, adapters, capacity=2)
    for digest in (A, B):
        residency.lease(digest)
        residency.release(digest)
    residency.activate(active)
    residency.lease(C)
    assert list(residency.resident) == [B, C]
    for digest in (None, C, B, None, B):
        check(residency, digest, expected)


@pytest.mark.parametrize("capacity", [1, 2])
def test_a_long_history_of_leases_mixes_nothing_up(
    capacity: int, base_model: Any, adapters: dict[str, Path], expected: Expected
) -> None:
    chance = random.Random(7)
    residency = resident(base_model, adapters, capacity)
    leased: list[str | None] = []
    for _ in range(60):
        digest = chance.choice([None, A, B, C])
        if residency.can_lease(digest):
            residency.lease(digest)
            leased.append(digest)
        for held in dict.fromkeys(chance.sample(leased, len(leased))):
            check(residency, held, expected)
        if leased and chance.random() < 0.6:
            residency.release(leased.pop(chance.randrange(len(leased))))
        assert len(residency.resident) <= capacity
        assert {digest for digest in leased if digest} <= set(residency.resident)


@pytest.mark.parametrize("capacity", [1, 2])
def test_evicted_weights_leave_the_memory(capacity: int, base_model: Any, adapters: dict[str, Path]) -> None:
    residency = resident(base_model, adapters, capacity)
    for digest in (A, B, C, A, B, C):
        residency.lease(digest)
        residency.release(digest)
    held = {name for name in adapters for parameter, _ in residency.model.named_parameters() if name in parameter}
    assert held == set(residency.resident) == {C, B, A} - ({A, B} if capacity == 1 else {A})


def test_the_least_recently_leased_leaves_first(base_model: Any, adapters: dict[str, Path]) -> None:
    residency = resident(base_model, adapters, capacity=2)
    for digest in (A, B, A, C):
        residency.lease(digest)
        residency.release(digest)
    assert list(residency.resident) == [A, C]


def test_a_leased_adapter_stays(base_model: Any, adapters: dict[str, Path]) -> None:
    residency = resident(base_model, adapters, capacity=2)
    residency.lease(A)
    residency.lease(B)
    residency.release(B)
    residency.lease(C)
    assert list(residency.resident) == [A, C]
    assert not residency.can_lease(B)
    residency.lease(A)
    residency.release(A)
    assert not residency.can_lease(B)
    residency.release(A)
    assert residency.can_lease(B)


def test_the_base_needs_no_room(base_model: Any, adapters: dict[str, Path]) -> None:
    residency = resident(base_model, adapters, capacity=1)
    residency.lease(A)
    assert residency.can_lease(None)


def test_an_adapter_that_was_never_added_is_not_found(base_model: Any) -> None:
    residency = Adapters(base_model, 1)
    with pytest.raises(NotFound, match=f"adapter {'f' * 12} was not added"):
        residency.lease("f" * 64)
    assert not residency.resident


def test_an_adapter_that_does_not_fit_spoils_neither_base_nor_others(
    base_model: Any, adapters: dict[str, Path], expected: Expected, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    bad = "d" * 64
    (tmp_path / "adapter_config.json").write_bytes((adapters[B] / "adapter_config.json").read_bytes())
    tensors = load_file(adapters[B] / "adapter_model.safetensors")
    last = sorted(name for name in tensors if "lora_A" in name)[-1]
    tensors[last] = torch.zeros(2, 3)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    residency = resident(base_model, adapters, capacity=2)
    residency.add(bad, tmp_path)
    for _ in range(2):
        with pytest.raises(Exception, match=r"shape|size"):
            residency.lease(bad)
        assert bad not in residency.resident
        residency.lease(A)
        check(residency, A, expected)
        check(residency, None, expected)
