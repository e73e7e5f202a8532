"""LoRA adapters as they are read and as they lie in slots: every token has its own, whatever was loaded and left before."""

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
from cluster.errors import BadInput, Mismatch, NotFound
from serving.engine.native.lora import FEW, LoraBank, LoraWeights, read_lora

A, B, C = "a" * 64, "b" * 64, "c" * 64
IDS = torch.tensor([[5, 80, 99, 7, 200]])
Expected = dict[str | None, torch.Tensor]


def logits(model: Any, rows: int = 1) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS.expand(rows, -1)).logits


@pytest.fixture(scope="module")
def expected(base_model: Any, adapters: dict[str, Path]) -> Expected:
    """What the base and each adapter alone, through plain PEFT, make of the same ids."""
    from peft import PeftModel

    alone: Expected = {None: logits(base_model)[0]}
    for digest, directory in adapters.items():
        alone[digest] = logits(PeftModel.from_pretrained(copy.deepcopy(base_model), directory).eval())[0]
    assert all((alone[x] - alone[y]).abs().max() > 0.1 for x, y in itertools.combinations(alone, 2))
    return alone


def read(directory: Path) -> LoraWeights:
    return read_lora(directory, dtype=torch.float32, max_rank=8)


def bank(base_model: Any, slots: int) -> LoraBank:
    return LoraBank(copy.deepcopy(base_model), slots=slots, max_rank=8, dtype=torch.float32, device=torch.device("cpu"))


def check(made: LoraBank, rows: Sequence[tuple[int | None, torch.Tensor]]) -> None:
    """One pass over the same ids for each of `rows` (slot, wanted logits)."""
    made.aim([(IDS.shape[1], slot) for slot, _ in rows])
    with torch.inference_mode():
        got = logits(made.model, len(rows))
    for row, (_, wanted) in zip(got, rows, strict=True):
        torch.testing.assert_close(row, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("order", list(itertools.permutations([A, B, C])))
def test_each_row_has_its_own_whatever_was_loaded_first(
    order: tuple[str, ...], base_model: Any, adapters: dict[str, Path], expected: Expected
) -> None:
    made = bank(base_model, slots=3)
    rows: list[tuple[int | None, torch.Tensor]] = [(None, expected[None])]
    for slot, digest in enumerate(order):
        made.load(slot, read(adapters[digest]))
        rows.append((slot, expected[digest]))
        check(made, rows[-1:])
        check(made, rows)
        check(made, rows[::-1])


def test_all_ways_to_multiply_are_taken_and_agree(
    base_model: Any, adapters: dict[str, Path], expected: Expected
) -> None:
    """A product an adapter, one for all, and one over copied rows where many others lie between."""
    made = bank(base_model, slots=12)
    weights = {digest: read(adapters[digest]) for digest in (A, B, C)}
    made.load(0, weights[A])
    for slot in range(1, 9):
        made.load(slot, weights[C])
    made.load(9, weights[B])
    made.load(10, weights[A])
    own: list[tuple[int | None, torch.Tensor]] = [(0, expected[A]), (None, expected[None]), (9, expected[B])]
    check(made, own)
    assert [run.foreign is None for run in made.plan.runs] == [True, True]
    far = [*own, (10, expected[A])]
    check(made, far)
    (run,) = made.plan.runs
    assert isinstance(run.rows, torch.Tensor) and len(run.rows) == 4 + 2 + 4
    near: list[tuple[int | None, torch.Tensor]] = [(slot, expected[C]) for slot in range(1, 9)]
    check(made, near)
    (run,) = made.plan.runs
    assert run.rows == slice(4, 68) and run.foreign is not None
    long = [*far, *[(3, expected[C])] * (FEW // IDS.shape[1] + 1)]
    check(made, long)
    assert sorted(run.foreign is None for run in made.plan.runs) == [False, True]


def test_a_long_history_of_loads_mixes_nothing_up(
    base_model: Any, adapters: dict[str, Path], expected: Expected
) -> None:
    """Ranks 2, 4 and 8 in slots that are loaded over and cleared at random; the rows do for no more than the slots."""
    chance = random.Random(7)
    made = bank(base_model, slots=4)
    weights = {digest: read(adapters[digest]) for digest in (A, B, C)}
    room = made.bytes
    slots: dict[int, str] = {}
    moved = 0
    for _ in range(80):
        slot = chance.randrange(4)
        if chance.random() < 0.1:
            made.clear(slot)
            slots.pop(slot, None)
        else:
            before = dict(made.rows)
            slots[slot] = chance.choice([A, B, C, C, C, C])
            made.load(slot, weights[slots[slot]])
            moved += any(made.rows[other] != rows for other, rows in before.items() if other != slot)
        rows: list[tuple[int | None, torch.Tensor]] = [(slot, expected[digest]) for slot, digest in slots.items()]
        rows.append((None, expected[None]))
        check(made, chance.sample(rows, len(rows)))
    assert moved, "no gap was ever too narrow; this test would prove little"
    assert room == sum(layer.a.nbytes + layer.b.nbytes for layer in made.layers.values())


def test_the_base_is_not_touched_by_what_is_in_the_slots(
    base_model: Any, adapters: dict[str, Path], expected: Expected
) -> None:
    made = bank(base_model, slots=1)
    made.load(0, read(adapters[A]))
    made.aim([(IDS.shape[1], None)])
    assert torch.equal(logits(made.model)[0], expected[None])


# -- reading


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


def output(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"base_model.model.lm_head.lora_{side}.weight": torch.zeros(8, 8) for side in "AB"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (misshapen, r"'model\.layers\.1\..*proj' maps 3 to 64 features"),
        (misplaced, r"'model\.layers\.9\..*proj', which is no linear layer"),
        (output, "'lm_head', the output layer, which is not served"),
    ],
)
def test_an_adapter_without_a_place_in_the_model_is_refused(
    change: Callable[..., dict[str, torch.Tensor]],
    said: str,
    base_model: Any,
    adapters: dict[str, Path],
    tmp_path: Path,
) -> None:
    weights = read(copied(adapters[C], tmp_path, change))
    with pytest.raises(Mismatch, match=said):
        bank(base_model, slots=1).check(weights)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e39])
