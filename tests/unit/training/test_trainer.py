"""The loss that scores answer positions only is the loss over all logits."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from training.trainer import AnswerLossTrainer, SeededOrder

IGNORED = -100


@pytest.fixture
def model(tiny_llama: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)


def batch() -> dict[str, torch.Tensor]:
    """Three rows of 12 with answers of 4, 2 and 1 tokens at different places, the last two rows padded."""
    chance = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 250, (3, 12), generator=chance)
    mask, labels = torch.ones_like(ids), torch.full_like(ids, IGNORED)
    for row, (start, end) in enumerate([(8, 12), (6, 8), (9, 10)]):
        labels[row, start:end] = ids[row, start:end]
        mask[row, end:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def ours(model: Any, inputs: dict[str, torch.Tensor], processes: int = 1, **options: Any) -> Any:
    stand_in = SimpleNamespace(accelerator=SimpleNamespace(num_processes=processes))
    return AnswerLossTrainer.compute_loss(stand_in, model, inputs, **options)  # type: ignore[arg-type]


def whole(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Sum of the cross-entropies over all logits."""
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1]
    labels = inputs["labels"][:, 1:]
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(("count", "processes", "scale"), [(None, 1, 1 / 7), (20, 1, 1 / 20), (20, 2, 2 / 20)])
def test_value_and_gradients_are_those_of_all_logits(
    model: Any, count: int | None, processes: int, scale: float
) -> None:
    inputs = batch()
    loss = ours(model, inputs, processes, num_items_in_batch=count)
    expected = whole(model, inputs) * scale
    torch.testing.assert_close(loss, expected)
    wanted = gradients(model, expected)
    for name, gradient in gradients(model, loss).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-6, msg=name)


def test_only_positions_with_a_label_are_scored(model: Any) -> None:
    _, outputs = ours(model, batch(), return_outputs=True)
    assert outputs.logits.shape[:2] == (3, 6)


def test_a_batch_without_labels_costs_nothing(model: Any) -> None:
    inputs = batch() | {"labels": torch.full((3, 12), IGNORED)}
    assert ours(model, inputs).item() == 0.0


def test_the_order_of_rows_follows_seed_and_epoch_and_nothing_else() -> None:
    from transformers.trainer_pt_utils import LengthGroupedSampler

    def order(seed: int, epoch: int, disturbance: int) -> list[int]:
        torch.manual_seed(disturbance)
        sampler = SeededOrder(LengthGroupedSampler(2, lengths=[row % 7 + 1 for row in range(40)]), seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    first = order(1, 0, 5)
    assert sorted(first) == list(range(40))
    assert order(1, 0, 6) == first
    assert order(1, 1, 5) != first and order(2, 0, 5) != first


def test_packed_rows_do_not_see_each_other(model: Any) -> None:
    """Two rows in one sequence cost what they cost in a batch of two."""
    inputs = batch()
    ids, labels = inputs["input_ids"][:2], inputs["labels"][:2]
    apart = ours(model, {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)})
    positions = torch.arange(12).repeat(2)[None]
    packed = {"input_ids": ids.reshape(1, 24), "labels": labels.reshape(1, 24), "position_ids": positions}
    torch.testing.assert_close(ours(model, packed), apart)
    mixed = ours(model, packed | {"position_ids": torch.arange(24)[None]})
    assert (mixed - apart).abs().detach().item() > 1e-4, "without the positions they would"
