"""Residency of adapters, without the engine: who may come, who must stay, and that each row has its own."""

import asyncio
import copy
import itertools
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.adapter_files import check_adapter_files
from cluster.errors import Mismatch, NotFound
from serving.engine.base import GenerateRequest, Sampling
from serving.engine.native import NativeEngine
from serving.engine.native.adapters import Adapters

A, B, C, BAD = "a" * 64, "b" * 64, "c" * 64, "d" * 64
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


def check(residency: Adapters, digests: Sequence[str | None], expected: Expected) -> None:
    """One pass over the same ids for each of `digests`; every row is what its adapter alone would make of them."""
    residency.aim(digests)
    with torch.inference_mode():
        rows = residency.bank.model(input_ids=IDS.expand(len(digests), -1)).logits
    for digest, row in zip(digests, rows, strict=True):
        torch.testing.assert_close(row, expected[digest][0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("order", list(itertools.permutations([None, A, B])))
def test_each_row_has_its_own_whatever_was_loaded_first(
    order: tuple[str | None, ...], base_model: Any, adapters: dict[str, Path], expected: Expected
) -> None:
    residency = resident(base_model, adapters, capacity=2)
    for place, digest in enumerate(order, 1):
        residency.lease(digest)
        check(residency, [digest], expected)
        check(residency, order[:place], expected)
    check(residency, order[::-1] + order, expected)


def test_the_base_speaks_as_before_while_an_adapter_is_resident(
    base_model: Any, adapters: dict[str, Path], expected: Expected
) -> None:
    residency = resident(base_model, adapters, capacity=1)
    residency.lease(A)
    for _ in range(2):
        check(residency, [None, None], expected)
        check(residency, [A], expected)


@pytest.mark.parametrize("order", list(itertools.permutations([A, B, C])))
def test_a_wider_adapter_leaves_the_others_as_they_were(
    order: tuple[str, ...], base_model: Any, adapters: dict[str, Path], expected: Expected
) -> None:
    residency = resident(base_model, adapters, capacity=3)
    for digest in order:
        residency.lease(digest)
    check(residency, [*order, None], expected)


@pytest.mark.parametrize("capacity", [1, 2, 3])
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
        if leased:
            check(residency, chance.sample(leased, len(leased)), expected)
        if leased and chance.random() < 0.6:
            residency.release(leased.pop(chance.randrange(len(leased))))
        assert len(residency.resident) <= capacity
        assert {digest for digest in leased if digest} <= set(residency.resident)


def test_an_evicted_adapter_leaves_nothing_behind(
    base_model: Any, adapters: dict[str, Path], expected: Expected
) -> None:
    residency = resident(base_model, adapters, capacity=1)
    for digest in (C, B, A, B, C):  # they adapt different layers at different ranks
        residency.lease(digest)
        residency.release(digest)
        check(residency, [digest], expected)
        check(residency, [digest, None], expected)


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
    residency = resident(base_model, {}, capacity=1)
    with pytest.raises(NotFound, match=f"adapter {'f' * 12} was not added"):
        residency.lease("f" * 64)
    assert residency.can_lease(A)
    assert not residency.resident


# -- adapters from elsewhere


def copied(source: Path, out: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    """The adapter in `source` with its tensors changed."""
    from safetensors.torch import load_file, save_file

    (out / "adapter_config.json").write_bytes((source / "adapter_config.json").read_bytes())
    save_file(change(load_file(source / "adapter_model.safetensors")), out / "adapter_model.safetensors")
    return out


def misshapen(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    last = sorted(name for name in tensors if "lora_A" in name)[-1]
    return tensors | {last: torch.zeros(tensors[last].shape[0], 3)}


def misplaced(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.replace("layers.1", "layers.9"): tensor for name, tensor in tensors.items()}


def diverged(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    last = sorted(name for name in tensors if "lora_B" in name)[-1]
    return tensors | {last: torch.full_like(tensors[last], float("nan"))}


@pytest.mark.parametrize("change", [misshapen, misplaced, diverged])
@pytest.mark.parametrize("before", [[], [B]], ids=["first", "after another"])
def test_an_adapter_that_does_not_fit_spoils_neither_base_nor_others(
    change: Callable[..., dict[str, torch.Tensor]],
    before: list[str],
    base_model: Any,
    adapters: dict[str, Path],
    expected: Expected,
    tmp_path: Path,
) -> None:
    residency = resident(base_model, adapters, capacity=3)
    for digest in before:
        residency.lease(digest)
    residency.add(BAD, copied(adapters[C], tmp_path, change))
    for _ in range(2):
        with pytest.raises(Mismatch, match=r"model\.layers\..*proj"):
            residency.lease(BAD)
        check(residency, [*before, None], expected)
    for digest in (B, A):
        residency.lease(digest)
    check(residency, [A, None, B], expected)
    assert list(residency.resident) == [B, A]


@pytest.mark.parametrize(
    "rename",
    [lambda name: name.removeprefix("base_model.model."), lambda name: name.replace(".weight", ".default.weight")],
    ids=["no prefix", "with adapter name"],
)
def test_every_spelling_of_tensor_names_that_is_published_is_applied(
    rename: Callable[[str], str], base_model: Any, adapters: dict[str, Path], expected: Expected, tmp_path: Path
) -> None:
    directory = copied(adapters[A], tmp_path, lambda tensors: {rename(name): t for name, t in tensors.items()})
    check_adapter_files(directory)
    residency = resident(base_model, {A: directory}, capacity=1)
    residency.lease(A)
    check(residency, [A], expected)


# -- rsLoRA


@pytest.fixture(scope="module")
def rslora(base_model: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """An rsLoRA adapter of rank 4, its scale twice that of plain LoRA, and PEFT's model of it."""
    from peft import LoraConfig, PeftModel, get_peft_model

    config = LoraConfig(r=4, lora_alpha=4, use_rslora=True, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(copy.deepcopy(base_model), config)
    chance = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=chance) * 0.2
    directory = tmp_path_factory.mktemp("rslora")
    model.save_pretrained(directory)
    return directory, PeftModel.from_pretrained(copy.deepcopy(base_model), directory).eval()


def test_rslora_is_scaled_as_peft_scales_it(
    rslora: tuple[Path, Any], base_model: Any, adapters: dict[str, Path], expected: Expected, tmp_path: Path
) -> None:
    directory, peft = rslora
    with_it = expected | {BAD: logits(peft)}
    residency = resident(base_model, {A: adapters[A], BAD: directory}, capacity=2)
    for digest in (BAD, A):
        residency.lease(digest)
    check(residency, [BAD], with_it)
    check(residency, [A, BAD, None], with_it)

    plain = copied(directory, tmp_path, dict)
    settings = json.loads((plain / "adapter_config.json").read_text())
    (plain / "adapter_config.json").write_text(json.dumps(settings | {"use_rslora": False}))
    other = resident(base_model, {BAD: plain}, capacity=1)
    other.lease(BAD)
    with pytest.raises(AssertionError):
        check(other, [BAD], with_it)


def test_the_engine_decodes_rslora_to_the_tokens_of_peft(
    rslora: tuple[Path, Any], make_config: Callable[..., Any], tiny_llama: Path
) -> None:
    directory, peft = rslora
    prompt = tuple((31 * n) % 250 + 3 for n in range(20))
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        out = peft.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=2
        )
    wanted = [token for token in out[0, len(prompt) :].tolist() if token != 2]

    engine = NativeEngine(make_config("serving.generator.threads=1"), tiny_llama)
    engine.start()
    try:
        engine.add_adapter(BAD, directory)
        got = {adapter: asyncio.run(_answer(engine, prompt, adapter)) for adapter in (BAD, None)}
    finally:
        engine.stop()
    assert got[BAD] == wanted
    assert got[None] != wanted, "the adapter changes nothing; this test would prove nothing"


async def _answer(engine: NativeEngine, prompt: tuple[int, ...], adapter: str | None) -> list[int]:
    request = GenerateRequest("r", prompt, Sampling(12), adapter)
    return [token async for delta in engine.generate(request) for token in delta.token_ids]
