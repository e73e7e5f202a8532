"""Our kernels against transformers and PEFT, and against the weights they round."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.errors import Mismatch, Unavailable
from serving.engine.native.executor import Part
from serving.engine.native.fused import library, packing
from serving.engine.native.fused.executor import FusedExecutor
from serving.engine.native.fused.shape import Unfit
from serving.engine.native.lora import LoraWeights, read_lora
from tests.decoders import SHAPES, WINDOW, adapted, alone, check_mixed_batch, made

FITTING = ["llama", "mistral", "qwen2", "qwen3", "phi3", "gemma", "gemma2", "gemma3_text", "granite", "smollm3"]
OTHERS = ["mixtral", "gpt_neox", "gpt2", "opt", "gpt_oss", "cohere2"]


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the kernels of this session are kept."""
    return tmp_path_factory.mktemp("kernels")


def executor(model: Any, kernels: Path, **settings: Any) -> FusedExecutor:
    usual: dict[str, Any] = {
        "pages": 128,
        "page_tokens": 16,
        "slots": 3,
        "max_rank": 8,
        "adapter_bytes": 0,
        "context": 128,
        "quantization": "none",
        "threads": 2,
        "cache": kernels,
    }
    return FusedExecutor(model, **{**usual, **settings})


def model_of(kind: str, **settings: Any) -> Any:
    return made(kind, **{"head_dim": 16, **SHAPES.get(kind, {}), **settings})


@pytest.mark.parametrize(("kind", "page_tokens"), [*((kind, 16) for kind in FITTING), ("llama", 32), ("mistral", 48)])
def test_a_mixed_batch_is_each_sequence_alone(kind: str, page_tokens: int, kernels: Path, tmp_path: Path) -> None:
    model = model_of(kind)
    check_mixed_batch(executor(model, kernels, page_tokens=page_tokens), kind, model, tmp_path)


@pytest.mark.parametrize("kind", OTHERS)
def test_other_shapes_are_left_to_transformers(kind: str, kernels: Path) -> None:
    with pytest.raises(Unfit, match=f"is of the kind {kind}"):
        executor(made(kind, **SHAPES[kind]), kernels)


def test_pages_that_no_vector_fills_are_left_to_transformers(kernels: Path) -> None:
    with pytest.raises(Unfit, match="pages of 8 tokens, which are no multiple of 16"):
        executor(model_of("llama"), kernels, page_tokens=8)


def test_a_model_that_says_something_else_is_refused(kernels: Path) -> None:
    model = model_of("llama")
    model.model.layers[1].mlp.act_fn = torch.nn.Tanh()  # not what its configuration says
    with pytest.raises(Unfit, match="gives other logits than transformers' modules"):
        executor(model, kernels)


def test_bfloat16_is_within_its_rounding(kernels: Path) -> None:
    model = model_of("llama").bfloat16()
    ours = executor(model, kernels)
    ids = [random.Random(5).randrange(3, 199) for _ in range(100)]
    logits = ours.forward([Part(ids, 0, range(25))])
    wanted = alone(model.float(), ids, [0])
    assert float((logits - wanted).norm() / wanted.norm()) < 0.05


