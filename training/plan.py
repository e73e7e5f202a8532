"""How much memory a training run takes on each worker, before anything is launched: arithmetic on a model's shape.

:func:`estimate` follows what is held when. Weights, adapters, optimizer states and buffers stay; on top comes the
largest of three moments: the start of the backward pass (all activations and the logits), its end (all gradients), and
the optimizer's step. What each stage of ZeRO keeps was read in DeepSpeed 0.19.8 and measured
(``python -m benchmarks.plan``, docs/decisions/0009-memory-plan.md).

Exact: parameters, adapters, four-bit weights, optimizer states, gradients. Formulas that were measured on the CPU:
activations of Llama-like and GPT-NeoX-like models, logits, the step. Approximate: what CUDA and NCCL take, what ZeRO-3
has gathered at once, layers with experts, DoRA, Liger, attention windows, target modules other than all linear layers
(planned as if all inputs were kept). Not covered: fragmentation (the margin of :func:`usable` is for that), evaluation,
pipeline and tensor parallelism, NVMe.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from cluster.config import Config
from training.deepspeed import BUCKET
from training.model_shape import Shape, shape_of

__all__ = [
    "Estimate",
    "Settings",
    "Shape",
    "advice",
    "estimate",
    "explain_out_of_memory",
    "fewest_gpus",
    "gib",
    "kept_activations",
    "of",
    "settings_of",
    "shape_of",
    "usable",
]

Method = Literal["full", "lora", "qlora"]
METHODS: tuple[Method, ...] = ("full", "lora", "qlora")

MARGIN = 0.05
"""Share of a GPU that is left for fragmentation."""
CUDA_BYTES = 2**30
"""Context, libraries' workspaces and NCCL on a GPU, about."""
PROCESS_BYTES = 700 * 2**20
"""A worker process on the CPU before it has a model: Python, PyTorch, transformers, DeepSpeed, Ray."""
LIVE_PARAMETERS = 1_000_000_000
"""Elements that ZeRO-3 keeps gathered at most, but for a single larger layer; DeepSpeed's default."""
SUB_GROUP = 1_000_000_000
"""Elements of its share that ZeRO-3 updates at once; DeepSpeed's default."""
LOSS_TILE = (4096, 32768)
"""Tokens and vocabulary of one tile of TRL's fused loss on GPUs, which never holds all logits."""
FOUR_BIT_BLOCK, SCALE_BLOCK = 64, 256
"""Weights that share a scale, and scales that share one, in bitsandbytes."""
MOST_GPUS = 1024
"""Where :func:`fewest_gpus` stops looking."""


@dataclass(frozen=True)
class Settings:
    """What decides memory besides the shape of the model."""

    method: Method = "lora"
    zero_stage: int = 2
    offload_optimizer: bool = False
    offload_parameters: bool = False
    workers: int = 1
    on_gpu: bool = True
    dtype_bytes: int = 2
    """Bytes of a weight: 2 for bf16 and fp16, 4 for fp32."""
    batch_size: int = 4
    """Sequences per worker."""
    tokens: int = 768
    """Length of each."""
    gradient_checkpointing: bool = True
    gradient_accumulation: int = 1
    rank: int = 16
    target_modules: str | tuple[str, ...] = "all-linear"
    dora: bool = False
    double_quantization: bool = True
    liger: bool = False
    scored_share: float = 1.0
    """Share of positions whose logits are computed at once; only the loss on CPU workers holds them."""


@dataclass(frozen=True)
class Estimate:
    """Bytes on one worker."""

    weights: int
    """Of the base; with ZeRO-3 this worker's share of them."""
    adapters: int
    gradients: int
    """At the end of the backward pass."""
    optimizer: int
    """Adam's two moments, and fp32 copies of what is trained."""
    activations: int
    """What the forward pass leaves, and what the layer that goes backward needs on top; without the logits."""
    logits: int
    """Logits, their softmax and gradient, or the fused loss's tile."""
    step: int
    """What only the optimizer's step holds: gradients in fp32 and temporaries."""
    buffers: int
    """Framework, communication, and what ZeRO-3 has gathered."""
    host: int
    """Memory of the node for what is offloaded from this worker."""
    total: int
    """The peak. Less than the sum: gradients are there when activations are gone."""


