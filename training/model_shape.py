"""The shape of a causal language model from its ``config.json`` alone: what memory depends on, and no weights.

:func:`shape_of` builds the model on torch's meta device, so its parameters and linear layers are those of the real one.
:func:`find` gets the ``config.json``: of a shape that comes with metier (``training/model_shapes``), of a file or
directory, or of a model in the cache. Nothing here goes to a hub, and no code of a model is run.

Not covered: models that need ``trust_remote_code``; encoders; vision towers of models that have some.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.config import ModelConfig
from cluster.errors import BadInput, ConfigError, NotFound

SHAPES = Path(__file__).with_name("model_shapes")
"""One ``NAME.json`` a known shape."""
NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class Linear:
    """Linear layers of one name: ``model.layers.*.mlp.up_proj``."""

    path: str
    inputs: int
    outputs: int
    count: int

    @property
    def parameters(self) -> int:
        """Of all of them, biases left out."""
        return self.count * self.inputs * self.outputs


@dataclass(frozen=True)
class Shape:
    """The numbers of a model that memory depends on."""

    parameters: int
    """All of them, a tied output head counted once."""
    linears: tuple[Linear, ...]
    """Linear layers, the output head left out: what ``all-linear`` adapts and what QLoRA holds in four bits."""
    layers: int
    hidden: int
    intermediate: int
    """Width of the feed-forward layer; of one expert where there are experts."""
    gated: bool
    """Whether the feed-forward layer multiplies two projections (SwiGLU, GeGLU)."""
    heads: int
    kv_heads: int
    head_size: int
    vocab: int
    tied: bool
    """Whether the output head is the embedding."""
    norms: int
    """Elements a token that pass through the norms of one layer: 2 × hidden for Llama."""
    upcast_norms: bool
    """Whether norms compute in fp32 and keep what they computed (RMSNorm in transformers), or keep their input (LayerNorm)."""
    experts: int = 0
    """Experts in a layer; 0 for a dense model."""
    active_experts: int = 0
    """Experts a token passes through."""

    @property
    def query_width(self) -> int:
        """Elements a token of the queries of one layer."""
        return self.heads * self.head_size

    @property
    def embedding(self) -> int:
        """Parameters of the input embedding."""
        return self.vocab * self.hidden

    def adapted(self, target_modules: str | tuple[str, ...]) -> tuple[Linear, ...]:
        """The linear layers that LoRA adapts; names match as in PEFT: whole, or after a dot.

        Raises:
            BadInput: a name matches none.
        """
        if target_modules == "all-linear":
            return self.linears
        for name in target_modules:
            if not any(_matches(linear, name) for linear in self.linears):
                known = sorted({linear.path.rpartition(".")[2] for linear in self.linears})
                raise BadInput(
                    f"training.lora.target_modules: the model has no linear layer '{name}'; it has {', '.join(known)}",
                    param="training.lora.target_modules",
                )
        return tuple(linear for linear in self.linears if any(_matches(linear, name) for name in target_modules))


def _matches(linear: Linear, name: str) -> bool:
    return linear.path == name or linear.path.endswith(f".{name}")


def shape_of(config_json: dict[str, Any]) -> Shape:
    """The shape of the model that `config_json` (the content of its ``config.json``) describes.

    Raises:
        BadInput: transformers knows no such model type, or no causal language model of it.
    """
    model = _skeleton(config_json)
    config = model.config.get_text_config()
    head = model.get_output_embeddings()
    known: dict[int, tuple[int, ...]] = {id(p): tuple(p.shape) for p in model.parameters()}
    linears = Counter(
        (NUMBER.sub("*", name), *_sides(module))
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D") and module is not head
    )
    layers = _number(config, "num_hidden_layers", "n_layer")
    hidden = _number(config, "hidden_size", "n_embd")
    heads = _number(config, "num_attention_heads", "n_head")
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_size = getattr(config, "head_dim", None) or hidden // heads
    experts = next((n for key in EXPERTS if (n := getattr(config, key, None))), 0)
    intermediate = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * hidden
    if experts:
        intermediate = getattr(config, "moe_intermediate_size", None) or intermediate
    return Shape(
        parameters=sum(_product(shape) for shape in known.values()),
        linears=tuple(Linear(path, n, m, count) for (path, n, m), count in linears.items()),
        layers=layers,
        hidden=hidden,
        intermediate=intermediate,
        gated=bool(experts) or _is_gated(linears, hidden, intermediate),
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        vocab=config.vocab_size,
        tied=head is not None and head.weight is model.get_input_embeddings().weight,
        norms=_norms(model, layers, hidden, heads, kv_heads),
        upcast_norms=not any(type(module).__name__ == "LayerNorm" for module in model.modules()),
        experts=experts,
        active_experts=(getattr(config, "num_experts_per_tok", None) or 1) if experts else 0,
    )


EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
"""What ``config.json`` calls the number of experts."""


def _skeleton(config_json: dict[str, Any]) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, __version__

    settings = {key: value for key, value in config_json.items() if key not in ("auto_map", "quantization_config")}
    kind = settings.pop("model_type", None)
    try:
        config = AutoConfig.for_model(kind, **settings)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except (ValueError, TypeError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise BadInput(
            f"transformers {__version__} builds no causal language model of type '{kind}' from this config.json; give that of a text model it knows ({reason[:120]})",
            param="model",
        ) from error


def _sides(module: Any) -> tuple[int, int]:
    """Inputs and outputs; transformers' ``Conv1D`` keeps its weight the other way round."""
    first, second = module.weight.shape
    return (first, second) if type(module).__name__ == "Conv1D" else (second, first)


