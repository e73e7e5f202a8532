"""A transformers model read as what the kernels compute: linears, norms, angles and a handful of numbers.

Covered: decoders of Llama's shape, that is RMS norms, rotary positions, grouped-query attention and a gated feed-forward
layer: Llama, Mistral, Qwen 2 and 3, Phi-3, Gemma 1 to 3 (text), Granite, SmolLM 3. What a family does beyond that is
read from its modules (biases, norms of queries and keys, norms after a block, windows, caps, multipliers). Not covered:
positions that depend on the length of the prompt (``longrope``, ``dynamic``), mixtures of experts, float16.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

FAMILIES = {
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "phi3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "granite",
    "smollm3",
}
ACTS = {"silu": 0, "swish": 0, "gelu_pytorch_tanh": 1, "gelu": 2}
PRECISIONS = (torch.bfloat16, torch.float32)


class Unfit(Exception):
    """The kernels do not compute this model; the message is the end of a sentence that begins with the model's name."""


@dataclass(frozen=True)
class View:
    """Rows ``first … first + rows - 1`` of the linear layer called `linear`."""

    linear: str
    first: int
    rows: int


@dataclass(frozen=True)
class Block:
    """One layer. Norms are float32, those of Gemma with their one added."""

    views: dict[str, View]
    """``q k v o gate up down``."""
    norms: dict[str, torch.Tensor]
    """``in``, ``mid`` and, where the model has them, ``out_attn``, ``out_mlp``, ``q``, ``k``."""
    angles: tuple[torch.Tensor, torch.Tensor] | None
    """Cosine and sine, ``[context, rotary / 2]``; ``None`` leaves positions out."""
    window: int


@dataclass(frozen=True)
class Shape:
    """A decoder."""

    linears: dict[str, Any]
    """Module name -> module; :attr:`head` is among them."""
    blocks: list[Block]
    embedding: torch.Tensor
    norm: torch.Tensor
    head: str
    numbers: dict[str, float] = field(default_factory=dict)
    """The fields of :class:`.library.Model` that are numbers."""


def describe(model: Any, context: int) -> Shape:
    """Read `model`, a causal LM of transformers on the CPU.

    Args:
        context: positions that are served.

    Raises:
        Unfit: it is not of Llama's shape, or a size is not one the kernels take.
    """
    config = model.config.get_text_config()
    if config.model_type not in FAMILIES:
        raise Unfit(f"is of the kind {config.model_type}")
    if model.dtype not in PRECISIONS:
        raise Unfit(f"is in {str(model.dtype).removeprefix('torch.')}")
    inner = model.get_decoder()
    names = {module: name for name, module in model.named_modules()}
    head = model.get_output_embeddings()
    first = inner.layers[0].self_attn
    width = first.head_dim
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    sizes = config.hidden_size, width, config.intermediate_size
    if any(size % 16 for size in sizes):
        raise Unfit(
            "has a hidden size, heads and an inner size of {}, {} and {}, not all multiples of 16".format(*sizes)
        )
    act = getattr(config, "hidden_activation", None) or config.hidden_act
    if act not in ACTS:
        raise Unfit(f"uses the activation {act}")
    angles = _Angles(inner, config, context)
    blocks = [_block(layer, config, names, angles) for layer in inner.layers]
    linears = {name: module for module, name in names.items() if isinstance(module, torch.nn.Linear)}
    used = {view.linear for block in blocks for view in block.views.values()}
    linears = {name: module for name, module in linears.items() if name in used or module is head}
    numbers = {
        "layers": len(blocks),
        "hidden": config.hidden_size,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": width,
        "rotary": next((2 * block.angles[0].shape[1] for block in blocks if block.angles is not None), 0),
        "inter": config.intermediate_size,
        "context": context,
        "act": ACTS[act],
        "eps": config.rms_norm_eps,
        "embedding_scale": float(getattr(inner.embed_tokens, "embed_scale", 1.0))
        * getattr(config, "embedding_multiplier", 1.0),
        "attention_scale": first.scaling,
        "attention_cap": getattr(config, "attn_logit_softcapping", None) or 0.0,
        "logit_cap": getattr(config, "final_logit_softcapping", None) or 0.0,
        "logit_scale": 1.0 / getattr(config, "logits_scaling", 1.0),
        "residual_scale": getattr(config, "residual_multiplier", 1.0),
    }
    return Shape(linears, blocks, inner.embed_tokens.weight, _norm(inner.norm), names[head], numbers)