@pytest.mark.parametrize("bits", [8, 4])
def test_packed_weights_compute_what_they_say(bits: int, kernels: Path) -> None:
    """Against a model whose weights are the rounded ones: what is left is the rounding of activations."""
    model = model_of("llama")
    ours = executor(model, kernels, quantization=f"int{bits}")
    rounded = {
        name: unpacked(*packing.pack(module.weight.detach(), bits), bits)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    ids = [random.Random(6).randrange(3, 199) for _ in range(40)]
    plain = alone(model, ids, [0])
    for name, weight in rounded.items():
        model.get_submodule(name).weight = torch.nn.Parameter(weight, requires_grad=False)
    wanted = alone(model, ids, [0])
    at_once = ours.forward([Part(ids, 0, range(10))])
    ours.forward([Part(ids[:-1], 0, range(10), logits=False)])
    one = ours.forward([Part(ids[-1:], 39, range(10))])
    for logits in (at_once, one):
        assert float((logits - wanted).norm() / wanted.norm()) < 0.05
    assert 0 < float((plain - wanted).norm() / plain.norm()) < (0.02 if bits == 8 else 0.4)


def unpacked(packed: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    if bits == 8:
        values = packed.float() - 128
    else:
        bytes_ = packed.view(len(packed), -1, 1, 32)
        values = torch.cat([bytes_ & 15, bytes_ >> 4], 2).flatten(1).float() - 8
    width = values.shape[1] // scales.shape[1]
    return values * scales.float().repeat_interleave(width, 1)


def test_adapters_come_and_go(kernels: Path, tmp_path: Path) -> None:
    model = model_of("llama")
    ours = executor(model, kernels)
    ids = list(range(3, 40))
    plain = ours.forward([Part(ids, 0, range(10))])
    first, second = (
        read_lora(directory, dtype=torch.float32, max_rank=8)
        for directory in list(adapted(model, "llama", tmp_path).values())[:2]
    )
    ours.load_adapter(1, first)
    with_first = ours.forward([Part(ids, 0, range(10), 1)])
    ours.load_adapter(1, second)
    with_second = ours.forward([Part(ids, 0, range(10), 1)])
    ours.clear_adapter(1)
    assert torch.equal(ours.forward([Part(ids, 0, range(10), 1)]), plain)
    assert len({tuple(logits[0].tolist()) for logits in (plain, with_first, with_second)}) == 3


def test_what_is_not_a_number_stays_with_its_own_sequence(kernels: Path) -> None:
    """Neither the rows beside it nor the next owners of its pages see any of it."""
    model = model_of("llama").bfloat16()
    ours = executor(model, kernels)
    ids = list(range(3, 40))
    alone = ours.forward([Part(ids, 0, range(10))])
    name = "model.layers.0.self_attn.v_proj"
    huge = torch.full((2, 64), 1e30, dtype=torch.bfloat16), torch.full((32, 2), 1e30, dtype=torch.bfloat16)
    ours.load_adapter(0, LoraWeights(2, {name: huge}))
    broken, beside = ours.forward([Part(ids, 0, range(20, 30), 0), Part(ids, 0, range(10))])
    assert not broken.isfinite().any()
    assert torch.equal(beside, alone[0])
    for length in (1, 2, 17, 36):
        ours.forward([Part(ids[:length], 0, range(20, 30), logits=False)])
        after = ours.forward([Part(ids[length:], length, range(20, 30))])
        torch.testing.assert_close(after, alone, rtol=0.05, atol=0.05)


def test_adapters_of_another_base_are_refused(kernels: Path) -> None:
    ours = executor(model_of("llama"), kernels)
    name = "model.layers.0.self_attn.q_proj"
    with pytest.raises(Mismatch, match=f"'{name}' maps 32 to 64 features, this base model's 64 to 64"):
        ours.check_adapter(LoraWeights(2, {name: (torch.zeros(2, 32), torch.zeros(64, 2))}))
    with pytest.raises(Mismatch, match="'lm_head', which is no linear layer in the blocks"):
        ours.check_adapter(LoraWeights(2, {"lm_head": (torch.zeros(2, 64), torch.zeros(199, 2))}))


def test_threads_agree(kernels: Path) -> None:
    model = model_of("mistral")
    ids = [random.Random(7).randrange(3, 199) for _ in range(WINDOW * 8)]
    one, many = (executor(model, kernels, threads=threads) for threads in (1, 5))
    assert torch.equal(one.forward([Part(ids, 0, range(18))]), many.forward([Part(ids, 0, range(18))]))


def test_kernels_are_compiled_once(kernels: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    library.load(kernels)
    file, *others = (kernels / "kernels").iterdir()
    before = file.stat().st_mtime_ns
    library.load(kernels)
    assert (file.stat().st_mtime_ns, others) == (before, [])
    monkeypatch.setenv("CXX", "no-such-compiler")
    library._key.cache_clear()
    with pytest.raises(Unavailable, match=r"no C\+\+ compiler \(no-such-compiler\).*serving.generator.kernels=off"):
        library.load(tmp_path)
    library._key.cache_clear()
