"""How long rows are in tokens of the base: counted in batches, summed up, drawn in the terminal or as a picture.

A length is that of the sequence which training makes of a row without retrieval: our system message, the turns
through the chat template, the answer and its end of turn. Passages come on top of it where a row has evidence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cluster.config import BaseModelConfig, PromptConfig
from cluster.models import cached, resolve
from retrieval.prompt import ground, neutral, with_marks
from training.data.rows import AnyRow, Text

BATCH = 256
"""Rows rendered and tokenized at once."""
BINS = 12
BAR = 40
"""Width of the longest bar, in characters."""
PARTS = " ▏▎▍▌▋▊▉"
"""Eighths of a character."""
Update = Callable[[int, int | None, str], None]


@dataclass(frozen=True)
class Bin:
    """Rows of ``low`` to ``high`` tokens, both included."""

    low: int
    high: int
    rows: int


@dataclass(frozen=True)
class Summary:
    """Token lengths of rows; all but `rows` and the shares are in tokens."""

    rows: int
    total: int
    min: int
    median: int
    p95: int
    max: int
    limit: int
    """``training.max_tokens``."""
    longer: int
    """Rows longer than that."""
    longer_share: float
    histogram: list[Bin]


def available(base: BaseModelConfig, cache: str | Path) -> Path | None:
    """Directory of `base` if it is on this machine; None if it would have to be fetched."""
    if base.source.startswith((".", "/", "~", "tiny:")):
        return resolve(base, cache)
    name = base.source.removeprefix("hub:")
    ours = [model for model in cached(cache) if model.source.removeprefix("hub:") == name]
    if base.revision is not None:
        ours = [
            model for model in ours if base.revision in (model.revision, Path(model.directory).name.split("--")[-1])
        ]
    return Path(ours[0].directory) if ours else None


def count(rows: Sequence[AnyRow], tokenizer: Any, prompt: PromptConfig, update: Update | None = None) -> list[int]:
    """Tokens of each of `rows`, in their order.

    Args:
        tokenizer: transformers ``PreTrainedTokenizerBase`` with a chat template.
        update: called as ``update(done, total, "")`` after each batch.
    """
    control = [token for token in _control_tokens(tokenizer) if len(token) > 1]
    counts: list[int] = []
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        # Prompt and answer apart, as `prompt_ids` and `answer_ids` encode them; the end of turn is one token more.
        prompts = _prompts(batch, tokenizer, prompt, control)
        answers = [_plain(_answer(row, prompt), tokenizer, control) for row in batch]
        before, after = (_tokens(texts, tokenizer) for texts in (prompts, answers))
        counts += [a + b + 1 for a, b in zip(before, after, strict=True)]
        if update:
            update(len(counts), len(rows), "")
    return counts


def summarize(counts: Sequence[int], limit: int) -> Summary:
    """What there is to say about token `counts` (at least one), where `limit` is the longest that is trained on."""
    values = np.asarray(counts)
    edges = np.linspace(values.min(), values.max() + 1, min(BINS, int(np.ptp(values)) + 1) + 1).round().astype(int)
    rows, _ = np.histogram(values, edges)
    longer = int((values > limit).sum())
    return Summary(
        rows=len(counts),
        total=int(values.sum()),
        min=int(values.min()),
        median=int(np.median(values)),
        p95=int(np.percentile(values, 95)),
        max=int(values.max()),
        limit=limit,
        longer=longer,
        longer_share=longer / len(counts),
        histogram=[
            Bin(int(low), int(high) - 1, int(n)) for low, high, n in zip(edges[:-1], edges[1:], rows, strict=True)
        ],
    )


def bars(histogram: Sequence[Bin]) -> list[str]:
    """`histogram` as lines of block characters, at most 80 columns wide."""
    most = max(part.rows for part in histogram)
    width = len(str(histogram[-1].high))
    lines = []
    for part in histogram:
        eighths = round(8 * BAR * part.rows / most)
        # What is there is seen, however little it is.
        bar = "█" * (eighths // 8) + PARTS[eighths % 8].strip() or ("▏" if part.rows else "")
        lines.append(f"{part.low:>{width}}–{part.high:<{width}} {bar} {part.rows}")
    return lines


def plot(counts: Sequence[int], limit: int, file: Path) -> None:
    """A histogram of `counts` with a line at `limit`, as a picture whose format the ending of `file` names."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.hist(counts, bins=min(60, max(counts) - min(counts) + 1), color="#3b6ea5")
    axes.axvline(limit, color="#c0392b", linestyle="--", label=f"training.max_tokens = {limit}")
    axes.set_xlabel("tokens in a row (passages not counted)")
    axes.set_ylabel("rows")
    axes.set_title(f"{len(counts)} rows, {sum(value > limit for value in counts)} longer than {limit} tokens")
    axes.legend()
    figure.savefig(file, dpi=120)


def _prompts(rows: Sequence[AnyRow], tokenizer: Any, prompt: PromptConfig, control: Sequence[str]) -> list[str]:
    """What stands before the answer of each of `rows`; nothing before raw text."""
    places = [place for place, row in enumerate(rows) if not isinstance(row, Text)]
    asked = [
        [
            {**message, "content": _plain(message["content"], tokenizer, control)}
            for message in ground(prompt, row.conversation, () if row.grounded else None, len).messages
        ]
        for row in rows
        if not isinstance(row, Text)
    ]
    texts = [""] * len(rows)
    if asked:
        rendered = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
        for place, text in zip(places, rendered, strict=True):
            texts[place] = text
    return texts


def _answer(row: AnyRow, prompt: PromptConfig) -> str:
    if isinstance(row, Text):
        return row.text
    if not row.answerable:
        return prompt.decline
    return with_marks(row.reference, [1]) if row.grounded else row.reference


def _plain(text: str, tokenizer: Any, control: Sequence[str]) -> str:
    """:func:`retrieval.prompt.neutral`, which looks the control tokens up each time, where there is need of it."""
    return neutral(tokenizer, text) if any(token in text for token in control) else text


def _tokens(texts: list[str], tokenizer: Any) -> list[int]:
    return [len(ids) for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]]


def _control_tokens(tokenizer: Any) -> set[str]:
    added = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    return {*tokenizer.all_special_tokens, *added}
