"""The memory of one training step, planned (``training.plan``) and measured.

``python -m benchmarks.plan [--quick] [--json FILE]``. A case is a model of random weights (memory does not ask what they
are), LoRA or all weights, under DeepSpeed with our own configuration and one worker: one small step so that optimizer
states exist, then a full one. On the CPU the measure is the growth of the resident set, in a child process in which
glibc gives back at once what is freed; on a GPU, what PyTorch's allocator counts. ``static`` is held between steps,
``peak`` the most during a step, both without the process itself: a small model goes first and loads what loads late.
Not covered: several workers, QLoRA, offload, and on GPUs TRL's loss (logits are whole here).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import report
from cluster.config import Config, load
from training.model_shape import find, shape_of
from training.plan import CUDA_BYTES, PROCESS_BYTES, estimate, settings_of

OTHER = {
    "small": {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 1000,
    },
    "llama": {
        "model_type": "llama",
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
    },
    "qwen3": {
        "model_type": "qwen3",
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": 50000,
        "tie_word_embeddings": True,
    },
    "gpt_neox": {
        "model_type": "gpt_neox",
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "vocab_size": 20000,
        "tie_word_embeddings": False,
    },
    "mixtral": {
        "model_type": "mixtral",
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 20000,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "tie_word_embeddings": False,
    },
}
"""Shapes that are not SmolLM2's: other widths, an untied head, norms of queries, LayerNorm and GELU, experts."""
Case = tuple[str, str, str, int, int, int, bool, float]
CASES: tuple[Case, ...] = (
    # model, method, dtype, ZeRO, rows, tokens, checkpointing, share of positions scored
    ("smollm2-135m", "lora", "bfloat16", 2, 4, 256, False, 0.0625),
    ("smollm2-135m", "full", "bfloat16", 2, 2, 256, False, 0.0625),
    ("smollm2-135m", "lora", "bfloat16", 2, 1, 1024, True, 0.0625),
    ("llama", "lora", "bfloat16", 2, 2, 512, False, 1.0),
    ("smollm2-135m", "lora", "bfloat16", 2, 1, 1024, False, 0.0625),
    ("smollm2-135m", "lora", "float32", 2, 2, 256, False, 0.0625),
    ("smollm2-135m", "lora", "bfloat16", 2, 4, 256, True, 1.0),
    ("smollm2-135m", "lora", "bfloat16", 3, 4, 256, False, 0.0625),
    ("smollm2-135m", "full", "bfloat16", 0, 1, 128, False, 0.125),
    ("smollm2-135m", "full", "bfloat16", 1, 1, 128, False, 0.125),
    ("smollm2-135m", "full", "bfloat16", 3, 1, 128, False, 0.125),
    ("smollm2-135m", "full", "float32", 2, 2, 256, False, 0.0625),
    ("smollm2-135m", "full", "float32", 0, 1, 128, False, 0.125),
    ("smollm2-135m", "full", "bfloat16", 2, 4, 256, True, 0.0625),
    ("llama", "full", "bfloat16", 2, 2, 512, False, 1.0),
    ("qwen3", "lora", "bfloat16", 2, 2, 512, False, 0.0625),
    ("gpt_neox", "lora", "bfloat16", 2, 2, 512, False, 0.0625),
    ("mixtral", "lora", "bfloat16", 2, 2, 512, False, 0.0625),
)


WARM: tuple[Case, ...] = tuple(
    (name, method, "bfloat16", stage, 1, 64, True, 0.5)
    for name, method, stage in (("small", "lora", 2), ("small", "full", 3))
)


def measure(count: int) -> dict[str, Any]:
    """MiB planned and measured for the first `count` cases; ``ratios`` are relative errors of the peak."""
    child = subprocess.Popen(
        [sys.executable, "-c", f"from benchmarks.plan import child; child({count})"],
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "TRANSFORMERS_VERBOSITY": "error"},
        stdout=subprocess.PIPE,
        text=True,
    )
    rows = []
    for line in child.stdout or ():
        if line.startswith("{"):
            print(line, end="", file=sys.stderr, flush=True)
            rows.append(json.loads(line))
    if child.wait():
        raise SystemExit("the child that measures failed")
    errors = [abs(row["error"]) for row in rows]
    return {
        "cases": rows,
        "ratios": {"worst": round(max(errors), 3), "mean": round(sum(errors) / len(errors), 3)},
    }


