"""The executor over transformers' modules against transformers and PEFT themselves, sequence by sequence alone."""

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.config import Config
from cluster.errors import ResourcesShort
from cluster.models import load_tokenizer
from serving.engine.native import attention
from serving.engine.native.cache import cache_pages, page_bytes
from serving.engine.native.executor import Part
from serving.engine.native.load import eos_ids, load_executor
from serving.engine.native.lora import LoraWeights, read_lora
from serving.engine.native.modules import ModulesExecutor
from tests.decoders import PAGE, SHAPES, WINDOW, Row, adapted, alone, check_mixed_batch, made, rows, run

CPU = torch.device("cpu")


def executor(model: Any, *, pages: int = 128, slots: int = 3, max_rank: int = 8) -> ModulesExecutor:
    """Ours over a copy of `model`, where that is and in its precision."""
    ours = copy.deepcopy(model)
    ours.set_attn_implementation(attention.register())
    like = next(ours.parameters())
    return ModulesExecutor(
        ours,
        pages=pages,
        page_tokens=PAGE,
        slots=slots,
        max_rank=max_rank,
        device=like.device,
        dtype=like.dtype,
    )


@pytest.mark.parametrize("kind", SHAPES)
def test_a_mixed_batch_is_each_sequence_alone(kind: str, tmp_path: Path) -> None:
    model = made(kind, **SHAPES[kind])
    check_mixed_batch(executor(model), kind, model, tmp_path)


@pytest.fixture(scope="module")
def llama() -> Any:
    return made("llama")


def test_bfloat16_is_within_the_noise_of_bfloat16(llama: Any, tmp_path: Path) -> None:
    """The same rounding in another order: no further from fp32 than twice transformers' own bfloat16 is."""
    from peft import PeftModel

    low = copy.deepcopy(llama).to(torch.bfloat16)
    ours = executor(low)
    directory = adapted(llama, "llama", tmp_path)["some"]
    ours.load_adapter(1, read_lora(directory, dtype=torch.bfloat16, max_rank=8))
    batch = rows([None, 1, None, 1])
    run(ours, batch, tokens=6)
    worst, noise = 0.0, 0.0
    for row in batch:
        exact, theirs = (
            model if row.slot is None else PeftModel.from_pretrained(copy.deepcopy(model), directory).eval()
            for model in (llama, low)
        )
        wanted = alone(exact, row.prompt, row.made)
        worst = max(worst, float((torch.stack(row.logits) - wanted).norm() / wanted.norm()))
        noise = max(noise, float((alone(theirs, row.prompt, row.made) - wanted).norm() / wanted.norm()))
    assert 0 < worst < 2 * noise < 0.2


