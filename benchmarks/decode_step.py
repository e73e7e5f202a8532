"""A decode step with LoRA adapters: our stacked layers against PEFT's, on the same model, cache and attention.

``python -m benchmarks.decode_step [--quick] [--json FILE]``. The arms decode the same rows at the same context in turns,
one step each; what is compared is the median step. Cases: one row, eight rows of one adapter, eight rows of eight
adapters (PEFT with ``adapter_names``). Not covered: prefill, other engines.
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
from transformers import AutoModelForCausalLM

from benchmarks import report
from cluster.config import load
from cluster.models import resolve
from serving.engine.native.attention import register
from serving.engine.native.cache import SlotCache
from serving.engine.native.lora import LoraBank

CONTEXT = 300
RANK = 16
ADAPTERS = 8
CASES = {"1 row": [0], "8 rows": [0] * 8, "8 rows, 8 adapters": list(range(ADAPTERS))}
"""Case -> the adapter of each row."""


@torch.inference_mode()
def measure(steps: int) -> dict[str, Any]:
    """Median milliseconds a step, by case and arm; `steps` of each."""
    config = load()
    directory = resolve(config.base, config.models_cache)
    plain, ours, peft = base(directory), base(directory), base(directory)
    bank = LoraBank(ours, slots=ADAPTERS)
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(ADAPTERS):
            adapter = random_adapter(directory, Path(scratch, str(number)), seed=number)
            bank.load(number, Path(adapter))
            if number == 0:
                peft = PeftModel.from_pretrained(peft, adapter, adapter_name="0", autocast_adapter_dtype=False)
            else:
                peft.load_adapter(adapter, adapter_name=str(number), autocast_adapter_dtype=False)
    milliseconds: dict[str, dict[str, float]] = {}
    for case, adapters in CASES.items():
        mixed = {"adapter_names": [str(number) for number in adapters]} if len(set(adapters)) > 1 else {}
        bank.aim(adapters)
        arms = {
            "no adapter": step(plain, len(adapters)),
            "PEFT": step(peft, len(adapters), **mixed),
            "ours": step(ours, len(adapters)),
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


def base(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16, attn_implementation=register()).eval()


def random_adapter(directory: Path, out: Path, seed: int) -> str:
    """A PEFT directory of rank 16 on all linear layers, its B matrices not zero."""
    torch.manual_seed(seed)
    with torch.inference_mode(False):
        model = get_peft_model(base(directory), LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear"))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.01)
        model.save_pretrained(str(out))
    return str(out)


def step(model: Any, rows: int, **extra: Any) -> Callable[[], None]:
    """One decode step of `rows` rows at :data:`CONTEXT`, always at the same position."""
    cache = SlotCache(model.config, rows, CONTEXT + 1, torch.bfloat16, torch.device("cpu"))
    ids = torch.arange(rows)[:, None] + 100
    positions = torch.full((rows, 1), CONTEXT)
    mask = torch.zeros(rows, 1, 1, CONTEXT + 1)

    def run() -> None:
        cache.aim(torch.arange(rows), positions, CONTEXT + 1)
        model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            **extra,
        )

    return run


if __name__ == "__main__":
    report.run(__doc__, measure, quick=8, full=40)
