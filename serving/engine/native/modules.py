"""The executor over transformers' own modules: any model whose attention goes through its attention interface.

A pass lays the tokens of all its parts one behind the other and runs the model once over them; what belongs together
is known to the attention (:mod:`.attention`) and to the adapters (:mod:`.lora`) alone. CPU and CUDA, bf16, fp16, fp32,
and what bitsandbytes makes of linear layers.

Not covered: models that compute their attention themselves or keep another state than keys and values; CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from serving.engine.native.attention import Layout
from serving.engine.native.cache import PagedCache
from serving.engine.native.executor import Memory, Part
from serving.engine.native.lora import FEW, LoraBank, LoraWeights


class ModulesExecutor:
    """See the module's docstring; the seam is :class:`serving.engine.native.executor.Executor`."""

    def __init__(
        self,
        model: Any,
        *,
        pages: int,
        page_tokens: int,
        slots: int,
        max_rank: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """Take all memory.

        Args:
            model: a causal LM on `device` whose attention is the one of :func:`.attention.register`.
        """
        config = model.config.get_text_config()
        self.model, self.device = model, device
        self.vocabulary: int = model.get_output_embeddings().weight.shape[0]
        self.pages, self.page_tokens = pages, page_tokens
        weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
        self.bank = LoraBank(model, slots=slots, max_rank=max_rank, dtype=dtype, device=device)
        self.cache = PagedCache(config, pages=pages, page_tokens=page_tokens, dtype=dtype, device=device)
        self.memory = Memory(weights, self.cache.bytes, self.bank.bytes)

    @torch.inference_mode()
    def forward(self, parts: Sequence[Part]) -> torch.Tensor:
        """See :meth:`.executor.Executor.forward`."""
        order = sorted(range(len(parts)), key=lambda index: _place(parts[index]))
        ordered = [parts[index] for index in order]
        last, end = [0] * len(parts), 0
        for index in order:
            end += len(parts[index].tokens)
            last[index] = end - 1
        wanted = [last[index] for index, part in enumerate(parts) if part.logits]
        layout = Layout(ordered, self.cache, self.device)
        self.bank.aim([(len(part.tokens), part.slot) for part in ordered])
        out = self.model(
            input_ids=layout.ids,
            position_ids=layout.positions,
            use_cache=False,
            logits_to_keep=torch.tensor(wanted, dtype=torch.long).to(self.device, non_blocking=True),
            cache=layout,
        )
        logits: torch.Tensor = out.logits[0].float()
        return logits

    def check_adapter(self, weights: LoraWeights) -> None:
        """See :meth:`.executor.Executor.check_adapter`."""
        self.bank.check(weights)

    @torch.inference_mode()
    def load_adapter(self, slot: int, weights: LoraWeights) -> None:
        """See :meth:`.executor.Executor.load_adapter`."""
        self.bank.load(slot, weights)

    def clear_adapter(self, slot: int) -> None:
        """See :meth:`.executor.Executor.clear_adapter`."""
        self.bank.clear(slot)


def _place(part: Part) -> tuple[bool, bool, int]:
    """Sequences that decode first, then short chunks, then long ones; rows of one adapter together."""
    return len(part.tokens) > 1, len(part.tokens) > FEW, -1 if part.slot is None else part.slot
