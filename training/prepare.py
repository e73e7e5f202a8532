"""Rows as the user has them -> examples as they are learned: read, put aside, guarded, grounded on the live index."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

from cluster.config import Config
from cluster.errors import ConfigError
from cluster.registry import Registry
from cluster.release import DatasetRef, KnowledgeRef
from retrieval.prompt import Tokenizer, token_counter
from retrieval.types import Chunk
from training.data.examples import Example, digest
from training.data.grounded import ground_rows
from training.data.leakage import guard
from training.data.live import Live, open_live
from training.data.load import load_rows
from training.data.rights import shared_groups
from training.data.rows import AnyRow, Row, read_rows
from training.data.split import split


@dataclass(frozen=True)
class Rows:
    """What a run reads, before it is grounded."""

    train: list[AnyRow]
    validation: list[AnyRow]
    """Watched while training; empty if nothing is."""
    general: list[AnyRow]
    """General ability, watched for forgetting."""

    @property
    def named(self) -> dict[str, list[AnyRow]]:
        """The sets that hold rows, by name."""
        return {name: rows for name in ("train", "validation", "general") if (rows := getattr(self, name))}


@dataclass(frozen=True)
class Prepared:
    """What a run learns from and is watched by."""

    examples: dict[str, list[Example]]
    """``train``, and where there are such rows ``validation`` and ``general``."""
    digests: dict[str, str]
    """Content hash of each, its version."""
    dataset: DatasetRef
    knowledge: KnowledgeRef | None
    """The knowledge version the rows were grounded on; None if none of them is grounded."""
    groups: tuple[str, ...]
    """Groups that may read everything in ``train``."""


def load(config: Config) -> Rows:
    """The rows of ``data``: checked, put aside for validation, and none of ``data.heldout`` among them.

    Raises:
        MetierError: a source is missing, rows are not usable (the first ten are named), or held-out questions leaked.
    """
    data, training = config.data, config.training
    if not data.train:
        raise ConfigError(
            "data.train names no rows; list files to train on, for example data.train=[rows.jsonl]", param="data.train"
        )
    train: list[AnyRow] = load_rows(data, data.train, training.objective).rows
    if data.heldout:
        train = guard(train, read_rows(data.heldout), data.leakage)
    validation: list[AnyRow] = []
    if data.validation:
        validation = load_rows(data, data.validation, training.objective).rows
    elif data.split.validation_share:
        parts = split(train, data.split)
        train, validation = parts.train, parts.validation
    general = load_rows(data, data.general, training.objective).rows if data.general else []
    return Rows(train, validation, general)


def prepare(config: Config, registry: Registry, rows: Rows, tokenizer: Tokenizer) -> Prepared:
    """`rows` as examples; the index is asked only if some of them are grounded.

    Raises:
        NotFound: there are rows to ground, but the knowledge is empty.
        BadInput: a quote stands nowhere in its document, or nobody may read all that is learned.
    """
    named = rows.named
    grounds = any(isinstance(row, Row) and row.grounded for part in named.values() for row in part)
    with open_live(config, registry) if grounds else nullcontext() as index:
        examples = {
            name: list(
                ground_rows(
                    part,
                    config.prompt,
                    retrieve=index.retrieve if index else _no_index,
                    chunks_of=partial(_chunks, index) if index else _no_index,
                    count_tokens=token_counter(tokenizer),
                    top_k=config.retrieval.top_k,
                    no_gold_share=config.training.no_gold_share if name == "train" else 0.0,
                    seed=config.training.seed,
                    loss_turns=config.training.loss_turns,
                )
            )
            for name, part in named.items()
        }
    train = examples["train"]
    documents = sorted({document for example in train for document in example.documents})
    of_documents = [index.groups[name] for name in documents if name in index.groups] if index else []
    of_rows = [row.groups or config.knowledge.groups for row in rows.train]
    groups = shared_groups([*of_documents, *of_rows])
    digests = {name: digest(part) for name, part in examples.items()}
    return Prepared(
        examples,
        digests,
        DatasetRef(digest=digests["train"], rows=len(train), documents=documents, groups=groups),
        KnowledgeRef(name=config.knowledge.name, version=index.version) if index else None,
        groups,
    )


def _chunks(index: Live, document: str) -> Sequence[Chunk]:
    return index.by_document.get(document, ())


def _no_index(_: Any) -> NoReturn:
    raise AssertionError("no row is grounded, so nothing is asked of the index")
