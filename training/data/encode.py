"""Grounded rows -> token ids and loss mask, through the same prompt code that serving uses (`retrieval.prompt`)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypedDict

from cluster.errors import BadInput
from retrieval.prompt import Tokenizer, answer_ids, prompt_ids
from training.data.grounded import GroundedRow


class Encoded(TypedDict):
    """One row for the trainer; the lists have one length (tokens)."""

    input_ids: list[int]
    completion_mask: list[int]
    """1 where the loss is taken: the answer and its end of turn."""


def encode(rows: Iterable[GroundedRow], tokenizer: Tokenizer, max_tokens: int) -> list[Encoded]:
    """Encode `rows`.

    Raises:
        BadInput: rows longer than `max_tokens`; the message names the longest and how many there are.
    """
    encoded: list[Encoded] = []
    too_long: list[tuple[int, str]] = []
    for row in rows:
        prompt = prompt_ids(tokenizer, row.messages)
        answer = answer_ids(tokenizer, row.answer)
        if len(prompt) + len(answer) > max_tokens:
            too_long.append((len(prompt) + len(answer), row.id))
        encoded.append({"input_ids": prompt + answer, "completion_mask": [0] * len(prompt) + [1] * len(answer)})
    if too_long:
        length, worst = max(too_long)
        raise BadInput(
            f"{len(too_long)} rows are longer than training.max_tokens ({max_tokens}), the longest is {worst} with "
            f"{length} tokens; raise training.max_tokens or lower retrieval.top_k",
            param=worst,
        )
    return encoded


def tokens(encoded: Sequence[Encoded]) -> int:
    """Tokens of all rows together, without padding."""
    return sum(len(row["input_ids"]) for row in encoded)
