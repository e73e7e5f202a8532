"""Weights as the kernels read them: in panels (``dot.h`` has the layout), or in 8 or 4 bits (``quant.h``).

Rounding is symmetric, to nearest: groups of 64 weights share a scale for int8, groups of 32 for int4, where of several scales
around the largest weight the one with the least squared error is taken. Not covered: calibration on data.
"""

from __future__ import annotations

import torch

GROUP = 64
PANEL = 16
SHRINK = (1.0, 0.9, 0.8)
"""Shares of the largest weight of a group that are tried as its end of scale, with 4 bits."""


def panels(weight: torch.Tensor) -> torch.Tensor:
    """``weight [out, in]`` in panels of 16 rows, ``[out / 16, in / W, 16, W]`` where W values fill 32 bits; rows are filled up."""
    outputs, inputs = weight.shape
    lanes = 4 // weight.itemsize
    padded = torch.nn.functional.pad(weight, (0, 0, 0, -outputs % PANEL))
    return padded.view(-1, PANEL, inputs // lanes, lanes).transpose(1, 2)


def pack(weight: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed ``weight [out, in]`` and its scales.

    Returns:
        uint8 ``[out, in × bits / 8]`` and bfloat16 ``[out, in / 64]`` (int8) or ``[out, in / 32]`` (int4).
    """
    outputs, inputs = weight.shape
    width, most = (GROUP, 127) if bits == 8 else (GROUP // 2, 7)
    groups = weight.float().view(outputs, -1, width)
    largest = groups.abs().amax(-1, keepdim=True)
    best, error = None, None
    for share in SHRINK if bits == 4 else (1.0,):
        scale = (largest * share / most).bfloat16().float().clamp_min(1e-12)
        rounded = (groups / scale).round_().clamp_(-most - 1, most)
        wrong = (rounded * scale - groups).square().sum(-1, keepdim=True)
        if best is None or error is None:
            best, error, scales = rounded, wrong, scale
        else:
            better = wrong < error
            best, scales = torch.where(better, rounded, best), torch.where(better, scale, scales)
            error = torch.minimum(wrong, error)
    assert best is not None
    if bits == 8:
        packed = (best + 128).to(torch.uint8).view(outputs, inputs)
    else:
        nibbles = (best + 8).to(torch.uint8).view(outputs, -1, 2, GROUP // 2)
        packed = (nibbles[:, :, 0] | (nibbles[:, :, 1] << 4)).view(outputs, inputs // 2)
    return packed.contiguous(), scales.view(outputs, -1).bfloat16().contiguous()