def test_values_that_are_not_finite_are_refused(value: float, adapters: dict[str, Path], tmp_path: Path) -> None:
    """1e39 is finite in the file and infinite in the base's precision."""

    def spoilt(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        last = sorted(name for name in tensors if "lora_B" in name)[-1]
        return tensors | {last: torch.full(tensors[last].shape, value, dtype=torch.float64)}

    with pytest.raises(Mismatch, match=r"'model\.layers\.1\..*proj' holds values that float32 cannot"):
        read(copied(adapters[C], tmp_path, spoilt))


def test_a_rank_over_the_largest_is_refused_by_its_name(adapters: dict[str, Path]) -> None:
    with pytest.raises(Mismatch, match=r"r is 8 in adapter_config\.json.*up to rank 7.*max_rank") as caught:
        read_lora(adapters[C], dtype=torch.float32, max_rank=7)
    assert caught.value.param == "r"


def test_files_that_are_no_adapter_are_refused(adapters: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        read(tmp_path)
    directory = copied(adapters[A], tmp_path, dict)
    (directory / "adapter_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(BadInput, match="is a pickle"):
        read(directory)
    (directory / "adapter_model.bin").unlink()
    whole = (directory / "adapter_model.safetensors").read_bytes()
    (directory / "adapter_model.safetensors").write_bytes(whole[:-8])
    with pytest.raises(BadInput, match="copy it again"):
        read(directory)


def test_weights_are_what_the_seam_says(adapters: dict[str, Path]) -> None:
    weights = read_lora(adapters[A], dtype=torch.bfloat16, max_rank=64)
    a, b = weights.modules["model.layers.1.mlp.down_proj"]
    assert weights.rank == 4 and a.shape == (4, 128) and b.shape == (64, 4)
    assert all(t.dtype == torch.bfloat16 and t.is_contiguous() for pair in weights.modules.values() for t in pair)
    assert weights.bytes == sum(2 * 4 * (a.shape[1] + b.shape[0]) for a, b in weights.modules.values())


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
    made = bank(base_model, slots=1)
    made.load(0, read(directory))
    check(made, [(0, expected[A])])


def test_rslora_is_scaled_as_peft_scales_it(
    base_model: Any, adapters: dict[str, Path], expected: Expected, tmp_path: Path
) -> None:
    from peft import PeftModel

    directory = copied(adapters[A], tmp_path, dict)
    settings = json.loads((directory / "adapter_config.json").read_text())
    (directory / "adapter_config.json").write_text(json.dumps(settings | {"use_rslora": True}))
    wanted = logits(PeftModel.from_pretrained(copy.deepcopy(base_model), directory).eval())[0]
    assert (wanted - expected[A]).abs().max() > 0.1
    made = bank(base_model, slots=2)
    made.load(0, read(directory))
    made.load(1, read(adapters[A]))
    check(made, [(0, wanted), (1, expected[A]), (None, expected[None])])
