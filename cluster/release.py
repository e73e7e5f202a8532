"""What a release is: its parts, its digest, and what must match what.

Pure data. A release is one immutable JSON document; its digest is its name, so two releases with the same parts are
the same release. An adapter's card says what the adapter was trained on and for; :func:`check_match` is the gate
that training's output passes before serving loads it.

Not covered: keeping these (:mod:`cluster.registry`) and rendering prompts (``retrieval.prompt``).
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

from pydantic import Field

from cluster.config import Config, PromptConfig, RetrievalConfig, Section
from cluster.errors import Mismatch

PROMPT_FORMAT = 1
"""Raise it when ``retrieval.prompt`` renders the same settings to other text: adapters trained before do not match then."""


class BaseRef(Section):
    """A base model, as far as an adapter depends on it."""

    source: str
    revision: str | None = None
    dtype: str
    tokenizer: str
    """Digest of the tokenizer file (:func:`cluster.models.identity`)."""
    chat_template: str
    architecture: str


class KnowledgeRef(Section):
    """A knowledge base at a version, or wherever its head is when a question comes."""

    name: str
    version: int | Literal["head"] = "head"


class AdapterRef(Section):
    """One version of an adapter; `digest` decides, `name` and `version` are for people."""

    name: str
    version: int
    digest: str


class EmbedderRef(Section):
    """The bi-encoder the knowledge was embedded with."""

    source: str
    revision: str | None = None


class RerankerRef(Section):
    """The cross-encoder that passages are ordered by."""

    source: str
    revision: str | None = None


def reranker_ref(config: Config) -> RerankerRef | None:
    """The reranker that answers depend on; None where retrieval does not rerank."""
    if config.reranker is None or not config.retrieval.rerank:
        return None
    return RerankerRef(source=config.reranker.source, revision=config.reranker.revision)


class DatasetRef(Section):
    """The rows an adapter learned from."""

    digest: str
    rows: int
    documents: list[str] = Field([])
    """Ids of the documents whose text is in the rows."""
    groups: tuple[str, ...] = ()
    """Groups that may read all of these documents and rows."""


class Card(Section):
    """What came out of a run, where it comes from and who may use it; what an adapter and a whole model share.

    Fields were added over time: each has a default that says what was the case before it was there.
    """

    base: BaseRef
    method: Literal["lora", "qlora", "full"] = "lora"
    objective: Literal["sft", "domain"] = "sft"
    quantization: Literal["none", "nf4", "fp4"] = "none"
    """How the base was held while training."""
    max_tokens: int | None = None
    """Longest row it was trained on, in tokens."""
    prompt: str | None = None
    """:func:`prompt_hash` the rows were rendered with; None where no prompt was: raw text, or trained elsewhere."""
    dataset: DatasetRef | None = None
    """None: trained elsewhere."""
    knowledge: KnowledgeRef | None = None
    groups: tuple[str, ...] = ()
    """Groups that may read all documents in its rows, and so may use it."""
    training: dict[str, float | int | str] = Field({})
    """How it went: steps, loss_first, loss_last, tokens_per_s, seconds."""
    metrics: dict[str, Any] = Field({})
    """Losses on validation and general rows before and after, the best step."""
    config: dict[str, Any] = Field({})
    """The settings of the run, without secrets and machine paths."""
    run: str = ""
    """Name of the run."""
    metier: str = ""
    """Version of metier that made it."""
    code: str = ""
    """Digest of the source of training in that version, 16 hex digits."""


Variant = Literal["plain", "rslora", "dora"]


class AdapterCard(Card):
    """The card of a LoRA adapter."""

    variant: Variant = "plain"
    rank: int
    alpha: float
    target_modules: list[str] | str


class ModelCard(Card):
    """The card of whole weights: of full tuning, or of a base with LoRA added into it."""

    variant: Variant | None = None
    """None, as the three below, if no LoRA was part of it."""
    rank: int | None = None
    alpha: float | None = None
    target_modules: list[str] | str | None = None


class Release(Section):
    """Everything an answer depends on."""

    base: BaseRef
    adapter: AdapterRef | None = None
    knowledge: KnowledgeRef | None = None
    embedder: EmbedderRef
    reranker: RerankerRef | None = None
    """None where retrieval does not rerank."""
    prompt: PromptConfig
    retrieval: RetrievalConfig

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON, 64 hex digits; people see :func:`short`."""
        return digest(self.model_dump(mode="json"))


def canonical_json(value: Any) -> bytes:
    """JSON with sorted keys and no white space: the same value is the same bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def digest(value: Any) -> str:
    """SHA-256 of :func:`canonical_json`, 64 hex digits."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def short(digest: str) -> str:
    """A digest as it is shown: 12 hex digits."""
    return digest[:12]


def prompt_hash(prompt: PromptConfig) -> str:
    """16 hex digits that stand for how prompts are rendered: the settings and :data:`PROMPT_FORMAT`."""
    return digest({"format": PROMPT_FORMAT, "prompt": prompt.model_dump(mode="json")})[:16]


FIXES = {
    "base.source": "serve the base it was trained on, or train again",
    "base.revision": "pin base.revision to the one it was trained on, or train again",
    "base.dtype": "set base.dtype as in training, or train again",
    "base.tokenizer": "use the tokenizer files of training, or train again",
    "base.chat_template": "use the chat template of training, or train again",
    "base.architecture": "serve the base it was trained on, or train again",
    "prompt": "use the prompt settings of training, or train again",
}


def check_match(card: Card, base: BaseRef, prompt: PromptConfig | None) -> None:
    """Whether an adapter fits what is served; silent if it does.

    An adapter trained elsewhere (``card.dataset`` is None) is compared by what its weights need, not by where its base
    was downloaded from. Prompts are compared where the card names one; with `prompt` None the base alone is.

    Raises:
        Mismatch: one line for each field that differs, with both values and the fix.
    """
    fields = ["dtype", "tokenizer", "chat_template", "architecture"]
    if card.dataset is not None:
        fields = ["source", "revision", *fields]
    pairs = {f"base.{field}": (getattr(card.base, field), getattr(base, field)) for field in fields}
    if prompt is not None and card.prompt is not None:
        pairs["prompt"] = (card.prompt, prompt_hash(prompt))
    wrong = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
    if wrong:
        lines = [f"{name} is {a} in the adapter, {b} here; {FIXES[name]}" for name, (a, b) in wrong.items()]
        raise Mismatch("\n".join(lines), param=next(iter(wrong)))
