"""A decode step with LoRA adapters: our executor over transformers' modules against PEFT, on the same model and context.

``python -m benchmarks.decode_step [--quick] [--json FILE]``. The arms decode the same rows at the same context in turns,
one step each; what is compared is the median step. Cases: one row, eight rows of one adapter, eight rows of eight
adapters. PEFT runs as its users run it: transformers' SDPA attention over a cache allocated beforehand (the fastest
arrangement of it that we know), ``adapter_names`` for mixed rows. "no adapter" is our executor without adapters. Not
covered: prefill, our fused kernels and other engines (``benchmarks.generation``).
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, StaticCache

from benchmarks import report
from cluster.config import load
from cluster.models import resolve
from serving.engine.native.attention import register
from serving.engine.native.executor import Part
from serving.engine.native.lora import read_lora
from serving.engine.native.modules import ModulesExecutor

CONTEXT = 300
PAGE_TOKENS = 16
RANK = 16
ADAPTERS = 8
CASES = {"1 row": [0], "8 rows": [0] * 8, "8 rows, 8 adapters": list(range(ADAPTERS))}
"""Case -> the adapter of each row."""


@torch.inference_mode()
def measure(steps: int) -> dict[str, Any]:
    """Median milliseconds a step, by case and arm; `steps` of each."""
    config = load()
    directory = resolve(config.base, config.models_cache)
    pages = -(-(CONTEXT + 1) // PAGE_TOKENS)
    ours = ModulesExecutor(
        base(directory, register()),
        pages=pages * max(map(len, CASES.values())),
        page_tokens=PAGE_TOKENS,
        slots=ADAPTERS,
        max_rank=RANK,
        device=torch.device("cpu"),
        dtype=torch.bfloat16,
    )
    peft: Any = base(directory, "sdpa")
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(ADAPTERS):
            adapter = random_adapter(directory, Path(scratch, str(number)), seed=number)
            ours.load_adapter(number, read_lora(Path(adapter), dtype=torch.bfloat16, max_rank=RANK))
            if number == 0:
                peft = PeftModel.from_pretrained(peft, adapter, adapter_name="0", autocast_adapter_dtype=False)
            else:
                peft.load_adapter(adapter, adapter_name=str(number), autocast_adapter_dtype=False)
    for layer in (*ours.cache.keys, *ours.cache.values):
        layer.normal_()
    milliseconds: dict[str, dict[str, float]] = {}
    for case, adapters in CASES.items():
        tables = [range(row * pages, (row + 1) * pages) for row in range(len(adapters))]
        arms = {
            "no adapter": step(ours, tables, [None] * len(adapters)),
            "PEFT": peft_step(peft, adapters),
            "ours": step(ours, tables, adapters),
        }
        times: dict[str, list[float]] = {name: [] for name in arms}
        for turn in range(steps + 3):
            for name, run in arms.items():
                began = time.perf_counter()
                run()
                if turn >= 3:  # the first ones warm up
                    times[name].append(1000 * (time.perf_counter() - began))
        milliseconds[case] = {name: statistics.median(values) for name, values in times.items()}
    ratios = {case: round(medians["PEFT"] / medians["ours"], 2) for case, medians in milliseconds.items()}
    return {"threads": torch.get_num_threads(), "context": CONTEXT, "milliseconds": milliseconds, "ratios": ratios}


def base(directory: Path, attention: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16, attn_implementation=attention).eval()


def random_adapter(directory: Path, out: Path, seed: int) -> str:
    """A PEFT directory of rank 16 on all linear layers, its B matrices not zero."""
    torch.manual_seed(seed)
    with torch.inference_mode(False):
        settings = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
        model = get_peft_model(base(directory, "sdpa"), settings)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.01)
        model.save_pretrained(str(out))
    return str(out)


def step(executor: ModulesExecutor, tables: list[range], adapters: list[Any]) -> Callable[[], None]:
    """One decode step of a row for each of `tables` at :data:`CONTEXT`, always at the same position."""
    parts = [
        Part([100 + row], CONTEXT, list(table), slot)
        for row, (table, slot) in enumerate(zip(tables, adapters, strict=True))
    ]

    def run() -> None:
        executor.forward(parts)

    return run


def peft_step(model: Any, adapters: list[int]) -> Callable[[], None]:
    """The same step in PEFT, one adapter for all rows or ``adapter_names``."""
    rows = len(adapters)
    cache = StaticCache(model.config, max_cache_len=CONTEXT + 1)
    mixed = {"adapter_names": [str(number) for number in adapters]} if len(set(adapters)) > 1 else {}
    mask = torch.ones(rows, CONTEXT + 1, dtype=torch.long)
    prompt = torch.full((rows, CONTEXT), 100)
    model(input_ids=prompt, attention_mask=mask[:, :-1], past_key_values=cache, logits_to_keep=1)
    ids = torch.arange(rows)[:, None] + 100
    positions = torch.full((rows, 1), CONTEXT)

    def run() -> None:
        for layer in cache.layers:
            layer.cumulative_length.fill_(CONTEXT)
        model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            logits_to_keep=1,
            **mixed,
        )

    return run


if __name__ == "__main__":
    report.run(__doc__, measure, quick=8, full=40)
