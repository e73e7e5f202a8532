"""From a configuration and a model's directory to the executor that computes it."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch

from cluster.config import Config
from cluster.errors import ConfigError, ResourcesShort, Unavailable
from cluster.machine import free_memory
from cluster.models import LOADING
from serving.engine.native.attention import register
from serving.engine.native.cache import cache_pages
from serving.engine.native.executor import Executor
from serving.engine.native.fused.shape import Unfit
from serving.engine.native.lora import adapter_bytes
from serving.engine.native.modules import ModulesExecutor

log = logging.getLogger(__name__)


def load_executor(config: Config, directory: Path) -> Executor:
    """The model in `directory`, its cache and slots: our kernels where they can be (:mod:`.fused`), else transformers'
    modules, on the GPU that ``serving.generator.gpus`` asks for or on the CPU.

    Raises:
        ConfigError: nothing here computes the model as ``kernels`` and ``quantization`` ask.
        ResourcesShort: the memory does not hold the cache of one sequence beside the model and its adapters.
    """
    settings = config.serving.generator
    device = torch.device("cuda" if torch.cuda.is_available() and settings.gpus > 0 else "cpu")
    reason = "kernels is off" if settings.kernels == "off" else "they are for CPUs" if device.type != "cpu" else ""
    reason = reason or ("nf4 is none of theirs" if settings.quantization == "nf4" else "")
    if not reason:
        try:
            return _fused(config, _load_model(config, directory, device))
        except (Unfit, Unavailable) as error:
            reason = str(error) if isinstance(error, Unavailable) else f"{config.base.source} {error}"
    if settings.kernels == "on":
        raise ConfigError(
            f"serving.generator.kernels=on, but our kernels do not run here: {reason}",
            param="serving.generator.kernels",
        )
    if settings.quantization == "int4":
        raise ConfigError(
            f"serving.generator.quantization=int4 is one of our CPU kernels', which do not run here: {reason}; use int8, "
            "nf4 or none",
            param="serving.generator.quantization",
        )
    if settings.kernels == "auto" and device.type == "cpu":
        log.info("transformers' modules compute, not our kernels: %s", reason)
    model = _load_model(config, directory, device, **_quantized(settings.quantization, config.base.dtype))
    _, pages = _room(config, model, device)
    return ModulesExecutor(
        model,
        pages=pages,
        page_tokens=settings.page_tokens,
        slots=settings.adapters_resident,
        max_rank=settings.max_rank,
        device=device,
        dtype=getattr(torch, config.base.dtype),
    )


def _fused(config: Config, model: Any) -> Executor:
    from serving.engine.native.fused.executor import FusedExecutor

    settings = config.serving.generator
    slots, pages = _room(config, model, torch.device("cpu"))
    return FusedExecutor(
        model,
        pages=pages,
        page_tokens=settings.page_tokens,
        slots=settings.adapters_resident,
        max_rank=settings.max_rank,
        adapter_bytes=slots,
        context=config.base.context_tokens,
        quantization=settings.quantization,
        threads=settings.threads or os.cpu_count() or 1,
        cache=Path(config.models_cache),
    )


def _room(config: Config, model: Any, device: torch.device) -> tuple[int, int]:
    """Bytes of the adapters' slots, and pages of the cache beside them."""
    settings, dtype = config.serving.generator, getattr(torch, config.base.dtype)
    slots = adapter_bytes(model, slots=settings.adapters_resident, max_rank=settings.max_rank, dtype=dtype)
    free = free_bytes(device)
    if slots > free:
        raise ResourcesShort(
            f"{settings.adapters_resident} adapters (serving.generator.adapters_resident) of rank {settings.max_rank} "
            f"(serving.generator.max_rank) take {slots:,} bytes, and {free:,} are free; lower one of them",
            param="serving.generator.max_rank",
        )
    return slots, cache_pages(config, model.config.get_text_config(), free - slots)


def _load_model(config: Config, directory: Path, device: torch.device, **options: Any) -> Any:
    """transformers' model, ready to run with :mod:`.attention`."""
    from transformers import AutoModelForCausalLM

    with LOADING:
        model = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=getattr(torch, config.base.dtype),
            attn_implementation=register(),
            trust_remote_code=config.base.trust_remote_code,
            **options,
        )
    return model.to(device).eval()


def eos_ids(directory: Path, tokenizer: Any) -> frozenset[int]:
    """Ids that end an answer: those that the model in `directory` names, and the end of turn of its `tokenizer`, which
    training teaches and a model's own settings need not name."""
    from transformers import AutoConfig, GenerationConfig

    try:
        named = GenerationConfig.from_pretrained(directory).eos_token_id
    except OSError:  # the file is optional
        named = AutoConfig.from_pretrained(directory).get_text_config().eos_token_id
    ids = named if isinstance(named, list) else [named]
    return frozenset(token for token in (*ids, tokenizer.eos_token_id) if token is not None)


def free_bytes(device: torch.device) -> int:
    """Memory of `device` that nobody holds."""
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else free_memory()


def _quantized(kind: str, dtype: str) -> dict[str, Any]:
    """bitsandbytes: 8 bits a value with a scale a row (Dettmers et al., 2022), or NF4 with double quantization after Dettmers et al., 2023."""
    from transformers import BitsAndBytesConfig

    if kind == "none":
        return {}
    if kind == "int8":
        # Without outlier columns: they are those of all tokens of a pass, so rows would change each other's answers.
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)}
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
    )
    return {"quantization_config": config}
