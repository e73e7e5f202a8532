"""The base model of a run with its LoRA layers, loaded on the worker that trains it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cluster.config import Config


def load_with_lora(config: Config, directory: Path) -> Any:
    """A ``PeftModel`` over the base in `directory`, in ``base.dtype``, LoRA weights in the same precision.

    LoRA weights are not raised to fp32 here: DeepSpeed keeps fp32 master copies of what is trained, and mixed
    precisions would cast in every layer. On the CPU attention is computed eagerly: PyTorch's fused CPU kernel took
    a third of a step there (docs/decisions/0004-training-speed.md).
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    on_gpu = config.training.gpus_per_worker > 0
    model = AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=getattr(torch, config.base.dtype),
        attn_implementation="sdpa" if on_gpu else "eager",
        trust_remote_code=config.base.trust_remote_code,
    )
    model.config.use_cache = False
    lora = config.training.lora
    targets = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    peft_config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
        base_model_name_or_path=config.base.source,
        revision=config.base.revision,
    )
    return get_peft_model(model, peft_config, autocast_adapter_dtype=False)
