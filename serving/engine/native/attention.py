"""Grouped-query attention that reads the cache where it lies.

transformers' eager attention repeats keys and values for every query head before it multiplies; here the query
heads of a group are laid side by side instead, so nothing is copied.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface

NAME = "metier_grouped"


def grouped_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of ``query [rows, heads, q, d]`` over ``key, value [rows, kv_heads, t, d]``.

    Args:
        attention_mask: added to the scores, ``[rows or 1, 1, q, t]``; 0 where a key may be read, very low elsewhere.

    Returns:
        ``[rows, q, heads, d]`` and no weights, as transformers' attention interface wants it.
    """
    rows, heads, q, d = query.shape
    kv_heads, t = key.shape[1], key.shape[2]
    group = heads // kv_heads
    scale = d**-0.5 if scaling is None else scaling
    stacked = query.reshape(rows, kv_heads, group * q, d)
    scores = torch.matmul(stacked, key.transpose(-1, -2)).float() * scale
    if attention_mask is not None:
        scores = (scores.view(rows, kv_heads, group, q, t) + attention_mask[:, :, None]).view(
            rows, kv_heads, group * q, t
        )
    weights = torch.softmax(scores, dim=-1).to(value.dtype)
    mixed = torch.matmul(weights, value).view(rows, heads, q, d)
    return mixed.transpose(1, 2).contiguous(), None


def register() -> str:
    """Make the function known to transformers; returns the name to ask for it by."""
    AttentionInterface.register(NAME, grouped_attention)
    return NAME
