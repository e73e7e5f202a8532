"""A model as the kernels hold it: tensors that stay where they are, and the structures that point at them."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Mapping
from typing import Any

import torch

from cluster.errors import ConfigError
from serving.engine.native.cache import PagedCache
from serving.engine.native.fused import library as c
from serving.engine.native.fused.memory import together, widen_pages
from serving.engine.native.fused.packing import GROUP, pack, panels
from serving.engine.native.fused.shape import Shape, describe


class Decoder:
    """Weights, pages and places for adapters of one model.

    ``sides[name][slot]`` is the adapter of a slot on the linear layer `name`; without rank there is none.
    """

    def __init__(self, model: Any, cache: PagedCache, *, context: int, slots: int, max_rank: int, packed: bool) -> None:
        """Take the weights of `model`, a causal LM of transformers on the CPU.

        Args:
            packed: :meth:`pack` will follow.

        Raises:
            Unfit: the kernels do not compute this model.
        """
        shape = describe(model, context)
        self.cache = cache
        self.head = shape.head
        originals = {name: module.weight.detach() for name, module in shape.linears.items()}
        self.weights = _settle({name: (panels(weight),) for name, weight in originals.items()})
        """Linear layer -> its weights in panels, or packed ones and their scales."""
        self.originals = originals if packed else {}
        """What :meth:`pack` rounds."""
        tied = shape.linears[shape.head].weight is shape.embedding and not packed
        embedding = self.weights[shape.head][0] if tied else shape.embedding
        for tensor in (*cache.keys, *cache.values):
            widen_pages(tensor)
        self.features = {name: (m.in_features, m.out_features) for name, m in shape.linears.items()}
        self.sides = {name: (c.Side * slots)() for name in shape.linears if name != shape.head}
        self.kept: list[Any] = [cache]
        self.linears = (c.Linear * len(shape.linears))(
            *(self._linear(name, module) for name, module in shape.linears.items())
        )
        self.structure = self._model(shape, embedding)
        self.structure.panels = tied
        self.structure.slots, self.structure.max_rank = slots, max_rank

    def open(self, kernels: Any, threads: int) -> Any:
        """A handle of :func:`.library.load`'s `kernels` on this model; its threads end with this object."""
        handle = kernels.metier_open(ctypes.byref(self.structure), threads)
        weakref.finalize(self, kernels.metier_close, handle)
        return handle

    def pack(self, bits: int) -> None:
        """Round the weights of all linears to 8 or 4 bits; the embedding keeps its own.

        Raises:
            ConfigError: a layer's inputs are no whole number of groups.
        """
        for name, weight in self.originals.items():
            if weight.shape[1] % GROUP:
                raise ConfigError(
                    f"serving.generator.quantization=int{bits} wants layers whose inputs are a multiple of {GROUP}, and "
                    f"{name} has {weight.shape[1]}; use none",
                    param="serving.generator.quantization",
                )
        self.weights = _settle({name: pack(weight, bits) for name, weight in self.originals.items()})
        self.originals = {}
        for linear, (packed, scales) in zip(self.linears, self.weights.values(), strict=True):
            linear.w, linear.scales, linear.kind = packed.data_ptr(), scales.data_ptr(), bits

    @property
    def bytes(self) -> int:
        """What the weights take; an embedding that is also the output layer counts once."""
        tensors = [each for pair in self.weights.values() for each in pair]
        tensors += [each for each in self.kept if isinstance(each, torch.Tensor)]
        return sum({each.data_ptr(): each.nbytes for each in tensors}.values())

    def _keep(self, tensor: torch.Tensor) -> int:
        tensor = tensor.detach().contiguous()
        self.kept.append(tensor)
        return tensor.data_ptr()

    def _linear(self, name: str, module: Any) -> c.Linear:
        return c.Linear(
            w=self.weights[name][0].data_ptr(),
            bias=None if module.bias is None else self._keep(module.bias.float()),
            sides=ctypes.addressof(self.sides[name]) if name in self.sides else None,
            inputs=module.in_features,
            outputs=module.out_features,
        )

    def _model(self, shape: Shape, embedding: torch.Tensor) -> c.Model:
        numbers = {name: number for number, name in enumerate(shape.linears)}
        layers = (c.Layer * len(shape.blocks))()
        for number, (layer, block) in enumerate(zip(layers, shape.blocks, strict=True)):
            for name, view in block.views.items():
                setattr(layer, name, c.View(numbers[view.linear], view.first, view.rows, 0))
            for name, norm in block.norms.items():
                setattr(layer, f"norm_{name}", self._keep(norm))
            if block.angles is not None:
                layer.cosine, layer.sine = map(self._keep, block.angles)
            layer.keys, layer.values = self.cache.keys[number].data_ptr(), self.cache.values[number].data_ptr()
            layer.window = block.window
        self.kept.append(layers)
        model = c.Model(
            embedding=self._keep(embedding),
            norm=self._keep(shape.norm),
            layer=ctypes.addressof(layers),
            linear=ctypes.addressof(self.linears),
            head=c.View(numbers[shape.head], 0, self.features[shape.head][1], 0),
            wide=shape.embedding.dtype == torch.float32,
            page_tokens=self.cache.page_tokens,
        )
        for name, value in shape.numbers.items():
            setattr(model, name, value)
        return model


def _settle(weights: Mapping[str, tuple[torch.Tensor, ...]]) -> dict[str, tuple[torch.Tensor, ...]]:
    """Copies of all `weights` in the order in which a pass reads them."""
    copies = iter(together([each for tensors in weights.values() for each in tensors]))
    return {name: tuple(next(copies) for _ in tensors) for name, tensors in weights.items()}
