"""How much of a GPU's arithmetic a run uses (model FLOPs utilization, Chowdhery et al., 2022)."""

from __future__ import annotations

PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "T4": 65e12,
    "V100": 125e12,
}
"""Dense 16-bit FLOP/s by what is in the device's name, from the makers' data sheets; the first match counts."""


def model_flops_utilization(parameters: int, trained: int, tokens_per_s: float) -> float | None:
    """Share of this GPU's peak that `tokens_per_s` of one worker come to; None for a GPU that is not known.

    A token costs 2 FLOPs a parameter forward, 2 to hand gradients back through it, and 2 more where it is trained.
    Attention scores and what gradient checkpointing computes again are not counted, as is usual.
    """
    import torch

    name = torch.cuda.get_device_name()
    peak = next((peak for key, peak in PEAKS.items() if key in name), None)
    return None if peak is None else round((4 * parameters + 2 * trained) * tokens_per_s / peak, 4)