def _block(layer: Any, config: Any, names: dict[Any, str], angles: _Angles) -> Block:
    attention, feed = layer.self_attn, layer.mlp
    q, kv = config.num_attention_heads * attention.head_dim, config.num_key_value_heads * attention.head_dim
    views = {"o": _whole(attention.o_proj, names), "down": _whole(feed.down_proj, names)}
    if hasattr(attention, "qkv_proj"):
        name = names[attention.qkv_proj]
        views |= {"q": View(name, 0, q), "k": View(name, q, kv), "v": View(name, q + kv, kv)}
    else:
        views |= {side: _whole(getattr(attention, f"{side}_proj"), names) for side in "qkv"}
    if hasattr(feed, "gate_up_proj"):
        name, inter = names[feed.gate_up_proj], config.intermediate_size
        views |= {"gate": View(name, 0, inter), "up": View(name, inter, inter)}
    else:
        views |= {side: _whole(getattr(feed, f"{side}_proj"), names) for side in ("gate", "up")}
    norms = {"in": _norm(layer.input_layernorm)}
    if hasattr(layer, "pre_feedforward_layernorm"):
        norms["mid"] = _norm(layer.pre_feedforward_layernorm)
        norms["out_attn"] = _norm(layer.post_attention_layernorm)
        norms["out_mlp"] = _norm(layer.post_feedforward_layernorm)
    else:
        norms["mid"] = _norm(layer.post_attention_layernorm)
    for side in "qk":
        if (norm := getattr(attention, f"{side}_norm", None)) is not None:
            norms[side] = _norm(norm)
    turned = angles(attention) if getattr(attention, "use_rope", True) else None
    window = getattr(attention, "sliding_window", None)
    if config.model_type in ("mistral", "phi3"):  # these say it for all layers
        window = getattr(config, "sliding_window", None)
    return Block(views, norms, turned, window or 0)


def _whole(linear: torch.nn.Linear, names: dict[Any, str]) -> View:
    return View(names[linear], 0, linear.out_features)


def _norm(module: Any) -> torch.Tensor:
    weight = module.weight.detach().float()
    return (weight + 1.0 if "Gemma" in type(module).__name__ else weight).contiguous()


class _Angles:
    """Cosine and sine of all positions, one table a kind of layers."""

    def __init__(self, inner: Any, config: Any, context: int) -> None:
        self.rotary, self.positions = inner.rotary_emb, torch.arange(context)[None]
        self.rope = getattr(config, "rope_parameters", None) or {}
        kinds = [self.rope, *(each for each in self.rope.values() if isinstance(each, dict))]
        if any(kind.get("rope_type") in ("longrope", "dynamic") for kind in kinds):
            raise Unfit("has positions that depend on the length of the prompt")
        self.tables: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def __call__(self, attention: Any) -> tuple[torch.Tensor, torch.Tensor]:
        layers = getattr(attention, "layer_type", None)
        kind: str = layers if layers and layers in self.rope else ""
        if kind not in self.tables:
            cosine, sine = self.rotary(torch.zeros(1), self.positions, *([kind] if kind else []))
            half = cosine.shape[-1] // 2
            self.tables[kind] = cosine[0, :, :half].contiguous(), sine[0, :, :half].contiguous()
        return self.tables[kind]
