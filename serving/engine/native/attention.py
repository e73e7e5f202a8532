"""Attention over pages: what one pass writes and reads, and the function that transformers' models call for it.

The tokens of all sequences lie one behind the other in one row; :class:`Layout` holds the index tensors that say which
page each of them is written to and which pages it reads. Tokens that decode read together, over a copy of their pages
that is as long as the longest of them (sequences of very different length in groups); each prompt chunk reads by itself.
Keys and values are never repeated for the query heads that share them.

Covered: grouped queries, sliding windows (a layer reads the pages of its window only), soft-capped scores (Gemma 2),
attention sinks (GPT-OSS). Not covered: biases of positions on the scores (ALiBi, T5), chunked attention (Llama 4).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from serving.engine.native.cache import PagedCache
from serving.engine.native.executor import Part

NAME = "metier_paged"
APART = 2
"""Sequences whose longest reads so many times more pages than they do get a group of their own."""
WORTH = 64
"""Pages that such a group must save."""


@dataclass(frozen=True)
class Read:
    """One reading: by the newest tokens of some sequences, or by the tokens of one chunk."""

    tokens: slice | torch.Tensor
    """Where the queries lie in the pass."""
    pages: torch.Tensor | None
    """``[sequences × kv_heads × pages]`` rows of the cache seen as ``[pages × kv_heads, page_tokens × head_dim]``; ``None``
    where the pass itself holds all there is to read."""
    mask: torch.Tensor
    """Added to the scores: ``[sequences, 1, 1, positions]`` of newest tokens, ``[queries, positions]`` of a chunk."""
    causal: bool = False
    """Whether `mask` says no more than that nobody looks ahead."""


@dataclass(frozen=True)
class Reads:
    """All readings of a layer."""

    newest: Sequence[Read]
    chunks: Sequence[Read]


class Layout:
    """The tokens of one pass and where their keys and values lie.

    The order of `parts` is kept; those of one token come first.
    """

    def __init__(self, parts: Sequence[Part], cache: PagedCache, device: torch.device) -> None:
        self.parts, self.cache, self.device = parts, cache, device
        self.single = sum(len(part.tokens) == 1 for part in parts)
        self.heads = cache.keys[0].shape[1]
        self.reads: dict[int | None, Reads] = {}
        """By window; made when the first layer asks."""
        self.longest = max(part.start + len(part.tokens) for part in parts)
        size = cache.page_tokens
        ids: list[int] = []
        positions: list[int] = []
        rows: list[int] = []
        begun: list[int] = []
        for part in parts:
            ids += part.tokens
            reach = part.start + len(part.tokens)
            positions += range(part.start, reach)
            rows += [part.pages[p // size] * self.heads * size + p % size for p in range(part.start, reach)]
            last = (reach - 1) // size
            if reach % size and last * size >= part.start:
                begun.append(part.pages[last])
        moved = torch.tensor([ids, positions, rows]).to(device, non_blocking=True)
        self.ids, self.positions = moved[:1], moved[1:2]
        self.begun = torch.tensor(begun).to(device, non_blocking=True) if begun else None
        """Pages that this pass begins and does not fill. What their last owner left there may not be finite, and would
        reach the scores through the positions that nobody masks with more than a number."""
        self.rows = (torch.arange(self.heads, device=device)[:, None] * size + moved[2]).flatten()
        """``[kv_heads × tokens]`` rows of the cache seen as ``[pages × kv_heads × page_tokens, head_dim]``."""

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Put ``[1, kv_heads, tokens, head_dim]`` of one layer into their pages."""
        for pages, new in ((self.cache.keys[layer], key), (self.cache.values[layer], value)):
            if self.begun is not None:
                pages.index_fill_(0, self.begun, 0.0)
            width = pages.shape[-1]
            pages.view(-1, width).index_copy_(0, self.rows, new[0].reshape(-1, width))

    def gather(self, pages: torch.Tensor, read: Read) -> torch.Tensor:
        """``[sequences, kv_heads, positions, head_dim]`` of one layer's keys or values."""
        width = pages.shape[-1]
        found = pages.view(-1, self.cache.page_tokens * width).index_select(0, read.pages)
        return found.view(-1, self.heads, read.mask.shape[-1], width)

    def of(self, window: int | None, dtype: torch.dtype) -> Reads:
        """The readings of a layer whose tokens see the last `window` positions, their own among them."""
        if window is not None and window >= self.longest:
            window = None
        if window not in self.reads:
            chunks = []
            first = self.single
            for part in self.parts[self.single :]:
                chunks.append(self._chunk(part, first, window, dtype))
                first += len(part.tokens)
            newest = [self._newest(group, window, dtype) for group in self._groups(window)]
            self.reads[window] = Reads(newest, chunks)
        return self.reads[window]

    def _groups(self, window: int | None) -> list[list[int]]:
        """Sequences that decode, together where their lengths are alike."""
        if not self.single:
            return []
        spans = [self._span(part, window) for part in self.parts[: self.single]]
        lengths = [end - begin for begin, end in spans]
        if self.single * max(lengths) - sum(lengths) < WORTH:
            return [list(range(self.single))]
        order = sorted(range(self.single), key=lambda index: -lengths[index])
        groups = [[order[0]]]
        for place, index in enumerate(order[1:], 1):
            longest = lengths[groups[-1][0]]
            saved = sum(longest - lengths[other] for other in order[place:])
            if longest >= APART * lengths[index] and saved >= WORTH:
                groups.append([index])
            else:
                groups[-1].append(index)
        return groups

    def _span(self, part: Part, window: int | None) -> tuple[int, int]:
        """First page that `part` reads, and the one after its last."""
        size = self.cache.page_tokens
        first = 0 if window is None else max(0, part.start - window + 1) // size
        return first, -(-(part.start + len(part.tokens)) // size)

    def _pages(self, tables: Sequence[Sequence[int]]) -> torch.Tensor:
        table = torch.tensor(tables).to(self.device, non_blocking=True)
        heads = torch.arange(self.heads, device=self.device)[None, :, None]
        return (table[:, None] * self.heads + heads).flatten()

    def _newest(self, group: list[int], window: int | None, dtype: torch.dtype) -> Read:
        parts = [self.parts[index] for index in group]
        spans = [self._span(part, window) for part in parts]
        most = max(end - begin for begin, end in spans)
        tables = []
        for part, (begin, end) in zip(parts, spans, strict=True):
            table = list(part.pages[begin:end])
            # Its own page once more, so that nothing of another sequence is touched, not even behind a mask.
            tables.append(table + table[-1:] * (most - len(table)))
        size = self.cache.page_tokens
        known = torch.tensor([[part.start, begin * size] for part, (begin, _) in zip(parts, spans, strict=True)])
        known = known.to(self.device, non_blocking=True)
        positions = known[:, 1:] + torch.arange(most * size, device=self.device)
        mask = _mask(known[:, :1], positions, window, dtype)
        whole = group == list(range(self.single))
        tokens = slice(0, self.single) if whole else torch.tensor(group).to(self.device, non_blocking=True)
        return Read(tokens, self._pages(tables), mask[:, None, None])

    def _chunk(self, part: Part, first: int, window: int | None, dtype: torch.dtype) -> Read:
        tokens = slice(first, first + len(part.tokens))
        queries = torch.arange(part.start, part.start + len(part.tokens), device=self.device)[:, None]
        if part.start == 0:
            return Read(tokens, None, _mask(queries, queries.T, window, dtype), causal=window is None)
        begin, end = self._span(part, window)
        size = self.cache.page_tokens
        positions = torch.arange(begin * size, end * size, device=self.device)[None]
        return Read(tokens, self._pages([part.pages[begin:end]]), _mask(queries, positions, window, dtype))


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    cache: Layout,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Write ``key, value [1, kv_heads, tokens, d]`` into their pages and attend with ``query [1, heads, tokens, d]``.

    The keyword arguments are those of transformers' attention interface; `cache` is handed through the model, as its
    own continuous batching does.

    Returns:
        ``[1, tokens, heads, d]`` and no weights.
    """
    layer: Any = module.layer_idx
    cache.write(layer, key, value)
    reads = cache.of(sliding_window, query.dtype)
    keys, values = cache.cache.keys[layer], cache.cache.values[layer]
    heads, tokens, width = query.shape[1:]
    grouped = query[0].unflatten(0, (cache.heads, -1))  # [kv_heads, group, tokens, d]
    sinks = None if s_aux is None else s_aux.view(cache.heads, -1)
    scale = width**-0.5 if scaling is None else scaling
    plain = softcap is None and sinks is None
    out = query.new_empty(tokens, heads, value.shape[-1])
    for read in reads.newest:
        # The query heads of a group take the place of the queries: one token each, so the mask is the same for all.
        q = grouped[:, :, read.tokens].permute(2, 0, 1, 3)
        k, v = cache.gather(keys, read), cache.gather(values, read)
        if plain and q.is_cuda:
            mixed = scaled_dot_product_attention(q, k, v, attn_mask=read.mask, scale=scale)
        else:
            mixed = _attend(q, k, v, read.mask, scale, softcap, None if sinks is None else sinks[..., None])
        out[read.tokens] = mixed.flatten(1, 2)
    for read in reads.chunks:
        q = grouped[:, :, read.tokens]
        if read.pages is None:
            k, v = key[0, :, None, read.tokens], value[0, :, None, read.tokens]
        else:
            k, v = cache.gather(keys, read)[0, :, None], cache.gather(values, read)[0, :, None]
        if plain:
            k, v = (side.expand(-1, q.shape[1], -1, -1) for side in (k, v))
            mask = None if read.causal else read.mask
            mixed = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=read.causal, scale=scale)
        else:
            mixed = _attend(q, k, v, read.mask, scale, softcap, None if sinks is None else sinks[..., None, None])
        out[read.tokens] = mixed.flatten(0, 1).transpose(0, 1)
    return out[None], None


def register() -> str:
    """Make :func:`paged_attention` known to transformers; returns the name to ask for it by."""
    AttentionInterface.register(NAME, paged_attention)
    return NAME


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """``[…, queries, d]`` over ``[…, positions, d]``, with all that torch's own function does not know.

    Faster than it for newest tokens on a CPU.
    """
    scores = torch.matmul(q, k.transpose(-1, -2)).float() * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores += mask
    if sinks is None:
        return torch.matmul(torch.softmax(scores, dim=-1).to(v.dtype), v)
    # A sink takes part in the softmax and has no value (Xiao et al., 2023; learned, as in GPT-OSS).
    scores = torch.cat([scores, sinks.float().expand(*scores.shape[:-1], 1)], dim=-1)
    return torch.matmul(torch.softmax(scores, dim=-1)[..., :-1].to(v.dtype), v)


def _mask(queries: torch.Tensor, positions: torch.Tensor, window: int | None, dtype: torch.dtype) -> torch.Tensor:
    """0 where a query may read a position, -inf elsewhere; the shapes broadcast."""
    hidden = positions > queries
    if window is not None:
        hidden |= positions <= queries - window
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, float("-inf"))
