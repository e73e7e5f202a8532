"""The next token of each row from its logits."""

from __future__ import annotations

import torch

from serving.engine.base import Sampling


def generator_for(sampling: Sampling) -> torch.Generator | None:
    """The row's own source of chance, so that a seed gives the same answer in any batch; ``None`` when greedy."""
    if sampling.temperature == 0.0:
        return None
    chance = torch.Generator()
    if sampling.seed is None:
        chance.seed()
    else:
        chance.manual_seed(sampling.seed)
    return chance


def choose(logits: torch.Tensor, sampling: Sampling, chance: torch.Generator | None) -> int:
    """One token id from ``logits [vocabulary]``: greedy, or nucleus sampling (Holtzman et al., 2020)."""
    if chance is None:
        return int(logits.argmax())
    probabilities = torch.softmax(logits.float().cpu() / sampling.temperature, dim=-1)
    if sampling.top_p < 1.0:
        ordered, order = probabilities.sort(descending=True)
        outside = ordered.cumsum(-1) - ordered >= sampling.top_p
        probabilities[order[outside]] = 0.0
    return int(torch.multinomial(probabilities, 1, generator=chance))