def _config(case: Case) -> tuple[dict[str, Any], Config]:
    name, method, dtype, stage, rows, tokens, checkpointing, _ = case
    import torch

    config_json = OTHER.get(name) or find(name, "")
    config = load(
        None,
        [
            f"base.dtype={dtype}",
            "base.context_tokens=2048",
            f"training.method={method}",
            f"training.publish={'model' if method == 'full' else 'adapter'}",
            f"training.deepspeed.zero_stage={stage}",
            f"training.batch_size={rows}",
            f"training.max_tokens={tokens}",
            f"training.gradient_checkpointing={str(checkpointing).lower()}",
            "training.workers=1",
            f"training.gpus_per_worker={int(torch.cuda.is_available())}",
        ],
    )
    return config_json, config


def child(count: int) -> None:
    """Measure the first `count` cases and print one JSON object a line."""
    import deepspeed
    import torch

    on_gpu = torch.cuda.is_available()
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    deepspeed.init_distributed("nccl" if on_gpu else "gloo", dist_init_required=True)
    for case in WARM:
        _measured(case)
    for case in CASES[:count]:
        config_json, config = _config(case)
        settings = replace(settings_of(config), scored_share=case[-1])
        plan = estimate(shape_of(config_json), settings)
        planned = plan.total - (CUDA_BYTES if on_gpu else PROCESS_BYTES)
        static, peak = _measured(case)
        row = {
            "case": " ".join(str(part) for part in case),
            "static_planned": _mib(plan.weights + plan.adapters + plan.optimizer),
            "static_measured": _mib(static),
            "peak_planned": _mib(planned),
            "peak_measured": _mib(peak),
            "error": round(planned / peak - 1, 3),
        }
        print(json.dumps(row), flush=True)


def _measured(case: Case) -> tuple[int, int]:
    """(bytes held between steps, most bytes during a step)."""
    import deepspeed
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from training.base import with_lora
    from training.deepspeed import ds_config

    config_json, config = _config(case)
    on_gpu = config.training.on_gpu
    _reset_peak()
    before = _resident()
    known = AutoConfig.for_model(**config_json)
    torch.set_default_dtype(getattr(torch, config.base.dtype))
    with torch.device("cuda" if on_gpu else "cpu"):
        model: Any = AutoModelForCausalLM.from_config(known, attn_implementation="sdpa" if on_gpu else "eager")
    torch.set_default_dtype(torch.float32)
    model.config.use_cache = False
    if config.training.method == "lora":
        model = with_lora(config, model)
    if config.training.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    told = {key: value for key, value in ds_config(config).items() if key != "train_batch_size"}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, model_parameters=trained, config=told)
    training = config.training
    _step(engine, 1, 32, 16)
    _reset_peak()
    static = _resident() - before
    _step(engine, training.batch_size, training.max_tokens, round(training.max_tokens * case[-1]))
    peak = _peak() - before
    engine.destroy()
    return static, peak


def _mib(count: float) -> int:
    return round(count / 2**20)


def _step(engine: Any, rows: int, tokens: int, scored: int) -> None:
    """Forward, the loss of CPU workers over the last `scored` positions, backward, optimizer."""
    import torch

    ids = torch.randint(0, 200, (rows, tokens), device=engine.device)
    logits = engine(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        use_cache=False,
        logits_to_keep=torch.arange(tokens - scored, tokens, device=engine.device),
    ).logits
    targets = ids[:, :scored].flatten()
    loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets, reduction="sum") / targets.numel()
    del logits
    engine.backward(loss)
    engine.step()


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def _resident() -> int:
    import torch

    return torch.cuda.memory_allocated() if torch.cuda.is_available() else _status("VmRSS")


def _peak() -> int:
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _status("VmHWM")


def _reset_peak() -> None:
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


if __name__ == "__main__":
    report.run(__doc__, measure, quick=4, full=len(CASES))
