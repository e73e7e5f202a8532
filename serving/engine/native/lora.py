"""LoRA for a batch whose rows use different adapters, or none, in one pass.

For every adapted linear layer the ``A`` and ``B`` matrices of all resident adapters lie side by side in one pair of
tensors, a slot an adapter. A pass multiplies with all of them at once and zeroes, row by row, what belongs to another
row's adapter; a pass in which all rows share one adapter reads that slot only, and one without adapters reads none.
(The idea of batching over adapters is that of Punica and S-LoRA, Chen et al. and Sheng et al., 2023; on a CPU one
masked product beat gathering each row's matrices.)

Covered: plain LoRA and rsLoRA of any rank and any linear layers. The scale is folded into ``B``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from cluster.adapter_files import TENSOR, check_adapter_files, scale
from cluster.errors import Mismatch


class Plan:
    """Which slots the rows of the next pass use; shared by all layers."""

    def __init__(self) -> None:
        self.rank = 0
        self.one: int | None = None
        """The slot that every row uses."""
        self.mask: torch.Tensor | None = None
        """``[rows, 1, slots × rank]``, 1 where a row's own adapter lies; for mixed rows."""

    @property
    def idle(self) -> bool:
        return self.one is None and self.mask is None


class LoraLinear(torch.nn.Module):
    """A linear layer and the adapters on it."""

    def __init__(self, base: torch.nn.Linear, plan: Plan) -> None:
        super().__init__()
        self.base, self.plan = base, plan
        self.a = base.weight.new_zeros(0, base.in_features)
        """``[slots × rank, in]``"""
        self.b = base.weight.new_zeros(0, base.out_features)
        """``[slots × rank, out]``"""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[rows, tokens, in] -> [rows, tokens, out]``."""
        y: torch.Tensor = self.base(x)
        plan = self.plan
        if plan.idle:
            return y
        if plan.one is not None:
            part = slice(plan.one * plan.rank, (plan.one + 1) * plan.rank)
            low, b = x @ self.a[part].T, self.b[part]
        else:
            low, b = (x @ self.a.T) * plan.mask, self.b
        return torch.addmm(y.flatten(0, 1), low.flatten(0, 1), b).view_as(y)

    def widen(self, slots: int, rank: int, had: int) -> None:
        """Room for `slots` adapters of `rank`; what lies in slots of rank `had` moves along."""
        for name in ("a", "b"):
            old: torch.Tensor = getattr(self, name)
            new = old.new_zeros(slots, rank, old.shape[1])
            if had and old.shape[0]:
                new[:, :had] = old.view(-1, had, old.shape[1])
            setattr(self, name, new.flatten(0, 1))


class LoraBank:
    """The adapters of one model, by slot."""

    def __init__(self, model: torch.nn.Module, slots: int) -> None:
        self.model, self.slots = model, slots
        self.plan = Plan()
        self.layers: dict[str, LoraLinear] = {}

    def load(self, slot: int, directory: Path) -> None:
        """Read the PEFT files in `directory` into `slot`, over whatever was there.

        Raises:
            Mismatch: a tensor has no place in this model, or is not finite; nothing has changed then.
        """
        from safetensors.torch import load_file

        settings = check_adapter_files(directory)
        pairs = _pairs(load_file(directory / "adapter_model.safetensors"))
        for name, (a, b) in pairs.items():
            self._check(name, a, b)
        self._make_room(pairs, int(settings["r"]))
        self.clear(slot)
        factor = scale(settings)
        for name, (a, b) in pairs.items():
            layer, rank = self.layers[name], a.shape[0]
            start = slot * self.plan.rank
            layer.a[start : start + rank] = a.to(layer.a)
            layer.b[start : start + rank] = (b.T * factor).to(layer.b)

    def clear(self, slot: int) -> None:
        """Take the adapter in `slot` out."""
        part = slice(slot * self.plan.rank, (slot + 1) * self.plan.rank)
        for layer in self.layers.values():
            layer.a[part] = 0
            layer.b[part] = 0

    def aim(self, slots: Sequence[int | None]) -> None:
        """Say which slot each row of the next pass uses; ``None`` is the base model."""
        plan = self.plan
        plan.one, plan.mask = None, None
        used = set(slots)
        if used == {None}:
            return
        if len(used) == 1:
            plan.one = slots[0]
            return
        own = torch.zeros(len(slots), self.slots, plan.rank)
        for row, slot in enumerate(slots):
            if slot is not None:
                own[row, slot] = 1
        like = next(iter(self.layers.values())).a
        plan.mask = own.flatten(1)[:, None].to(like)

    def _make_room(self, pairs: Mapping[str, Any], rank: int) -> None:
        had = self.plan.rank
        for name in pairs:
            if name not in self.layers:
                self.layers[name] = self._wrap(name)
                self.layers[name].widen(self.slots, max(rank, had), 0)
        if rank > had:
            for layer in self.layers.values():
                if layer.a.shape[0] != self.slots * rank:
                    layer.widen(self.slots, rank, had)
            self.plan.rank = rank

    def _check(self, name: str, a: torch.Tensor, b: torch.Tensor) -> None:
        try:
            module: Any = self.model.get_submodule(name)
        except AttributeError:
            module = None
        base = module.base if isinstance(module, LoraLinear) else module
        if not isinstance(base, torch.nn.Linear):
            raise Mismatch(
                f"the adapter adapts '{name}', which is no linear layer of this base model; serve its own base"
            )
        if (a.shape[1], b.shape[0]) != (base.in_features, base.out_features):
            raise Mismatch(
                f"the adapter's '{name}' maps {a.shape[1]} to {b.shape[0]} features, this base model's "
                f"{base.in_features} to {base.out_features}; serve its own base"
            )
        # The mask multiplies: what is not finite would reach the rows of other adapters.
        if not (a.to(base.weight).isfinite().all() and b.to(base.weight).isfinite().all()):
            raise Mismatch(f"the adapter's '{name}' holds values that {base.weight.dtype} does not; train it again")

    def _wrap(self, name: str) -> LoraLinear:
        wrapped = LoraLinear(self.model.get_submodule(name), self.plan)
        self.model.set_submodule(name, wrapped)
        return wrapped


def _pairs(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Module name -> (``A [rank, in]``, ``B [out, rank]``)."""
    sides: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        if match := TENSOR.fullmatch(key):
            sides.setdefault(match["module"], {})[match["side"]] = tensor
    return {name: (pair["A"], pair["B"]) for name, pair in sides.items()}