def settings_of(config: Config) -> Settings:
    """What `config` says about memory."""
    training = config.training
    checkpointing = training.gradient_checkpointing
    return Settings(
        method=training.method,
        zero_stage=training.deepspeed.zero_stage,
        offload_optimizer=training.deepspeed.offload.optimizer != "none",
        offload_parameters=training.deepspeed.offload.parameters != "none",
        workers=training.workers,
        on_gpu=training.on_gpu,
        dtype_bytes=4 if config.base.dtype == "float32" else 2,
        batch_size=training.batch_size,
        tokens=training.max_tokens,
        gradient_checkpointing=training.on_gpu if checkpointing is None else checkpointing,
        gradient_accumulation=training.gradient_accumulation,
        rank=training.lora.rank,
        target_modules=training.lora.target_modules,
        dora=training.lora.variant == "dora",
        double_quantization=training.quantization.double,
        liger=training.liger is True,
    )


def of(config: Config, shape: Shape) -> Estimate:
    """The run that `config` describes, every batch full of rows of ``training.max_tokens``."""
    return estimate(shape, settings_of(config))


def estimate(shape: Shape, settings: Settings) -> Estimate:
    """Bytes on each worker, at the peak of a step.

    Raises:
        BadInput: ``target_modules`` names a layer the model does not have.
    """
    size, stage = settings.dtype_bytes, settings.zero_stage
    adapters = 0 if settings.method == "full" else _adapter_parameters(shape, settings)
    trained = adapters or shape.parameters
    shared = settings.workers if stage >= 1 else 1

    weights = _weight_bytes(shape, settings)
    if stage == 3:
        weights = 0 if settings.offload_parameters else _share(weights, settings.workers)
    states = _share(trained * _state_bytes(settings), shared)
    gradients = _share(trained * size, settings.workers if stage >= 2 else 1)
    step = _step_bytes(shape, settings, trained, gradients)
    host = 0
    if settings.offload_optimizer:
        # DeepSpeed's fp32 gradients and a 16-bit copy of the share lie there as well.
        host += states + _share(trained * (4 + size), shared)
        states, gradients, step = 0, 0, 0
    if settings.offload_parameters:
        host += _share(_weight_bytes(shape, settings), settings.workers)

    kept, layer = kept_activations(shape, settings), _working_layer(shape, settings)
    logits = _logits(shape, settings)
    carried = gradients if settings.gradient_accumulation > 1 else 0
    head = settings.dtype_bytes * shape.embedding if settings.method == "full" else 0
    backward = max(
        carried + kept + logits,
        carried + kept + layer + head,
        gradients + layer + head,  # the embedding's gradient is dense, and comes last
    )
    bucket = _bucket_bytes(settings, trained)
    lasting = _lasting_buffers(shape, settings)
    if stage == 3:  # made once; ZeRO 1 and 2 make it for each backward pass
        lasting, bucket = lasting + bucket, 0
    fixed = weights + size * adapters + states + lasting
    return Estimate(
        weights=weights,
        adapters=size * adapters,
        gradients=gradients,
        optimizer=states,
        activations=kept + layer,
        logits=logits,
        step=step,
        buffers=lasting + bucket,
        host=host,
        total=fixed + max(bucket + backward, gradients + step),
    )