def test_sequences_of_very_different_length_read_in_groups(llama: Any) -> None:
    ours = executor(llama, pages=256)
    chance = random.Random(5)
    pages = chance.sample(range(256), 256)
    batch = []
    for length in (230, 3, 9, 225, 2, 17):
        prompt = [chance.randrange(3, 199) for _ in range(length)]
        batch.append(Row(prompt, None, 64, [pages.pop() for _ in range(-(-(length + 3) // PAGE))]))
    run(ours, batch, tokens=1)
    parts = [row.part() for row in batch]
    reads = attention.Layout(parts, ours.cache, CPU).of(None, torch.float32).newest
    assert sorted(len(read.mask) for read in reads) == [2, 4]
    for row, part, logits in zip(batch, parts, ours.forward(parts), strict=True):
        row.take(part, logits)
        torch.testing.assert_close(torch.stack(row.logits), alone(llama, row.prompt, row.made), rtol=2e-4, atol=2e-4)


def test_a_window_reads_its_own_pages_only() -> None:
    ours = executor(made("mistral", sliding_window=WINDOW))
    part = Part([7], 101, list(range(26)))
    (read,) = attention.Layout([part], ours.cache, CPU).of(WINDOW, torch.float32).newest
    assert read.mask.shape[-1] == 12 and int((read.mask == 0).sum()) == WINDOW
    assert set((read.pages // 2).tolist()) == {23, 24, 25}


def test_logits_come_for_those_who_want_them_in_the_order_of_the_parts(llama: Any) -> None:
    ours = executor(llama)
    single, chunk = Part([9], 0, [0]), Part([4, 5, 6], 0, [1])
    silent = Part([8, 7], 0, [2], logits=False)
    both = ours.forward([chunk, silent, single])
    assert both.shape == (2, ours.vocabulary) and both.dtype == torch.float32
    torch.testing.assert_close(both[0], alone(llama, [4, 5, 6], [0])[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(both[1], alone(llama, [9], [0])[0], rtol=1e-4, atol=1e-4)
    assert ours.forward([silent]).shape == (0, ours.vocabulary)


def test_a_prefix_that_lies_in_the_pages_of_another_is_read_there(llama: Any) -> None:
    ours = executor(llama)
    prefix = [11, 12, 13, 14, 15, 16, 17, 18]
    ours.forward([Part([*prefix, 20], 0, [5, 9, 2])])
    logits = ours.forward([Part([30, 31], 8, [5, 9, 7])])
    torch.testing.assert_close(logits[0], alone(llama, [*prefix, 30, 31], [0])[0], rtol=1e-4, atol=1e-4)


def test_what_is_not_a_number_stays_with_its_own_sequence(llama: Any) -> None:
    """One adapter overflows; its pages are used again, and its rows share passes with others."""
    ours = executor(llama)
    names = list(ours.bank.layers)
    huge = {
        name: (torch.full((2, layer.a.shape[1]), 3e38), torch.full((layer.b.shape[1], 2), 1e37))
        for name, layer in ours.bank.layers.items()
    }
    ours.load_adapter(0, LoraWeights(2, huge))
    for slot in (1, 2):
        layer = ours.bank.layers[names[0]]
        mild = {names[0]: (torch.full((2, layer.a.shape[1]), 0.1), torch.full((layer.b.shape[1], 2), 0.1))}
        ours.load_adapter(slot, LoraWeights(2, mild))
    spoilt = ours.forward([Part([5, 6, 7, 8, 9, 10], 0, [0, 1], 0)])
    assert not spoilt.isfinite().all()
    alone_ = ours.forward([Part([5], 0, [3], slot) for slot in (1, 2)])
    mixed = ours.forward([Part([5], 0, [4 + slot], slot) for slot in (0, 1, 2)])
    assert not mixed[0].isfinite().all()
    torch.testing.assert_close(mixed[1:], alone_, rtol=1e-5, atol=1e-5)
    again = Row([21, 22, 23, 24, 25], None, 3, [0, 1, 4])
    run(ours, [again], tokens=6)
    torch.testing.assert_close(torch.stack(again.logits), alone(llama, again.prompt, again.made), rtol=2e-4, atol=2e-4)


# -- memory and loading


def test_pages_are_what_the_settings_and_the_memory_give(make_config: Callable[..., Config], llama: Any) -> None:
    settings = ("base.context_tokens=1500", "serving.generator.batch_size=4")
    page = page_bytes(llama.config, 16, torch.float32)
    assert page == 2 * 2 * 2 * 16 * 16 * 4
    assert cache_pages(make_config(*settings), llama.config, 200 * page) == 100
    assert cache_pages(make_config(*settings), llama.config, 10**9) == 4 * 94, "no more than whole contexts"
    fixed = make_config(*settings, f"serving.generator.cache_bytes={page * 97 + 1}")
    assert cache_pages(fixed, llama.config, 0) == 97
    with pytest.raises(ResourcesShort, match="no room for one sequence") as caught:
        cache_pages(make_config(*settings), llama.config, 100 * page)
    assert caught.value.param == "serving.generator.cache_bytes"


def test_memory_is_taken_once_and_reported(llama: Any, tmp_path: Path) -> None:
    ours = executor(llama, pages=10, slots=2, max_rank=8)
    before = ours.memory
    assert before.cache == 10 * page_bytes(llama.config, PAGE, torch.float32)
    tensors = [tensor for layer in ours.bank.layers.values() for tensor in (layer.a, layer.b)]
    assert before.adapters == sum(tensor.nbytes for tensor in tensors)
    assert before.weights == sum(tensor.nbytes for tensor in (*llama.parameters(), *llama.buffers()))
    for slot, directory in enumerate(list(adapted(llama, "llama", tmp_path).values())[:2]):
        ours.load_adapter(slot, read_lora(directory, dtype=torch.float32, max_rank=8))
    now = [tensor for layer in ours.bank.layers.values() for tensor in (layer.a, layer.b)]
    assert all(new is old for new, old in zip(now, tensors, strict=True))


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_a_quantized_base_is_as_good_as_bitsandbytes_makes_it(
    quantization: str, make_config: Callable[..., Config], tiny_llama: Path, adapters: dict[str, Path]
) -> None:
    """The same quantized modules under transformers' and PEFT's own roof give the same."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    config = make_config(
        'serving.generator.kernels="off"',
        f"serving.generator.quantization={quantization}",
        "base.dtype=bfloat16",
    )
    ours = load_executor(config, tiny_llama)
    assert isinstance(ours, ModulesExecutor)
    plain = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16).eval()
    assert ours.memory.weights < sum(parameter.nbytes for parameter in plain.parameters())
    directory = adapters["b" * 64]
    ours.load_adapter(0, read_lora(directory, dtype=torch.bfloat16, max_rank=8))
    theirs = copy.deepcopy(ours.model)
    for name, layer in ours.bank.layers.items():
        theirs.set_submodule(name, copy.deepcopy(layer.base))
    theirs.set_attn_implementation("eager")
    ids = [5, 80, 99, 7, 200]
    got = [ours.forward([Part(ids, 0, [0], slot)])[0] for slot in (None, 0)]
    company = [Part(ids, 0, [1]), Part([77, 12, 150, 9, 18], 0, [2]), Part([201], 0, [3])]
    torch.testing.assert_close(ours.forward(company)[0], got[0], rtol=1e-3, atol=1e-3)
    base = alone(theirs, ids, [0])[0]
    tuned = alone(PeftModel.from_pretrained(theirs, directory).eval(), ids, [0])[0]
    assert (base - tuned).norm() > 0.2 * tuned.norm()
    for row, wanted in zip(got, (base, tuned), strict=True):
        assert (row - wanted).norm() < 0.05 * wanted.norm()


def test_an_answer_ends_where_model_or_tokenizer_say(tiny_llama: Path) -> None:
    tokenizer = load_tokenizer(tiny_llama)
    assert eos_ids(tiny_llama, tokenizer) == {2}
    tokenizer.eos_token = "<|endoftext|>"
    assert eos_ids(tiny_llama, tokenizer) == {0, 2}


def test_slots_that_the_memory_does_not_hold_are_refused(make_config: Callable[..., Config], tiny_llama: Path) -> None:
    config = make_config('serving.generator.kernels="off"', "serving.generator.adapters_resident=1000000000")
    with pytest.raises(ResourcesShort, match="adapters_resident"):
        load_executor(config, tiny_llama)
