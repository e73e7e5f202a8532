"""The pages that keys and values of all sequences lie in, and how many of them there is room for.

Who holds which page is the business of :mod:`.pages`; this is their memory. Covered: models whose layers all keep
keys and values of one shape (:mod:`cluster.servable` refuses the others).
"""

from __future__ import annotations

from typing import Any

import torch

from cluster.config import Config
from cluster.errors import ResourcesShort


class PagedCache:
    """``keys[layer]`` and ``values[layer]`` are ``[pages, kv_heads, page_tokens, head_dim]``, contiguous, allocated once.

    Their contents are undefined until written; whoever reads a page that is not full must have cleared its rest.
    """

    def __init__(
        self, model_config: Any, *, pages: int, page_tokens: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        layers, heads, width = cache_shape(model_config)
        self.page_tokens = page_tokens
        shape = (pages, heads, page_tokens, width)
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for _ in range(layers)]
        self.values = [torch.empty(shape, dtype=dtype, device=device) for _ in range(layers)]

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))


def cache_shape(model_config: Any) -> tuple[int, int, int]:
    """Layers, heads of keys and values, and their width, as a model's (text) config says."""
    heads = model_config.num_attention_heads
    kv_heads = getattr(model_config, "num_key_value_heads", None) or heads
    width = getattr(model_config, "head_dim", None) or model_config.hidden_size // heads
    return model_config.num_hidden_layers, kv_heads, width


def page_bytes(model_config: Any, page_tokens: int, dtype: torch.dtype) -> int:
    """What a page takes in all layers."""
    layers, heads, width = cache_shape(model_config)
    return 2 * layers * heads * page_tokens * width * dtype.itemsize


def cache_pages(config: Config, model_config: Any, free_bytes: int) -> int:
    """Pages of the cache by ``serving.generator``'s `cache_bytes` or `cache_share`.

    Args:
        model_config: the model's text config.
        free_bytes: memory that is free with the model loaded and its adapters' slots taken.

    Raises:
        ResourcesShort: there is no room for one sequence of ``base.context_tokens``.
    """
    settings = config.serving.generator
    page = page_bytes(model_config, settings.page_tokens, getattr(torch, config.base.dtype))
    context = -(-config.base.context_tokens // settings.page_tokens)
    if settings.cache_bytes:
        pages = settings.cache_bytes // page
        said = f"serving.generator.cache_bytes ({settings.cache_bytes:,}) has"
        fix = f"raise it to {context * page:,} or more"
    else:
        pages = min(max(0, int(free_bytes * settings.cache_share)) // page, context * settings.batch_size)
        said = f"serving.generator.cache_share ({settings.cache_share}) of the {free_bytes:,} bytes that are free has"
        fix = f"give the generator {int(context * page / settings.cache_share):,} bytes"
    if pages < context:
        raise ResourcesShort(
            f"{said} no room for one sequence of base.context_tokens ({config.base.context_tokens}); {fix}, or lower "
            "base.context_tokens",
            param="serving.generator.cache_bytes",
        )
    return pages
