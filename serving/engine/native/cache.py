"""Keys and values of all running rows, allocated once: a slot a row, as long as the context.

:class:`SlotCache` is what transformers' models see as ``past_key_values``; before each forward pass :meth:`aim`
says which slots and positions the pass writes.
"""

from __future__ import annotations

from typing import Any

import torch


class SlotCache:
    """``keys[layer]`` and ``values[layer]`` are ``[slots, kv_heads, context, head_dim]``."""

    is_compileable = False

    def __init__(self, config: Any, slots: int, context: int, dtype: torch.dtype, device: torch.device) -> None:
        heads = config.num_key_value_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (slots, heads, context, width)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.slots = torch.zeros(0, dtype=torch.long, device=device)
        self.positions = torch.zeros(0, dtype=torch.long, device=device)
        self.reach = 0
        self.whole = False

    def aim(self, slots: torch.Tensor, positions: torch.Tensor, reach: int) -> None:
        """Direct the next pass.

        Args:
            slots: ``[rows]`` slot of each row.
            positions: ``[rows, q]`` positions that the pass computes and writes.
            reach: positions ``0 … reach-1`` are read.
        """
        self.slots, self.positions, self.reach = slots, positions, reach
        self.whole = len(slots) == self.keys[0].shape[0] and slots.tolist() == list(range(len(slots)))

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write ``[rows, kv_heads, q, d]`` of one layer; return what the rows may read, ``[rows, kv_heads, reach, d]``."""
        keys, values = self.keys[layer], self.values[layer]
        slots = self.slots[:, None]
        keys[slots, :, self.positions] = key.transpose(1, 2)
        values[slots, :, self.positions] = value.transpose(1, 2)
        if self.whole:
            return keys[:, :, : self.reach], values[:, :, : self.reach]
        return keys[self.slots, :, : self.reach], values[self.slots, :, : self.reach]

    def get_seq_length(self, layer: int = 0) -> int:
        """Not used: positions and mask are passed in."""
        return 0
