"""Memory in pages of 2 MiB, which a pass reads a quarter to a half faster than the usual ones of 4 KiB."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections.abc import Sequence

import torch

HUGE = 2 << 20
LINE = 64


def together(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Copies of `tensors`, one behind the other in the order given, each at the beginning of a cache line."""
    starts, size = [], 0
    for tensor in tensors:
        starts.append(size)
        size += -(-tensor.nbytes // LINE) * LINE
    area = _area(size)
    copies = []
    for start, tensor in zip(starts, tensors, strict=True):
        copy = area[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        copies.append(copy.copy_(tensor))
    return copies


def widen_pages(tensor: torch.Tensor) -> None:
    """Ask for large pages for the memory of `tensor`, none of which has been written yet."""
    first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (tensor.data_ptr() + tensor.nbytes - first) // mmap.PAGESIZE * mmap.PAGESIZE
    if length > HUGE:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), mmap.MADV_HUGEPAGE)


def _area(size: int) -> torch.Tensor:
    """uint8 ``[size]``; it lives as long as a view of it."""
    if size < HUGE:
        return torch.empty(size, dtype=torch.uint8)
    memory = mmap.mmap(-1, size + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # the kernel may not have them
        memory.madvise(mmap.MADV_HUGEPAGE)
    area = torch.frombuffer(memory, dtype=torch.uint8)
    skipped = -area.data_ptr() % HUGE
    return area[skipped : skipped + size]
