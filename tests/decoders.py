"""Random decoders of many families, adapters for them, and rows as a scheduler would hold them: for tests of executors."""

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from serving.engine.native.executor import Executor, Part
from serving.engine.native.lora import read_lora

PAGE = 4
WINDOW = 9
"""Shorter than every prompt, and no multiple of a page."""
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": WINDOW},
    "mixtral": {"sliding_window": None, "num_local_experts": 4},
    "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    "qwen3": {"head_dim": 32},
    "phi3": {"sliding_window": WINDOW},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "sliding_window": WINDOW, "attn_logit_softcapping": 2.0},
    "gemma3_text": {"head_dim": 16, "sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
    "cohere2": {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
    "gpt_oss": {"head_dim": 16, "sliding_window": WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2},
    "granite": {},
    "gpt_neox": {},
    "gpt2": {},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
}
ADAPTERS: dict[str, dict[str, Any]] = {
    "every layer": {"r": 2, "lora_alpha": 4, "target_modules": "all-linear"},
    "some": {"r": 4, "lora_alpha": 4, "use_rslora": True},
    "others": {"r": 8, "lora_alpha": 12},
}
TARGETS = {
    "phi3": (["qkv_proj"], ["o_proj", "down_proj"]),
    "gpt_neox": (["query_key_value"], ["dense", "dense_4h_to_h"]),
    "opt": (["q_proj", "v_proj"], ["out_proj", "fc2"]),
    "gpt_oss": (["q_proj", "v_proj"], ["o_proj"]),
}
BASE_ONLY = {"gpt2", "mixtral"}
"""The one has no linear layers, of the other PEFT renames modules to what is no plain LoRA."""


def made(kind: str, **settings: Any) -> Any:
    """A random model of `kind` with transformers' own attention; its next tokens win by clear margins."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {
        "vocab_size": 199,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
    }
    if kind not in ("gpt_neox", "gpt2", "opt"):
        shape["num_key_value_heads"] = 2
    config = AutoConfig.for_model(kind, **{**shape, **settings})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "sinks")):
                torch.nn.init.normal_(parameter, std=0.2)
    return model


def random_adapter(base: Any, directory: Path, *, seed: int, scale: float = 0.2, **settings: Any) -> Any:
    """Write a PEFT adapter of `base`, which stays as it is, to `directory`; no side of it is zero.

    Args:
        settings: of ``LoraConfig``.

    Returns:
        PEFT's model with it.
    """
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(copy.deepcopy(base), LoraConfig(task_type="CAUSAL_LM", **settings))
    chance = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = (torch.randn(parameter.shape, generator=chance) * scale).to(parameter)
    model.save_pretrained(directory)
    return model.eval()


def adapted(model: Any, kind: str, directory: Path) -> dict[str, Path]:
    """Directories of :data:`ADAPTERS` for `model`."""
    some, others = TARGETS.get(kind, (["q_proj", "v_proj", "down_proj"], ["o_proj", "gate_proj"]))
    targets = {"some": some, "others": others}
    for number, (name, settings) in enumerate(ADAPTERS.items()):
        random_adapter(
            model, directory / name, seed=number, scale=0.1, **{"target_modules": targets.get(name), **settings}
        )
    return {name: directory / name for name in ADAPTERS}


@dataclass
class Row:
    """One sequence as a scheduler would hold it."""

    prompt: list[int]
    slot: int | None
    chunk: int
    pages: list[int]
    done: int = 0
    made: list[int] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)

    def part(self) -> Part:
        ids = self.prompt + self.made
        count = min(self.chunk, len(self.prompt) - self.done) if self.done < len(self.prompt) else 1
        end = self.done + count
        table = self.pages[: -(-end // PAGE)]
        return Part(ids[self.done : end], self.done, table, self.slot, logits=end >= len(self.prompt))

    def take(self, part: Part, logits: torch.Tensor | None) -> None:
        self.done += len(part.tokens)
        if logits is not None:
            self.logits.append(logits)
            self.made.append(int(logits.argmax()))


def run(model: Executor, batch: Sequence[Row], tokens: int, seed: int = 3) -> None:
    """Compute all of `batch` to `tokens` more, in passes that mix whoever chance picks."""
    chance = random.Random(seed)
    while waiting := [row for row in batch if len(row.made) < tokens]:
        chosen = chance.sample(waiting, chance.randint(1, len(waiting)))
        parts = [row.part() for row in chosen]
        logits = iter(model.forward(parts))
        for row, part in zip(chosen, parts, strict=True):
            row.take(part, next(logits) if part.logits else None)


def rows(slots: Sequence[int | None], *, pages: int = 128, seed: int = 1) -> list[Row]:
    """A prompt for each of `slots`, in pages that lie anywhere; chunk sizes are odd and include all at once."""
    chance = random.Random(seed)
    free = chance.sample(range(pages), pages)
    made = []
    for slot in slots:
        length = chance.randint(WINDOW + 2, 41)
        prompt = [chance.randrange(3, 199) for _ in range(length)]
        made.append(Row(prompt, slot, chance.choice([1, 3, 7, 19, 64]), [free.pop() for _ in range(14)]))
    return made


@torch.inference_mode()
def alone(model: Any, prompt: list[int], made: list[int]) -> torch.Tensor:
    """Logits of transformers' (or PEFT's) one pass over prompt and answer, for each token of the answer."""
    out = model(input_ids=torch.tensor([prompt + made[:-1]], device=model.device))
    return out.logits[0, len(prompt) - 1 :].float()


def check_mixed_batch(ours: Executor, kind: str, model: Any, directory: Path) -> None:
    """Base and adapters in one batch of `ours`, every row against transformers and PEFT on `model` with that row alone."""
    from peft import PeftModel

    arms: dict[int | None, Any] = {None: model}
    if kind not in BASE_ONLY:
        for slot, (_, files) in enumerate(adapted(model, kind, directory).items()):
            weights = read_lora(files, dtype=torch.float32, max_rank=8)
            ours.check_adapter(weights)
            ours.load_adapter(slot, weights)
            arms[slot] = PeftModel.from_pretrained(copy.deepcopy(model), files).eval()
    batch = rows([*arms, *arms])
    run(ours, batch, tokens=9)
    wide = 0.0
    for row in batch:
        wanted = alone(arms[row.slot], row.prompt, row.made)
        assert row.made == wanted.argmax(-1).tolist()
        torch.testing.assert_close(torch.stack(row.logits), wanted, rtol=2e-4, atol=2e-4)
        if row.slot is not None:
            wide = max(wide, float((alone(model, row.prompt, row.made) - wanted).abs().max()))
    assert kind in BASE_ONLY or wide > 0.1, "the adapters change nothing"