def four_bit_bytes(parameters: int, double: bool) -> int:
    """Bytes of `parameters` weights in NF4 or FP4: 4.127 bits a weight with `double` quantization, 4.5 without."""
    scales = -(-parameters // FOUR_BIT_BLOCK)
    return parameters // 2 + (scales + 4 * -(-scales // SCALE_BLOCK) if double else 4 * scales)


def _share(total: int, workers: int) -> int:
    return -(-total // workers)


def _adapter_parameters(shape: Shape, settings: Settings) -> int:
    return sum(
        linear.count * (settings.rank * (linear.inputs + linear.outputs) + (linear.outputs if settings.dora else 0))
        for linear in shape.adapted(settings.target_modules)
    )


def _weight_bytes(shape: Shape, settings: Settings) -> int:
    if settings.method != "qlora":
        return settings.dtype_bytes * shape.parameters
    # transformers converts nn.Linear only: embeddings, norms, the output head and fused experts stay as they are.
    quantized = sum(linear.parameters for linear in shape.linears)
    return four_bit_bytes(quantized, settings.double_quantization) + settings.dtype_bytes * (
        shape.parameters - quantized
    )


def _state_bytes(settings: Settings) -> int:
    """Of one trained parameter: two moments, and an fp32 copy. Over fp32 weights only ZeRO 1 and 2 make a copy."""
    return 12 if settings.dtype_bytes == 2 or settings.zero_stage in (1, 2) else 8


def _step_bytes(shape: Shape, settings: Settings, trained: int, gradients: int) -> int:
    """What the optimizer's step needs on top of `gradients`.

    ZeRO makes one flat gradient of a worker's share and then an fp32 one (ZeRO-3: of :data:`SUB_GROUP` elements at a
    time). With those of 16 bit gone, torch's Adam, used on the CPU, makes two temporaries of what it updates at once:
    the flat share with ZeRO, one parameter at a time without. Fused Adam on GPUs makes none.
    """
    sixteen = settings.dtype_bytes == 2
    if settings.zero_stage == 0:
        largest = _largest(shape) if settings.method == "full" else trained
        return (4 * trained if sixteen else 0) + (0 if settings.on_gpu else 8 * min(largest, trained))
    share = _share(trained, settings.workers)
    if settings.zero_stage == 3:
        share = min(share, SUB_GROUP)
    flat = (4 + (2 if sixteen else 0)) * share
    return flat if settings.on_gpu else max(flat, 12 * share - gradients)


def _largest(shape: Shape) -> int:
    """Elements of the largest weight matrix."""
    return max(shape.embedding, *(linear.inputs * linear.outputs for linear in shape.linears))


# -- activations -------------------------------------------------------------------------------------------------


def kept_activations(shape: Shape, settings: Settings) -> int:
    """Bytes that autograd keeps from the forward pass until the backward pass needs them, the loss left out."""
    tokens = settings.batch_size * settings.tokens
    layer = settings.dtype_bytes * shape.hidden if settings.gradient_checkpointing else _layer_bytes(shape, settings)
    return tokens * (layer * shape.layers + 4 * shape.hidden)  # and the last norm


def _working_layer(shape: Shape, settings: Settings) -> int:
    """Bytes that one layer needs on top while it goes backward; with checkpointing all that it would have kept, too."""
    tokens = settings.batch_size * settings.tokens
    working = tokens * _backward_bytes(shape, settings)
    if settings.method == "qlora":
        working += settings.dtype_bytes * max(linear.inputs * linear.outputs for linear in shape.linears)
    return working + (tokens * _layer_bytes(shape, settings) if settings.gradient_checkpointing else 0)


def _layer_bytes(shape: Shape, settings: Settings) -> int:
    """What autograd keeps of one layer, a token."""
    size = settings.dtype_bytes
    full = settings.method == "full"
    norms = shape.norms * (4 if shape.upcast_norms and not settings.liger else size)
    if full and shape.upcast_norms:
        norms += shape.norms * size
    inputs = 2 * size * shape.hidden  # of attention and of the feed-forward layer
    attention = 4 * size * shape.query_width  # queries; keys and values, repeated for every query head; the output
    attention += 4 * shape.heads if settings.on_gpu else _scores(shape, settings) * (4 + _copy_bytes(settings))
    lora = 0
    if not full:
        ranks = sum(linear.count for linear in shape.adapted(settings.target_modules)) * settings.rank
        lora = -(-size * ranks // shape.layers)
    return norms + inputs + attention + _feed_forward_bytes(shape, settings) + lora


def _feed_forward_bytes(shape: Shape, settings: Settings) -> int:
    size = settings.dtype_bytes
    if shape.experts:
        states = 2 if settings.method == "full" else 1
        return shape.active_experts * size * (4 * shape.intermediate + states * shape.hidden)
    return size * shape.intermediate * ((3 if settings.liger else 4) if shape.gated else 2)


def _scores(shape: Shape, settings: Settings) -> int:
    """Attention scores of a token in one layer; only eager attention, on CPU workers, keeps them."""
    return shape.heads * settings.tokens


def _copy_bytes(settings: Settings) -> int:
    """The softmax is computed and kept in fp32, and kept once more in 16 bit where weights are."""
    return 2 if settings.dtype_bytes == 2 else 0


def _backward_bytes(shape: Shape, settings: Settings) -> int:
    """What a layer needs on top of what it kept while it goes backward, a token.

    First gradients inside the feed-forward layer; when that is done and let go, on the CPU two gradients of the scores.
    """
    wide = 3 * settings.dtype_bytes * shape.intermediate * max(1, shape.active_experts)
    if settings.on_gpu:
        return wide
    scores = _scores(shape, settings) * (8 - _copy_bytes(settings)) - _feed_forward_bytes(shape, settings)
    return max(wide, scores)


def _logits(shape: Shape, settings: Settings) -> int:
    """The loss's peak: on GPUs one tile of TRL's fused loss, on CPU workers softmax and two gradients in fp32."""
    tokens = settings.batch_size * settings.tokens
    size = settings.dtype_bytes
    trained_head = (4 + size) * shape.embedding if settings.method == "full" else 0
    if settings.on_gpu:
        rows, columns = LOSS_TILE
        return size * min(tokens, rows) * min(columns, shape.vocab) + (4 + size) * tokens * shape.hidden + trained_head
    return int(12 * tokens * settings.scored_share * shape.vocab)


# -- buffers -----------------------------------------------------------------------------------------------------


def _bucket_bytes(settings: Settings, trained: int) -> int:
    """Where gradients are put together to be reduced. Overlapped communication, on GPUs, takes two with ZeRO 1 and 2."""
    if settings.zero_stage == 0:
        return 0
    if not settings.on_gpu:  # memory that is never written is never taken
        return settings.dtype_bytes * min(BUCKET, trained)
    return settings.dtype_bytes * BUCKET * (2 if settings.zero_stage < 3 else 1)


def _lasting_buffers(shape: Shape, settings: Settings) -> int:
    process = CUDA_BYTES if settings.on_gpu else PROCESS_BYTES
    if settings.zero_stage < 3:
        return process
    gathered = settings.dtype_bytes * max(LIVE_PARAMETERS, _largest(shape))
    return process + min(_weight_bytes(shape, settings), gathered)


# -- what fits ---------------------------------------------------------------------------------------------------


def gib(count: float) -> str:
    """`count` bytes as GiB, one decimal."""
    return f"{count / 2**30:.1f}"


def usable(gpu_memory: float, margin: float = MARGIN) -> int:
    """Bytes of a GPU sold with `gpu_memory` GB that a plan may fill.

    A vendor's GB is taken as 10⁹ bytes, which no card has less of (an 80 GB H100 has 79.6 GiB, a 24 GB L4 22.5 GiB).
    """
    return int(gpu_memory * 10**9 * (1 - margin))


def fewest_gpus(shape: Shape, settings: Settings, capacity: int) -> int | None:
    """The smallest number of workers whose `capacity` bytes hold the run; None if :data:`MOST_GPUS` are too few."""
    most = estimate(shape, replace(settings, workers=MOST_GPUS)).total
    if most > capacity:
        return None
    low, high = 1, MOST_GPUS
    while low < high:  # more workers never take more memory each
        middle = (low + high) // 2
        if estimate(shape, replace(settings, workers=middle)).total <= capacity:
            high = middle
        else:
            low = middle + 1
    return low


@dataclass(frozen=True)
class Change:
    """One change, or several together, and what a worker takes then."""

    change: str
    settings: Settings
    total: int

    def __str__(self) -> str:
        return f"{self.change}: {gib(self.total)} GiB"


def advice(shape: Shape, settings: Settings, capacity: int) -> list[str]:
    """What to change so that `settings` fit into `capacity` bytes a worker, cheapest first.

    Each change that is enough alone is one line. If none is, they are added up until they are. The last line is the
    smallest number of GPUs. Nothing, if the run fits as it is.
    """
    if estimate(shape, settings).total <= capacity:
        return []
    alone = [found for found in _changes(shape, settings, capacity) if found.total <= capacity]
    lines = [str(found) for found in alone] or _together(shape, settings, capacity)
    sharded = replace(settings, zero_stage=3)
    count = fewest_gpus(shape, sharded, capacity) if settings.on_gpu else None
    if count is not None and count > settings.workers:
        total = estimate(shape, replace(sharded, workers=count)).total
        lines.append(f"training.workers={count} with training.deepspeed.zero_stage=3: {gib(total)} GiB")
    return lines or ["nothing here is enough: choose a smaller model, or shorter rows with training.max_tokens"]


def _together(shape: Shape, settings: Settings, capacity: int) -> list[str]:
    done: list[str] = []
    while found := next(_changes(shape, settings, capacity), None):
        done.append(found.change)
        settings = found.settings
        if found.total <= capacity:
            return [f"{' and '.join(done)}: {gib(found.total)} GiB"]
    return []


def _changes(shape: Shape, settings: Settings, capacity: int) -> Iterator[Change]:
    """Single changes that help at all, cheapest first."""
    before = estimate(shape, settings).total
    for change, changed in _candidates(shape, settings, capacity):
        after = estimate(shape, changed).total
        if after < 0.98 * before:
            yield Change(change, changed, after)


def _candidates(shape: Shape, settings: Settings, capacity: int) -> Iterator[tuple[str, Settings]]:
    if not settings.gradient_checkpointing:
        yield "training.gradient_checkpointing=true", replace(settings, gradient_checkpointing=True)
    if settings.batch_size > 1:
        size = next(
            (
                n
                for n in range(settings.batch_size - 1, 0, -1)
                if _fits(shape, replace(settings, batch_size=n), capacity)
            ),
            1,
        )
        accumulation = -(-settings.batch_size * settings.gradient_accumulation // size)
        yield (
            f"training.batch_size={size} and training.gradient_accumulation={accumulation}",
            replace(settings, batch_size=size, gradient_accumulation=accumulation),
        )
    if settings.workers > 1:
        for stage in range(settings.zero_stage + 1, 4):
            yield f"training.deepspeed.zero_stage={stage}", replace(settings, zero_stage=stage)
    if settings.method == "full":
        yield "training.method=lora and training.publish=adapter", replace(settings, method="lora")
    if settings.method != "qlora":
        publish = " and training.publish=adapter" if settings.method == "full" else ""
        yield f"training.method=qlora{publish}", replace(settings, method="qlora")
    if settings.on_gpu and not settings.offload_optimizer:
        stage = max(1, settings.zero_stage)
        more = f" and training.deepspeed.zero_stage={stage}" if stage != settings.zero_stage else ""
        yield (
            f"training.deepspeed.offload.optimizer=cpu{more}",
            replace(settings, offload_optimizer=True, zero_stage=stage),
        )
    if settings.on_gpu and not settings.offload_parameters:
        yield (
            "training.deepspeed.zero_stage=3 and training.deepspeed.offload.parameters=cpu",
            replace(settings, zero_stage=3, offload_parameters=True),
        )


def _fits(shape: Shape, settings: Settings, capacity: int) -> bool:
    return estimate(shape, settings).total <= capacity


def explain_out_of_memory(config: Config, shape: Shape) -> str:
    """What the plan says of a run whose workers ran out of memory, and the cheapest setting that takes a tenth off.

    One or two sentences without a full stop at the end, to follow a colon or semicolon.
    """
    settings = settings_of(config)
    plan = estimate(shape, settings)
    parts = {
        "weights and adapters": plan.weights + plan.adapters,
        "optimizer": plan.optimizer,
        "gradients": plan.gradients,
        "activations": plan.activations,
        "logits": plan.logits,
    }
    largest = sorted(parts, key=lambda name: -parts[name])[:3]
    shown = ", ".join(f"{name} {gib(parts[name])}" for name in largest)
    said = f"by plan each takes {gib(plan.total)} GiB with {settings.batch_size} × {settings.tokens} tokens ({shown})"
    found = next((found for found in _changes(shape, settings, 0) if found.total <= 0.9 * plan.total), None)
    if found is None:
        return f"{said}. Lower training.max_tokens, or use a smaller base; `metier plan` shows what takes how much"
    return f"{said}. Set {found.change}, which takes {gib(found.total)} GiB; `metier plan` shows what else helps"
