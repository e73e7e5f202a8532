"""LoRA for a pass whose tokens use different adapters, or none.

For every linear layer the ``A`` and ``B`` matrices of all adapters in slots lie one below the other in two tensors, as
many rows an adapter as it has rank. Neighbouring tokens of one adapter multiply with its rows only, tokens of the base
with none. Where many adapters have a token or two each, as in a decode step, they multiply with all rows of all of them
at once and drop, token by token, what belongs to others: one product instead of one an adapter. (Batching over adapters
is the idea of Punica and S-LoRA, Chen et al. and Sheng et al., 2023; on a CPU the one product beat gathering each row's
matrices, and on a GPU it is a constant number of kernels.)

The memory for `slots` adapters of `max_rank` on all linear layers is taken once, when :class:`LoraBank` is made, and
never grows. Covered: plain LoRA and rsLoRA of any rank and any linear layers but the output layer, over plain,
``int8`` and ``nf4`` weights. The scale is folded into ``B``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cluster.adapter_files import CONFIG_FILE, TENSOR, WEIGHTS_FILE, check_adapter_files, scale
from cluster.errors import Mismatch

FEW = 16
"""Tokens; longer stretches of one adapter get a product of their own."""
SPARSE = 3
"""Where so many times more rows lie between those in use, the latter are copied out first; copying reads and writes."""


@dataclass(frozen=True)
class LoraWeights:
    """One adapter on the host, checked, its scale folded into ``B``."""

    rank: int
    modules: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    """Name of a linear layer in the base model -> ``A [rank, in]``, ``B [out, rank]``: contiguous, in the base's dtype."""

    @property
    def bytes(self) -> int:
        return sum(a.nbytes + b.nbytes for a, b in self.modules.values())


def read_lora(directory: Path, *, dtype: torch.dtype, max_rank: int) -> LoraWeights:
    """Read the PEFT adapter in `directory`.

    Raises:
        NotFound: a file is missing.
        BadInput: a file is damaged, a pickle, or not plain LoRA.
        Mismatch: its rank is over `max_rank`, its shapes contradict each other, or a value is not finite in `dtype`.
    """
    from safetensors.torch import load_file

    settings = check_adapter_files(directory)
    rank = int(settings["r"])
    if rank > max_rank:
        raise Mismatch(
            f"r is {rank} in {CONFIG_FILE}, and adapters up to rank {max_rank} are served here; raise "
            "serving.generator.max_rank, or train with a smaller rank",
            param="r",
        )
    factor = scale(settings)
    sides: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(directory / WEIGHTS_FILE).items():
        if match := TENSOR.fullmatch(key):
            scaled = tensor.float() * factor if match["side"] == "B" else tensor
            sides.setdefault(match["module"], {})[match["side"]] = scaled.to(dtype).contiguous()
    for name, pair in sides.items():
        # What is not finite would spoil more than the rows of its own adapter.
        if not (pair["A"].isfinite().all() and pair["B"].isfinite().all()):
            raise Mismatch(
                f"the adapter's '{name}' holds values that {dtype} cannot; train it again".replace("torch.", "")
            )
    return LoraWeights(rank, {name: (pair["A"], pair["B"]) for name, pair in sides.items()})


def check_shape(name: str, a: torch.Tensor, b: torch.Tensor, inputs: int, outputs: int) -> None:
    """Raise ``Mismatch`` if `a` and `b` do not adapt a layer of so many features."""
    if (a.shape[1], b.shape[0]) != (inputs, outputs):
        raise Mismatch(
            f"the adapter's '{name}' maps {a.shape[1]} to {b.shape[0]} features, this base model's {inputs} to {outputs}; "
            "serve its own base"
        )


@dataclass(frozen=True)
class Run:
    """Tokens that lie together in a pass, and the rows of the adapters they use."""

    tokens: slice
    slots: frozenset[int]
    rows: slice | torch.Tensor
    """Of ``A`` and ``B``; numbers of rows where those in use lie far apart."""
    foreign: torch.Tensor | None = None
    """``[tokens, rows]``: True where a row belongs to another token's adapter; ``None`` if all tokens share one."""


class Plan:
    """What the next pass multiplies with; shared by all layers."""

    def __init__(self) -> None:
        self.runs: Sequence[Run] = ()


class LoraLinear(torch.nn.Module):
    """A linear layer and the adapters on it."""

    def __init__(self, base: torch.nn.Module, a: torch.Tensor, b: torch.Tensor, plan: Plan) -> None:
        super().__init__()
        self.base, self.plan = base, plan
        self.a, self.b = a, b
        """``[rows, in]`` and ``[rows, out]``"""
        self.slots: set[int] = set()
        """Those whose adapters adapt this layer."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., in] -> [..., out]``; all leading dimensions together are the tokens of the pass."""
        y: torch.Tensor = self.base(x)
        for run in self.plan.runs:
            if run.slots.isdisjoint(self.slots):
                continue
            low = x.reshape(-1, x.shape[-1])[run.tokens] @ self.a[run.rows].T
            if run.foreign is not None:
                # Not a product with zeros: another adapter's rows may have overflowed.
                low.masked_fill_(run.foreign, 0.0)
            y.view(-1, y.shape[-1])[run.tokens].addmm_(low, self.b[run.rows])
        return y


def linear_layers(model: Any) -> dict[str, Any]:
    """Name -> linear layer, for all that may be adapted: every one but the output layer."""
    output = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not output
    }


