"""What a GPU is used for, and what is said when there is not enough memory."""

from pathlib import Path
from typing import Any

import pytest
import torch

from training.flops import model_flops_utilization
from training.memory import as_resources_short


@pytest.mark.parametrize(
    ("device", "wanted"),
    [("NVIDIA H100 80GB HBM3", 0.3236), ("NVIDIA H100 PCIe", 0.4233), ("Some Other GPU", None)],
)
def test_utilization_counts_six_flops_for_what_is_trained_and_four_for_the_rest(
    device: str, wanted: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: device)
    assert model_flops_utilization(8 * 10**9, 0, 10_000) == wanted
    if wanted is not None:
        full = model_flops_utilization(8 * 10**9, 8 * 10**9, 10_000)
        assert full == pytest.approx(1.5 * wanted, abs=1e-3)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes"),
        MemoryError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_no_memory_is_told_with_the_plan_and_what_to_change(error: Exception, make_config: Any, tmp_path: Path) -> None:
    short = as_resources_short(error, make_config(f"models_cache={tmp_path}"))
    assert short is not None and short.exit_code == 6
    assert short.message.startswith("a training worker ran out of memory; ")
    assert "training." in short.message and "GiB" in short.message


def test_other_errors_are_left_alone(make_config: Any) -> None:
    assert as_resources_short(RuntimeError("shapes do not match"), make_config()) is None
