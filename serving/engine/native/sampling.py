"""The next token of each row from its logits: bias, penalties, grammar, temperature, top-k, top-p, min-p, a draw.

In this order, which is vLLM's and transformers'. Rows that take the likeliest token and ask for nothing else cost one
maximum over the batch; the rest is paid by the rows that ask for it. A draw reads one number of the row's own source
of chance and nothing of its neighbours, so a seed gives the same answer in any batch.

Not covered: beam search, bad words, the same seed giving the same answer as another engine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cluster.errors import BadInput, MetierError
from serving.engine.base import Sampling, TokenLogprob
from serving.engine.native.grammar import Matcher, unpack

GREEDY_BELOW = 1e-5
"""A temperature below it takes the likeliest token, as in vLLM: dividing by it would overflow."""
NUCLEUS = (256, 2048)
"""Candidates sorted for top-p; where the nucleus is wider than the one, the next is tried, and at last all tokens."""
NEVER = float("-inf")


@dataclass(frozen=True)
class Choice:
    """What became of one row."""

    token: int
    logprob: TokenLogprob | None = None
    error: MetierError | None = None
    """Why there is no token; the row has to end."""


class Chooser:
    """What one answer's choices depend on besides its logits: counts, chance, grammar.

    Args:
        prompt: ids of the prompt.
        index: which of the request's `n` answers; its seed is ``seed + index``.
        eos: ids that end an answer.
        vocabulary: columns of the logits.
        matcher: state of the answer's grammar, for this answer alone.
    """

    def __init__(
        self,
        sampling: Sampling,
        prompt: Sequence[int],
        index: int,
        eos: frozenset[int],
        vocabulary: int,
        matcher: Matcher | None = None,
    ) -> None:
        self.sampling, self.matcher = sampling, matcher
        self.made = 0
        self.greedy = sampling.temperature < GREEDY_BELOW
        self.chance = torch.Generator()
        if sampling.seed is None:
            self.chance.seed()
        else:
            self.chance.manual_seed(sampling.seed + index)
        self.bias = torch.tensor([value for _, value in sampling.logit_bias])
        self.biased = torch.tensor([token for token, _ in sampling.logit_bias], dtype=torch.long)
        self.eos = torch.tensor(sorted(eos), dtype=torch.long)
        self.counts: torch.Tensor | None = None
        """How often each token is in the answer, ``[vocabulary]``."""
        if sampling.presence_penalty or sampling.frequency_penalty:
            self.counts = torch.zeros(vocabulary)
        self.seen: torch.Tensor | None = None
        """Whether each token is in prompt or answer, ``[vocabulary]``."""
        if sampling.repetition_penalty != 1.0:
            self.seen = torch.zeros(vocabulary, dtype=torch.bool)
            self.seen[torch.tensor(prompt)] = True
        self.edits = (
            bool(sampling.logit_bias) or self.counts is not None or self.seen is not None or matcher is not None
        )

    @property
    def finished(self) -> bool:
        """Whether the grammar allows nothing but the end."""
        return self.matcher is not None and self.matcher.finished

    @property
    def plain(self) -> bool:
        """Whether the likeliest token is all that is asked for."""
        holds_back = self.made < self.sampling.min_tokens
        return self.greedy and not (self.edits or holds_back or self.sampling.logprobs is not None)

    def take(self, token: int) -> None:
        """`token` is part of the answer now."""
        self.made += 1
        if self.counts is not None:
            self.counts[token] += 1
        if self.seen is not None:
            self.seen[token] = True
        if self.matcher is not None:
            self.matcher.take(token)

    def edit(self, scores: torch.Tensor) -> None:
        """Bias and penalties on the row ``scores [vocabulary]``, in place; and no end before ``min_tokens``."""
        if self.sampling.logit_bias:
            scores.index_add_(0, self.biased.to(scores.device), self.bias.to(scores.device, scores.dtype))
        if self.seen is not None:
            self.seen = self.seen.to(scores.device)
            penalty = self.sampling.repetition_penalty
            less_likely = torch.where(scores > 0, scores / penalty, scores * penalty)
            torch.where(self.seen, less_likely, scores, out=scores)
        if self.counts is not None:
            self.counts = self.counts.to(scores.device)
            scores.sub_(self.counts, alpha=self.sampling.frequency_penalty)
            scores.sub_(self.counts.sign(), alpha=self.sampling.presence_penalty)
        if self.made < self.sampling.min_tokens and not self.finished:
            scores[self.eos.to(scores.device)] = NEVER


def choose(logits: torch.Tensor, choosers: Sequence[Chooser]) -> list[Choice]:
    """One choice a row; a row that cannot have one says so in `Choice.error` and leaves the others alone.

    Args:
        logits: ``[rows, vocabulary]``, float32, on any device; left as they are.
    """
    sound = logits.amax(dim=-1).isfinite().tolist()  # the largest of a row with a NaN is NaN
    choices = [
        Choice(token) if well else Choice(-1, error=_not_numbers())
        for token, well in zip(_likeliest(logits), sound, strict=True)
    ]
    rows = [row for row, chooser in enumerate(choosers) if sound[row] and not chooser.plain]
    # A row at a time stays in a CPU's cache, which there is four times as fast as all of them together.
    size = 1 if logits.device.type == "cpu" else max(len(rows), 1)
    for first in range(0, len(rows), size):
        block = rows[first : first + size]
        scores = logits[block[0] : block[0] + 1].clone() if len(block) == 1 else logits[block]
        for row, choice in zip(block, _choose(scores, [choosers[row] for row in block]), strict=True):
            choices[row] = choice
    return choices


def _choose(scores: torch.Tensor, choosers: Sequence[Chooser]) -> list[Choice]:
    """The choices of rows that ask for more than the likeliest token; works in ``scores [rows, vocabulary]``."""
    widths = [chooser.sampling.logprobs for chooser in choosers]
    natural = None if set(widths) == {None} else scores.log_softmax(dim=-1)
    for row, chooser in enumerate(choosers):
        chooser.edit(scores[row])
    errors = _constrain(scores, choosers)
    for row, well in enumerate(scores.amax(dim=-1).isfinite().tolist()):
        if not well:
            errors.setdefault(row, _nothing_left())
    tokens = _likeliest(scores)
    drawn = [row for row, chooser in enumerate(choosers) if not chooser.greedy and row not in errors]
    if drawn:
        part = scores if len(drawn) == len(choosers) else scores[drawn]
        for row, token in zip(drawn, draw(part, [choosers[row] for row in drawn]).tolist(), strict=True):
            tokens[row] = token
    told = [None] * len(choosers) if natural is None else _logprobs(natural, tokens, widths)
    return [
        Choice(-1, error=errors[row]) if row in errors else Choice(token, logprob)
        for row, (token, logprob) in enumerate(zip(tokens, told, strict=True))
    ]


def _likeliest(scores: torch.Tensor) -> list[int]:
    """The first of the largest of each row; on CPUs by numpy, which is ten times as fast as torch there."""
    largest = scores.numpy().argmax(-1) if scores.device.type == "cpu" else scores.argmax(dim=-1)
    return list(largest.tolist())


def _constrain(scores: torch.Tensor, choosers: Sequence[Chooser]) -> dict[int, MetierError]:
    """Leave to rows with a grammar only the tokens that it allows, in place; why rows have none."""
    if all(chooser.matcher is None for chooser in choosers):
        return {}
    errors: dict[int, MetierError] = {}
    vocabulary = scores.shape[1]
    bits = torch.full((len(choosers), math.ceil(vocabulary / 32)), -1, dtype=torch.int32)
    for row, chooser in enumerate(choosers):
        if chooser.matcher is not None:
            try:
                chooser.matcher.allowed(bits[row])
            except MetierError as error:
                errors[row] = error
    scores.masked_fill_(~unpack(bits.to(scores.device), vocabulary), NEVER)
    return errors


def draw(scores: torch.Tensor, choosers: Sequence[Chooser]) -> torch.Tensor:
    """Ids ``[rows]`` drawn from ``scores [rows, vocabulary]``, each row with a temperature; works in `scores`."""
    left, ids = narrow(scores, [chooser.sampling for chooser in choosers])
    mass = left.exp_().cumsum(dim=-1, dtype=torch.float64)
    shares = torch.cat([torch.rand(1, generator=chooser.chance, dtype=torch.float64) for chooser in choosers])
    reached = shares.to(scores.device)[:, None] * mass[:, -1:]
    # A token without mass ends where the one before it does, so it is never the first to end beyond.
    places = torch.searchsorted(mass, reached, right=True)
    return (places if ids is None else ids.gather(1, places))[:, 0]


def narrow(scores: torch.Tensor, asked: Sequence[Sampling]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Temperature, top-k, top-p and min-p: the log of the weights that are left, 0 the largest; works in `scores`.

    Source: transformers' ``TemperatureLogitsWarper``, ``TopKLogitsWarper``, ``TopPLogitsWarper`` and
    ``MinPLogitsWarper``, in its order.

    Args:
        scores: ``[rows, vocabulary]``.

    Returns:
        Logs of weights ``[rows, candidates]`` and their token ids, as large; no ids where all tokens are candidates.
    """

    def column(values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(values, device=scores.device, dtype=scores.dtype)[:, None]

    scores -= scores.amax(dim=-1, keepdim=True)
    scores /= column([sampling.temperature for sampling in asked])
    ids: torch.Tensor | None = None
    widths = [min(sampling.top_k or scores.shape[1], scores.shape[1]) for sampling in asked]
    if min(widths) < scores.shape[1]:
        scores, ids = scores.topk(max(widths), dim=-1)
        places = torch.arange(scores.shape[1], device=scores.device)
        scores = torch.where(places >= column(widths), NEVER, scores)
    if any(sampling.top_p < 1.0 for sampling in asked):
        least = _nucleus(scores, column([sampling.top_p if sampling.top_p < 1.0 else 0.0 for sampling in asked]))
        scores = _above(scores, least + column([0.0 if sampling.top_p < 1.0 else NEVER for sampling in asked]))
    if any(sampling.min_p for sampling in asked):
        scores = _above(scores, column([math.log(sampling.min_p) if sampling.min_p else NEVER for sampling in asked]))
    return scores, ids


def _above(scores: torch.Tensor, least: torch.Tensor) -> torch.Tensor:
    """`scores` without those under their row's ``least [rows, 1]``."""
    return torch.where(scores < least, NEVER, scores)


def _nucleus(scores: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """The least score in the nucleus (Holtzman et al., 2020) of each row, ``[rows, 1]``; `share` is top-p, as large."""
    wanted = share * scores.exp().sum(dim=-1, keepdim=True, dtype=torch.float64)
    for width in (*NUCLEUS, scores.shape[1]):
        largest = scores.topk(min(width, scores.shape[1]), dim=-1).values
        gathered = largest.exp().cumsum(dim=-1, dtype=torch.float64)
        if bool((gathered[:, -1:] >= wanted).all()):
            break
    # The first that reaches the share is the last one in; rounding may leave the share just out of reach.
    last = (gathered < wanted).sum(dim=-1, keepdim=True).clamp(max=largest.shape[1] - 1)
    return largest.gather(1, last)


def _logprobs(natural: torch.Tensor, tokens: Sequence[int], widths: Sequence[int | None]) -> list[TokenLogprob | None]:
    """What to tell of the tokens chosen; `natural` are the log probabilities before anything was asked of them."""
    most = min(max(width or 0 for width in widths), natural.shape[1])
    values, ids = natural.topk(most, dim=-1)
    own = natural.gather(1, torch.tensor(tokens, device=natural.device)[:, None])[:, 0].tolist()
    return [
        None if width is None else TokenLogprob(token, logprob, tuple(zip(likely[:width], told[:width], strict=True)))
        for token, width, logprob, likely, told in zip(tokens, widths, own, ids.tolist(), values.tolist(), strict=True)
    ]


def _not_numbers() -> MetierError:
    return MetierError(
        "the model's scores are not numbers; its adapter is damaged or too large for the precision: "
        "publish the adapter anew, or serve with base.dtype=float32"
    )


def _nothing_left() -> MetierError:
    return BadInput("no token is left to choose from; ask for less in logit_bias or response_format")
