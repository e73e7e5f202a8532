"""The engines' contract suite on vLLM for real: in its own environment, on a tiny model in fp32, beside transformers and PEFT.

The environment is made by ``python -m benchmarks.generation --only base8`` or ``environment.python("vllm")``, minutes and
4 GiB; without it these tests are skipped. Here expected answers are made; :mod:`tests.contract.vllm_cases` asks vLLM.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks.peers import environment
from tests.contract.engine_cases import CASES
from tests.contract.test_engines import CONTEXT, PROMPTS, SMALL, expected, models  # noqa: F401  fixtures

PYTHON = environment.made("vllm")
OWN = (
    "stop_strings_end_an_answer_and_keep_their_ids",
    "an_end_of_turn_ends_an_answer_and_is_not_in_it",
    "logprobs_are_those_of_the_reference",
    "a_repeated_prompt_is_read_from_the_cache",
    "an_answer_keeps_to_its_grammar",
    "adapters_that_cannot_be_served_are_refused_and_hurt_nobody",
    "what_is_pinned_leaves_a_slot",
    "a_full_queue_says_so",
    "a_dead_engine_is_unwell_and_says_so_to_who_waits",
)
"""Of :mod:`tests.contract.vllm_cases`, which cannot be imported here: it imports vLLM's engine."""
BLOCK = 32
"""vLLM shares prefixes in pages; on CPUs multiples of 32 tokens."""
LONGEST = 24
pytestmark = [
    pytest.mark.skipif(PYTHON is None, reason="no environment of vLLM here; benchmarks/peers/environment.py makes it"),
    pytest.mark.timeout(900),
]


@pytest.fixture(scope="module")
def tiny_llama(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with wider heads: vLLM's attention for CPUs takes none of 16."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    directory = Path(shutil.copytree(tiny_llama, tmp_path_factory.mktemp("wide") / "model"))
    shape = AutoConfig.from_pretrained(tiny_llama)
    shape.update({"hidden_size": 128, "head_dim": 32})
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(shape, dtype=torch.float32).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def outcomes(models: Any, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:  # noqa: F811
    """Case -> how it failed, or nothing; all cases run on one engine."""
    directories, alone = models
    scratch = tmp_path_factory.mktemp("vllm")
    config = ["threads=1", "adapters_resident=2", "max_rank=8", "batch_size=8", "max_waiting=4", "prefill_tokens=32"]
    settings = ["engine=vllm", f"cache_bytes={64 << 20}", *config]
    task = {
        "model": str(tiny_llama),
        "adapters": {digest: str(directory) for digest, directory in directories.items()},
        "broken": broken(next(iter(directories.values())), scratch),
        "prompts": PROMPTS,
        "expected": {
            f"{number} {digest}": answer(alone[digest], prompt)
            for digest in alone
            for number, prompt in enumerate(PROMPTS)
        },
        "logprobs": likeliest(alone[None], PROMPTS[0], 4),
        "letters": letters(tiny_llama),
        "eos": 2,
        "block": BLOCK,
        "places": 8 + 4,
        "settings": [
            f"storage.url={scratch}/store",
            f"store.data_dir={scratch}/milvus",
            f"state_dir={scratch}/run",
            "base.source=tiny:llama",
            "base.dtype=float32",
            "training.lora.rank=8",
            *SMALL,
            *(f"serving.generator.{setting}" for setting in settings),
        ],
        "out": str(scratch / "outcomes.jsonl"),
    }
    (scratch / "task.json").write_text(json.dumps(task), encoding="utf-8")
    command = [str(PYTHON), "-m", "tests.contract.vllm_cases", str(scratch / "task.json")]
    with (scratch / "log.txt").open("w", encoding="utf-8") as log:
        done = subprocess.run(command, cwd=Path(__file__).parents[2], stdout=log, stderr=log, timeout=850, env=plain())
    said = (scratch / "log.txt").read_text(encoding="utf-8")[-3000:]
    out = Path(str(task["out"]))
    if not out.exists():
        pytest.fail(f"vLLM did not start (exit code {done.returncode}):\n{said}")
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    return {line["case"]: line["failed"] for line in lines}


@pytest.mark.parametrize("case", [*(case.__name__ for case in CASES), *OWN])
def test_vllm(case: str, outcomes: dict[str, str | None]) -> None:
    assert case in outcomes, "the process ended before this case"
    if failed := outcomes[case]:
        pytest.fail(failed, pytrace=False)


def plain() -> dict[str, str]:
    """This environment without what belongs to the interpreter that runs pytest."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}


def answer(model: Any, prompt: tuple[int, ...]) -> list[int]:
    """Greedy ids up to an end of turn, or :data:`LONGEST`."""
    import torch

    ids = torch.tensor([prompt])
    with torch.inference_mode():
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=LONGEST, do_sample=False, pad_token_id=2
        )
    made: list[int] = out[0, len(prompt) :].tolist()
    return made


def likeliest(model: Any, prompt: tuple[int, ...], tokens: int) -> list[list[tuple[int, float]]]:
    """Log probabilities of the three likeliest tokens at each place of the greedy answer."""
    import torch

    with torch.inference_mode():
        out = model(torch.tensor([[*prompt, *answer(model, prompt)[:tokens]]])).logits[0, len(prompt) - 1 : -1]
    top = out.log_softmax(-1).topk(3)
    return [list(zip(ids, values, strict=True)) for ids, values in zip(top[1].tolist(), top[0].tolist(), strict=True)]


def letters(model: Path) -> dict[int, str]:
    """What each id of the byte-level tokenizer stands for."""
    from cluster.models import load_tokenizer

    tokenizer = load_tokenizer(model)
    return {token: tokenizer.decode([token]) for token in range(len(tokenizer))}


def broken(adapter: Path, scratch: Path) -> dict[str, str]:
    """Adapters nobody should load: a rank over the slots', a pickle beside the weights, a file cut short."""
    made = {name: shutil.copytree(adapter, scratch / name) for name in ("large", "pickle", "cut")}
    enlarge(made["large"])
    (made["pickle"] / "adapter_model.bin").write_bytes(b"")
    weights = made["cut"] / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    return {name: str(directory) for name, directory in made.items()}


def enlarge(directory: Path, rank: int = 12) -> None:
    """Make the adapter in `directory` one of `rank`, by zeros."""
    import torch
    from safetensors.torch import load_file, save_file

    weights = directory / "adapter_model.safetensors"
    tensors = {}
    for name, tensor in load_file(weights).items():
        shape = (rank, tensor.shape[1]) if "lora_A" in name else (tensor.shape[0], rank)
        tensors[name] = torch.zeros(shape)
    save_file(tensors, weights)
    config = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))
    (directory / "adapter_config.json").write_text(json.dumps(config | {"r": rank}), encoding="utf-8")
