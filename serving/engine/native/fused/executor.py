"""The executor over our kernels: models of Llama's shape on CPUs, in float32, bfloat16, int8 or int4.

One call into C++ computes a pass, without Python or torch between its operations. Adapters stay as they are, one behind
the other in memory, and each pass reads those of its own tokens only.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import torch

from cluster.errors import Mismatch
from serving.engine.native.cache import PagedCache
from serving.engine.native.executor import Memory, Part
from serving.engine.native.fused import library
from serving.engine.native.fused.decoder import Decoder
from serving.engine.native.fused.memory import together
from serving.engine.native.fused.shape import Unfit
from serving.engine.native.lora import LoraWeights, check_shape

BITS = {"none": 0, "int8": 8, "int4": 4}
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
"""How far logits may be from those of transformers' modules, as a share of their norm; rounding differs, nothing else may."""


class FusedExecutor:
    """See the module's docstring; the seam is :class:`serving.engine.native.executor.Executor`."""

    def __init__(
        self,
        model: Any,
        *,
        pages: int,
        page_tokens: int,
        slots: int,
        max_rank: int,
        adapter_bytes: int,
        context: int,
        quantization: str,
        threads: int,
        cache: Path,
    ) -> None:
        """Take what is needed of `model`, a causal LM of transformers on the CPU.

        Args:
            adapter_bytes: what `slots` adapters may take at most.
            context: positions of one sequence.
            quantization: ``none``, ``int8`` or ``int4``.
            cache: where the compiled kernels are kept.

        Raises:
            Unfit: the kernels do not compute this model, or not as transformers does.
            Unavailable: the kernels cannot be compiled here.
            ConfigError: the weights cannot be packed as `quantization` asks.
        """
        if page_tokens % 16:
            raise Unfit(f"would lie in pages of {page_tokens} tokens, which are no multiple of 16")
        config, device = model.config.get_text_config(), torch.device("cpu")
        paged = PagedCache(config, pages=pages, page_tokens=page_tokens, dtype=model.dtype, device=device)
        bits = BITS[quantization]
        self.decoder = Decoder(model, paged, context=context, slots=slots, max_rank=max_rank, packed=bits > 0)
        self.vocabulary = self.decoder.features[self.decoder.head][1]
        self.pages, self.page_tokens = pages, page_tokens
        self.dtype: torch.dtype = model.dtype
        self.kernels = library.load(cache)
        self.handle = self.decoder.open(self.kernels, threads)
        self.adapters: dict[int, list[torch.Tensor]] = {}
        """Slot -> what its structures point at."""
        self._compare(model)
        if bits:
            self.decoder.pack(bits)
        self.memory = Memory(self.decoder.bytes, paged.bytes, adapter_bytes)

    @torch.inference_mode()
    def forward(self, parts: Sequence[Part]) -> torch.Tensor:
        """See :meth:`.executor.Executor.forward`."""
        slots = [-1 if part.slot is None else part.slot for part in parts]
        order = sorted(range(len(parts)), key=slots.__getitem__)  # neighbours of one adapter read it once
        parts_in = [parts[index] for index in order]
        lengths = [len(part.tokens) for part in parts_in]
        ends = numpy.cumsum(lengths)
        tokens, firsts = int(ends[-1]), ends - lengths
        shifts = numpy.array([part.start for part in parts_in]) - firsts
        pages = [len(part.pages) for part in parts_in]
        last = dict(zip(order, ends - 1, strict=True))
        want = [last[index] for index, part in enumerate(parts) if part.logits]
        arrays = {
            "ids": _flat(tokens, (part.tokens for part in parts_in)),
            "positions": numpy.arange(tokens, dtype=numpy.int32) + numpy.repeat(shifts, lengths).astype(numpy.int32),
            "part": numpy.repeat(numpy.arange(len(parts), dtype=numpy.int32), lengths),
            "slot": numpy.array([slots[index] for index in order], numpy.int32),
            "pages": _flat(sum(pages), (part.pages for part in parts_in)),
            "pages_at": (numpy.cumsum(pages) - pages).astype(numpy.int32),
            "want": numpy.array(want, numpy.int32),
        }
        logits = torch.empty(len(want), self.vocabulary)
        batch = library.Batch(tokens=tokens, parts=len(parts), wanted=len(want), logits=logits.data_ptr())
        for name, array in arrays.items():
            setattr(batch, name, array.ctypes.data)
        if self.kernels.metier_forward(self.handle, ctypes.byref(batch)):
            raise MemoryError(f"no memory for a pass of {tokens} tokens")
        return logits

    def check_adapter(self, weights: LoraWeights) -> None:
        """See :meth:`.executor.Executor.check_adapter`."""
        for name, (a, b) in weights.modules.items():
            if name not in self.decoder.sides:
                raise Mismatch(
                    f"the adapter adapts '{name}', which is no linear layer in the blocks of this base model; serve its "
                    "own base, or leave it out of target_modules"
                )
            check_shape(name, a, b, *self.decoder.features[name])

    def load_adapter(self, slot: int, weights: LoraWeights) -> None:
        """See :meth:`.executor.Executor.load_adapter`."""
        self.clear_adapter(slot)
        sides: list[torch.Tensor] = []
        for a, b in weights.modules.values():
            outputs, rank = b.shape
            padded = torch.zeros(-(-outputs // 16) * 16, rank, dtype=self.dtype)
            padded[:outputs] = b
            sides += [a, padded.view(-1, 16, rank).transpose(1, 2)]
        held = self.adapters[slot] = together(sides)
        for name, rows, blocks in zip(weights.modules, held[::2], held[1::2], strict=True):
            self.decoder.sides[name][slot] = library.Side(rows.data_ptr(), blocks.data_ptr(), len(rows), 0)

    def clear_adapter(self, slot: int) -> None:
        """See :meth:`.executor.Executor.clear_adapter`."""
        for sides in self.decoder.sides.values():
            sides[slot] = library.Side()
        self.adapters.pop(slot, None)

    @torch.inference_mode()
    def _compare(self, model: Any) -> None:
        """Refuse the model if the kernels do not say what transformers' modules say."""
        count = min(48, self.pages * self.page_tokens)
        tokens = [(7919 * n + 13) % self.vocabulary for n in range(count)]
        ours = self.forward([Part(tokens, 0, range(-(-count // self.page_tokens)))])
        attention = model.config._attn_implementation
        model.set_attn_implementation("eager")
        theirs = model(torch.tensor([tokens]), use_cache=False, logits_to_keep=1).logits[0].float()
        model.set_attn_implementation(attention)
        off = float((ours - theirs).norm() / theirs.norm())
        if not off <= TOLERANCE[self.dtype]:
            raise Unfit(f"gives other logits than transformers' modules, by {off:.2g} of their norm")


def _flat(count: int, rows: Any) -> Any:
    return numpy.fromiter((value for row in rows for value in row), numpy.int32, count)
