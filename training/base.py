"""The model of a run, loaded on the worker that trains it: the base in its precision or in four bits, LoRA or all weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cluster.config import Config


def load(config: Config, directory: Path) -> Any:
    """The model that ``training.method`` asks for, over the base in `directory`.

    ``full``: a ``PreTrainedModel`` whose every weight is trained. ``lora`` and ``qlora``: a ``PeftModel``, LoRA weights
    in ``base.dtype`` like the base. They are not raised to fp32 here: DeepSpeed keeps fp32 master copies of what is
    trained, and mixed precisions would cast in every layer. On the CPU attention is computed eagerly: PyTorch's
    fused CPU kernel took a third of a step there (docs/decisions/0004-training-speed.md).

    With ZeRO-3 the caller must have made its ``TrainingArguments`` before: transformers then shards weights as it
    reads them.
    """
    import torch
    from transformers import AutoModelForCausalLM

    training = config.training
    dtype = getattr(torch, config.base.dtype)
    if training.deepspeed.zero_stage == 3 and torch.distributed.is_initialized():
        import deepspeed

        # Or it would take this worker for the only one while weights are read, and keep all of them.
        deepspeed.init_distributed("nccl" if training.on_gpu else "gloo")
    model = AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=dtype,
        attn_implementation="sdpa" if training.on_gpu else "eager",
        trust_remote_code=config.base.trust_remote_code,
        **({"quantization_config": _quantization(config, dtype)} if training.method == "qlora" else {}),
    )
    model.config.use_cache = False
    return model if training.method == "full" else with_lora(config, model)


def with_lora(config: Config, model: Any) -> Any:
    """`model`, frozen, with the LoRA layers of ``training.lora``."""
    from peft import LoraConfig, get_peft_model

    model.name_or_path = (
        config.base.source
    )  # what PEFT writes beside the weights; a path of this machine means nothing elsewhere
    lora = config.training.lora
    targets = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    peft_config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_rslora=lora.variant == "rslora",
        use_dora=lora.variant == "dora",
        target_modules=targets,
        task_type="CAUSAL_LM",
        base_model_name_or_path=config.base.source,
        revision=config.base.revision,
    )
    peft = get_peft_model(model, peft_config, autocast_adapter_dtype=False)
    peft.enable_input_require_grads()
    return peft


def _quantization(config: Config, dtype: Any) -> Any:
    """NF4 after Dettmers et al., 2023. The four-bit values are stored in tensors of the base's type, two or four to an
    element: ZeRO-3 shards what it takes for ordinary weights (bitsandbytes' own ``uint8`` it cannot).
    """
    from transformers import BitsAndBytesConfig

    quantization = config.training.quantization
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.type,
        bnb_4bit_use_double_quant=quantization.double,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,
    )
