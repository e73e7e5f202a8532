"""Rows for benchmarks of training, from the sample trade, without an index: nothing is retrieved, the form is the real one."""

from __future__ import annotations

import random
from collections import defaultdict
from itertools import cycle, islice
from pathlib import Path

from cluster.config import Config, KnowledgeConfig
from retrieval.chunk import chunk
from retrieval.prompt import Tokenizer, token_counter
from retrieval.read import read
from retrieval.types import Chunk, Passage
from training.data.examples import Example
from training.data.grounded import ground_rows
from training.data.rows import Row

TRADE = Path(__file__).parents[2] / "examples" / "corvane"
TOKENS_A_WORD = 4 / 3
"""About what the embedder's tokenizer makes of English; only sizes chunks here."""


def grounded(config: Config, tokenizer: Tokenizer, count: int) -> list[Example]:
    """`count` rows of the sample trade among passages as in a real run, 324 tokens long in the mean (197 to 594).

    The gold chunk is real, the distractors are drawn from the documents at random.
    """
    chunks: dict[str, list[Chunk]] = defaultdict(list)
    for document in read(KnowledgeConfig(documents=str(TRADE / "documents")))[0]:
        chunks[document.doc_id] = chunk(
            document,
            chunk_tokens=config.knowledge.chunk_tokens,
            count_tokens=lambda text: int(len(text.split()) * TOKENS_A_WORD),
        )
    passages = [
        Passage(c.chunk_id, c.doc_id, c.title, c.heading, c.text, c.source, c.position, 0.0)
        for document in chunks.values()
        for c in document
    ]
    draw = random.Random(config.training.seed)
    made = ground_rows(
        _rows(),
        config.prompt,
        retrieve=lambda _: draw.sample(passages, 2 * config.retrieval.top_k),
        chunks_of=lambda document: chunks[document],
        count_tokens=token_counter(tokenizer),
        top_k=config.retrieval.top_k,
        no_gold_share=config.training.no_gold_share,
        seed=config.training.seed,
    )
    return _renamed(list(made), count)


def short(count: int) -> list[Example]:
    """`count` questions and answers of the sample trade without passages, under an empty system message."""
    silent = {"role": "system", "content": ""}
    made = [
        Example(id=row.id, messages=(silent, *row.conversation), answer=row.reference)
        for row in _rows()
        if row.answerable and row.kind != "multi"
    ]
    return _renamed(made, count)


def _rows() -> list[Row]:
    lines = (TRADE / "train.jsonl").read_text(encoding="utf-8").splitlines()
    return [Row.model_validate_json(line) for line in lines]


def _renamed(examples: list[Example], count: int) -> list[Example]:
    """The first `count`, again from the start where there are fewer, each with an id of its own."""
    return [
        example.model_copy(update={"id": f"{number}-{example.id}"})
        for number, example in enumerate(islice(cycle(examples), count))
    ]