def adapter_bytes(model: Any, *, slots: int, max_rank: int, dtype: torch.dtype) -> int:
    """What :class:`LoraBank` takes."""
    features = sum(layer.in_features + layer.out_features for layer in linear_layers(model).values())
    return features * slots * max_rank * dtype.itemsize


class LoraBank:
    """The adapters of one model, by slot."""

    def __init__(self, model: Any, *, slots: int, max_rank: int, dtype: torch.dtype, device: torch.device) -> None:
        self.model, self.device = model, device
        self.bytes = adapter_bytes(model, slots=slots, max_rank=max_rank, dtype=dtype)
        self.capacity = slots * max_rank
        self.plan = Plan()
        self.rows: dict[int, slice] = {}
        """Slot -> its rows, the same in all layers."""
        self.output = next(
            (name for name, module in model.named_modules() if module is model.get_output_embeddings()), ""
        )
        self.layers: dict[str, LoraLinear] = {}
        for name, base in linear_layers(model).items():
            # Rows are written before they are read, and pages that no adapter reached cost nothing.
            a = torch.empty(self.capacity, base.in_features, dtype=dtype, device=device)
            b = torch.empty(self.capacity, base.out_features, dtype=dtype, device=device)
            self.layers[name] = LoraLinear(base, a, b, self.plan)
        self.wrapped: set[str] = set()

    def check(self, weights: LoraWeights) -> None:
        """Raise ``Mismatch`` if `weights` have no place in this model."""
        for name, (a, b) in weights.modules.items():
            if name == self.output:
                raise Mismatch(
                    f"the adapter adapts '{name}', the output layer, which is not served; leave it out of target_modules"
                )
            layer = self.layers.get(name)
            if layer is None:
                raise Mismatch(
                    f"the adapter adapts '{name}', which is no linear layer of this base model; serve its own base"
                )
            check_shape(name, a, b, layer.a.shape[1], layer.b.shape[1])

    def load(self, slot: int, weights: LoraWeights) -> None:
        """Put `weights`, which fit, into `slot`, over whatever was there."""
        self.clear(slot)
        rows = self.rows[slot] = self._room(weights.rank)
        for name, layer in self.layers.items():
            if name in weights.modules:
                a, b = weights.modules[name]
                layer.a[rows], layer.b[rows] = a, b.T
                layer.slots.add(slot)
                if name not in self.wrapped:
                    self.model.set_submodule(name, layer)
                    self.wrapped.add(name)
            else:
                layer.a[rows], layer.b[rows] = 0.0, 0.0

    def clear(self, slot: int) -> None:
        """Take the adapter in `slot` out."""
        self.rows.pop(slot, None)
        for layer in self.layers.values():
            layer.slots.discard(slot)

    def aim(self, stretches: Sequence[tuple[int, int | None]]) -> None:
        """Say which slots the tokens of the next pass use.

        Args:
            stretches: (how many tokens, their slot or ``None``) in the order of the pass. Those of up to :data:`FEW`
                tokens should come before longer ones, which would otherwise be multiplied twice.
        """
        runs: list[tuple[int, int, int]] = []
        end = 0
        for count, slot in stretches:
            begin, end = end, end + count
            if slot is None:
                continue
            if runs and runs[-1][1:] == (begin, slot):
                begin, *_ = runs.pop()
            runs.append((begin, end, slot))
        short = [run for run in runs if run[1] - run[0] <= FEW]
        if len(short) <= 2:
            short = []
        long = [run for run in runs if run not in short]
        self.plan.runs = [Run(slice(begin, end), frozenset([slot]), self.rows[slot]) for begin, end, slot in long]
        if short:
            self.plan.runs.append(self._mixed(short))

    def _mixed(self, runs: Sequence[tuple[int, int, int]]) -> Run:
        slots = frozenset(slot for *_, slot in runs)
        used = sorted((self.rows[slot].start, self.rows[slot].stop) for slot in slots)
        begin, end = used[0][0], used[-1][1]
        owned = torch.zeros(runs[-1][1] - runs[0][0], end - begin, dtype=torch.bool)
        for first, last, slot in runs:
            own = self.rows[slot]
            owned[first - runs[0][0] : last - runs[0][0], own.start - begin : own.stop - begin] = True
        rows: slice | torch.Tensor = slice(begin, end)
        if end - begin > SPARSE * sum(stop - start for start, stop in used):
            numbers = torch.cat([torch.arange(start, stop) for start, stop in used])
            owned = owned[:, numbers - begin]
            rows = numbers.to(self.device, non_blocking=True)
        return Run(slice(runs[0][0], runs[-1][1]), slots, rows, ~owned.to(self.device, non_blocking=True))

    def _room(self, rank: int) -> slice:
        """The first `rank` rows that nobody has; moves the others together if no gap is wide enough."""
        begin = 0
        for taken in sorted(self.rows.values(), key=lambda rows: rows.start):
            if taken.start - begin >= rank:
                break
            begin = taken.stop
        if begin + rank > self.capacity:
            begin = self._compact()
        return slice(begin, begin + rank)

    def _compact(self) -> int:
        """Move all adapters to the front; returns the number of rows they take."""
        end = 0
        for slot, rows in sorted(self.rows.items(), key=lambda item: item[1].start):
            moved = self.rows[slot] = slice(end, end + rows.stop - rows.start)
            if moved != rows:
                for layer in self.layers.values():
                    layer.a[moved] = layer.a[rows].clone()
                    layer.b[moved] = layer.b[rows].clone()
            end = moved.stop
        return end