def _number(config: Any, *names: str) -> int:
    for name in names:
        if isinstance(value := getattr(config, name, None), int):
            return value
    raise BadInput(
        f"config.json does not say {' or '.join(names)}; give that of a causal language model", param="model"
    )


def _product(shape: tuple[int, ...]) -> int:
    total = 1
    for side in shape:
        total *= side
    return total


def _is_gated(linears: Counter[tuple[str, int, int]], hidden: int, intermediate: int) -> bool:
    """Whether twice as much goes up to the feed-forward width as comes down, in the modules that hold a way down."""
    down = {
        path.rpartition(".")[0]: count for (path, n, m), count in linears.items() if (n, m) == (intermediate, hidden)
    }
    up = sum(
        m * count
        for (path, n, m), count in linears.items()
        if n == hidden and m in (intermediate, 2 * intermediate) and path.rpartition(".")[0] in down
    )
    return up >= 2 * intermediate * sum(down.values()) > 0


def _norms(model: Any, layers: int, hidden: int, heads: int, kv_heads: int) -> int:
    """Norms of queries and keys (Qwen3) have a weight of one head's size and run over all heads."""
    total = 0
    for name, module in model.named_modules():
        if "Norm" in type(module).__name__ and NUMBER.search(f"{name}."):
            width = module.weight.numel() if getattr(module, "weight", None) is not None else hidden
            last = name.rpartition(".")[2]
            many = {"q_norm": heads, "k_norm": kv_heads}.get(last, 1)
            total += width * (many if width < hidden else 1)
    return total // layers


# -- where a config.json comes from ------------------------------------------------------------------------------


def names() -> list[str]:
    """The shapes that come with metier."""
    return sorted(file.stem for file in SHAPES.glob("*.json"))


def find(source: str, cache: str | Path) -> dict[str, Any]:
    """The ``config.json`` of `source`: a shape by name, a JSON file, a directory, or a model source of the
    configuration, of which a hub is asked for that one file only.

    Raises:
        NotFound: there is none.
        BadInput: it is not JSON of a model.
        Unavailable: the hub does not answer.
    """
    if source in names():
        return _read(SHAPES / f"{source}.json")
    path = Path(source).expanduser()
    if path.is_file():
        return _read(path)
    if (path / "config.json").is_file():
        return _read(path / "config.json")
    from cluster.models import config_file

    try:
        return _read(config_file(ModelConfig(source=source), cache))
    except ConfigError:
        raise NotFound(
            f"'{source}' is no shape that metier knows, no file, directory or model source; give the path of a config.json, "
            f"or name one of {', '.join(names())}",
            param="model",
        ) from None


def _read(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadInput(f"{file}: not JSON ({error}); give the config.json of a model", param="model") from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise BadInput(f"{file}: it has no model_type; give the config.json of a model", param="model")
    return config
