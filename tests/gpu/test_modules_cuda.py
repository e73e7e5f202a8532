"""The executor over transformers' modules on a GPU, against transformers and PEFT on the same GPU."""

from pathlib import Path

import pytest
import torch

from serving.engine.native.executor import Part
from serving.engine.native.lora import LoraWeights
from tests.decoders import SHAPES, check_mixed_batch, made
from tests.unit.serving.test_modules import executor

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


@pytest.mark.parametrize("kind", SHAPES)
def test_a_mixed_batch_is_each_sequence_alone(kind: str, tmp_path: Path) -> None:
    model = made(kind, **SHAPES[kind]).cuda()
    check_mixed_batch(executor(model), kind, model, tmp_path)


def test_sixty_four_adapters_decode_together() -> None:
    """Each row is what it is in a pass of its own."""
    ours = executor(made("llama").cuda(), slots=64, max_rank=8)
    chance = torch.Generator().manual_seed(3)
    for slot in range(64):
        modules = {
            name: (
                torch.randn(8, layer.a.shape[1], generator=chance) * 0.1,
                torch.randn(layer.b.shape[1], 8, generator=chance) * 0.1,
            )
            for name, layer in ours.bank.layers.items()
        }
        ours.load_adapter(slot, LoraWeights(8, modules))
    together = ours.forward([Part([5 + slot], 0, [slot], slot) for slot in range(64)])
    for slot in range(64):
        single = ours.forward([Part([5 + slot], 0, [64], slot)])
        torch.testing.assert_close(together[slot], single[0], rtol=1e-4, atol=1e-4)
