"""The model card (``README.md``) that goes with a pushed adapter, written from its metier card.

It names no documents, rows or groups. The licence is left to whoever publishes.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from cluster.models import HUB_ID
from cluster.release import AdapterCard, short

VARIANTS = {"plain": "LoRA", "rslora": "rsLoRA", "dora": "DoRA"}


def readme(name: str, digest: str, card: AdapterCard, vllm_rank: int | None) -> str:
    """Markdown with the header that model hubs read.

    Args:
        vllm_rank: ``--max-lora-rank`` for vLLM; None if vLLM does not load this adapter.
    """
    base, on_hub = _base(card)
    head = {"library_name": "peft", "pipeline_tag": "text-generation", "tags": ["lora", "metier"]}
    if on_hub:
        head |= {"base_model": base, "base_model_relation": "adapter"}
    header = "\n".join(f"{key}: {json.dumps(value)}" for key, value in head.items())
    shown = base if on_hub else _code(base)
    parts = [
        f"---\n{header}\n---",
        f"# {name}",
        f"{VARIANTS[card.variant]} for {shown}; digest `{short(digest)}`, trained "
        + ("with metier." if card.dataset else "elsewhere and published from metier."),
        _table("How it was trained", _training(card)),
    ]
    if card.metrics:
        parts.append(_table("Metrics", dict(_flat(card.metrics))))
    parts.append(_use(name, base if on_hub else "DIRECTORY OF THE BASE", card, vllm_rank))
    parts.append(
        "## Licence\n\nNot stated here: it depends on the base model and on the rows. Add it before you share this."
    )
    return "\n\n".join(parts) + "\n"


def _base(card: AdapterCard) -> tuple[str, bool]:
    """How the base is called, and whether a hub knows it by that; of a local directory only the name is shown."""
    source = card.base.source.removeprefix("hub:")
    if HUB_ID.fullmatch(source):
        return source, True
    return PurePath(source).name if source.startswith((".", "/", "~")) else source, False


def _training(card: AdapterCard) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "base": _code(_base(card)[0] + (f" at {card.base.revision}" if card.base.revision else "")),
        "precision of the base": card.base.dtype
        if card.quantization == "none"
        else f"{card.base.dtype}, held as {card.quantization} while training",
        "method": f"{card.method}, {card.variant}, rank {card.rank}, alpha {card.alpha:g}",
    }
    if card.dataset:
        facts["objective"] = {"sft": "answers (supervised fine-tuning)", "domain": "raw text"}[card.objective]
        facts["rows"] = f"{card.dataset.rows} (digest {_code(short(card.dataset.digest))})"
    if card.max_tokens:
        facts["longest row"] = f"{card.max_tokens} tokens"
    for key in ("epochs", "steps", "loss_first", "loss_last"):
        if key in card.training:
            facts[key.replace("_", ", ")] = card.training[key]
    if card.metier:
        facts["metier"] = card.metier
    return facts


def _use(name: str, base: str, card: AdapterCard, vllm_rank: int | None) -> str:
    lines = [
        "## Use\n",
        "With PEFT:\n",
        "```python",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        f"base = AutoModelForCausalLM.from_pretrained({json.dumps(base)}, dtype={json.dumps(card.base.dtype)})",
        'model = PeftModel.from_pretrained(base, "PATH OR REPOSITORY OF THIS ADAPTER")',
        "```",
    ]
    if vllm_rank:
        lines += [
            "\nWith vLLM:\n",
            "```sh",
            f"vllm serve {shlex.quote(base)} --enable-lora --max-lora-rank {vllm_rank} --lora-modules {name}=PATH",
            "```",
        ]
    return "\n".join(lines)


def _table(title: str, facts: Mapping[str, Any]) -> str:
    rows = "\n".join(f"| {_cell(key)} | {_cell(value)} |" for key, value in facts.items())
    return f"## {title}\n\n| | |\n|---|---|\n{rows}"


def _flat(metrics: Mapping[str, Any], before: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in metrics.items():
        if isinstance(value, Mapping):
            found += _flat(value, f"{before}{key}.")
        elif value is not None:
            found.append((f"{before}{key}", f"{value:.4g}" if isinstance(value, float) else value))
    return found


def _code(text: str) -> str:
    return f"`{text}`"


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
