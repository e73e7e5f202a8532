"""Training against its peers: tokens a second, packing, workers, QLoRA, and how long it takes until the first step.

``python -m benchmarks.training [--only ARM,…] [--turns N] [--steps N] [--set KEY=VALUE] [--quick]
[--json FILE]``. Each arm and its peer take turns in one run,
each turn in processes of its own; Ray runs only during turns of ours. Arms:

trl
    one worker of ours against a plain TRL script with the same rows, sampler and hyperparameters. Bar 0.97.
llamafactory
    the same against LLaMA-Factory in an environment of its own, made on first use. Bar 1.0.
packing
    short rows with and without ``training.packing``. Bar 1.5.
workers
    two workers of one thread against one of two, and where a step's time goes in each.
qlora
    QLoRA against LoRA: seconds a step and peak memory; on a CUDA device with random weights in the shape of a 7B model.
startup
    ``metier train`` from the call to the first step, part by part.

A run is two epochs of the same rows. The first warms up; the figure is the tokens of an epoch, padding not counted,
over the seconds from the end of its first epoch to the end of its last, so that which rows share a batch does not
matter. A run is one turn; what is compared is the median turn. Default base SmolLM2-135M, rows of the sample trade.
Not covered: several machines, rows of other lengths, quality (``benchmarks.quality``).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.peers import environment, rows
from cluster import runtime
from cluster.config import Config, load
from cluster.models import load_tokenizer, resolve
from cluster.storage import Storage
from training.data import examples
from training.data.encode import encode
from training.data.examples import Example
from training.launch import launch

PEERS = Path(__file__).with_name("peers")
EPOCHS = 2
BATCH = 4
PACKED_TOKENS = 256
"""Length of packed sequences: attention on the CPU scores all of one, its cost grows with the square."""
Figures = dict[str, Any]
COUNTER = itertools.count()


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    steps: int
    """Optimizer steps of an epoch; a run has twice as many."""
    turns: int
    """Runs of each side."""
    settings: tuple[str, ...] = ()
    """What is to be different from the default configuration in every run of ours."""


@dataclass(frozen=True)
class Run:
    """One run, of ours or of a peer."""

    ends: list[float]
    """When each step ended, in seconds since training began."""
    losses: list[float]
    tokens: int
    """Of one epoch, without padding."""
    memory_bytes: int
    setup_s: float = 0.0

    @property
    def step_s(self) -> float:
        """Mean seconds of a step after the first epoch."""
        return (self.ends[-1] - self.ends[len(self.ends) // 2 - 1]) / (len(self.ends) - len(self.ends) // 2)

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / (self.ends[-1] - self.ends[len(self.ends) // 2 - 1])


# -- arms --------------------------------------------------------------------------------------------------------


def trl(size: Size, scratch: Path) -> tuple[Figures, Figures]:
    config, made, task = _one_worker(size)
    sides = {
        "ours": lambda: ours(config, made, scratch),
        "TRL": lambda: peer(Path(sys.executable), "trl_script.py", {**task, "rows": _encoded(config, made)}, scratch),
    }
    runs = take_turns(size.turns, sides)
    return _compared(runs), {"trl": _ratio(runs, "ours", "TRL")}


def llamafactory(size: Size, scratch: Path) -> tuple[Figures, Figures]:
    config, made, task = _one_worker(size)
    python = environment.python("llamafactory")
    talks = [{"messages": [*example.messages, {"role": "assistant", "content": example.answer}]} for example in made]
    task = {**task, "rows": talks, "template": "smollm2", "max_tokens": config.training.max_tokens}
    sides = {
        "ours": lambda: ours(config, made, scratch),
        "LLaMA-Factory": lambda: peer(python, "llamafactory_script.py", task, scratch),
    }
    runs = take_turns(size.turns, sides)
    return _compared(runs), {"llamafactory": _ratio(runs, "ours", "LLaMA-Factory")}


def packing(size: Size, scratch: Path) -> tuple[Figures, Figures]:
    """Against two things: the same settings without packing, and batches of as many rows as packed ones hold."""
    settings = [
        f"training.max_tokens={PACKED_TOKENS}",
        *_run(size),
        "training.workers=1",
        f"training.cpus_per_worker={_cpus()}",
    ]
    one = load(None, settings)
    tokenizer = load_tokenizer(resolve(one.base, one.models_cache))
    probe = encode(rows.short(200), tokenizer, one.training.max_tokens)
    fit = int(BATCH * one.training.max_tokens * len(probe.sequences) / probe.tokens)
    made = rows.short(fit * size.steps)
    arms = {
        "packed": ["training.packing=true", f"training.batch_size={BATCH}"],
        "as many rows a step": [f"training.batch_size={fit}"],
        f"{BATCH} rows a step": [f"training.batch_size={BATCH}"],
    }
    configs = {name: load(None, [*settings, *more]) for name, more in arms.items()}
    runs = take_turns(size.turns, {name: _side(config, made, scratch) for name, config in configs.items()})
    figures = {
        **_compared(runs),
        "rows_a_packed_batch": fit,
        "tokens_a_row": round(probe.tokens / len(probe.sequences), 1),
    }
    return figures, {
        "packing": _ratio(runs, "packed", f"{BATCH} rows a step"),
        "packing, as many rows a step": _ratio(runs, "packed", "as many rows a step"),
    }


def workers(size: Size, scratch: Path) -> tuple[Figures, Figures]:
    """The same eight rows a step, and the parts of a step in both layouts and of one thread alone."""
    layouts = {
        "2 workers x 1 thread": (2, 1, BATCH),
        "1 worker x 2 threads": (1, 2, 2 * BATCH),
    }
    configs = {
        name: load(
            None,
            [
                *_run(size),
                f"training.workers={n}",
                f"training.cpus_per_worker={threads}",
                f"training.batch_size={batch}",
            ],
        )
        for name, (n, threads, batch) in layouts.items()
    }
    some = next(iter(configs.values()))
    made = _grounded(some, 2 * BATCH * size.steps)
    runs = take_turns(size.turns, {name: _side(config, made, scratch) for name, config in configs.items()})
    parts = {
        name: step_parts(layout, size, scratch)
        for name, layout in {**layouts, "1 worker x 1 thread, alone": (1, 1, BATCH)}.items()
    }
    figures = {**_compared(runs), "parts": parts}
    return figures, {"workers": _ratio(runs, "2 workers x 1 thread", "1 worker x 2 threads")}


def qlora(size: Size, scratch: Path) -> tuple[Figures, Figures]:
    settings = [*_run(size), "training.workers=1", f"training.batch_size={BATCH}"]
    if _on_gpu():
        settings += ["training.gpus_per_worker=1", f"base.source={random_base(scratch / 'base', SHAPE_7B)}"]
    else:
        settings += [f"training.cpus_per_worker={_cpus()}"]
    configs = {name: load(None, [*settings, f"training.method={name}"]) for name in ("qlora", "lora")}
    made = _grounded(configs["lora"], BATCH * size.steps)
    runs = take_turns(size.turns, {name: _side(config, made, scratch) for name, config in configs.items()})
    step = {name: statistics.median(run.step_s for run in side) for name, side in runs.items()}
    memory = {name: statistics.median(run.memory_bytes for run in side) for name, side in runs.items()}
    return {**_compared(runs), "on": "CUDA, 7B shape" if _on_gpu() else "CPU"}, {
        "qlora step time": round(step["qlora"] / step["lora"], 2),
        "qlora peak memory": round(memory["qlora"] / memory["lora"], 2),
    }


def startup(size: Size, scratch: Path) -> tuple[Figures, Figures]:
    """Seconds from the call of ``metier train`` on the sample trade to its first step, on an index that stands.

    The two ends of every part are what the verb prints; what the worker says of itself divides the last.
    """
    settings = [
        f"storage.url={scratch / 'storage'}",
        f"store.data_dir={scratch / 'milvus'}",
        f"state_dir={scratch / 'run'}",
        "training.workers=1",
        f"training.cpus_per_worker={_cpus()}",
        "training.max_steps=2",
        *size.settings,
    ]
    options = ["--config", str(rows.TRADE / "metier.yaml"), *(word for each in settings for word in ("--set", each))]
    verb = [sys.executable, "-W", "ignore", "-m", "metier"]
    _child([*verb, "index", *options], {})
    began = time.perf_counter()
    _child([sys.executable, "-W", "ignore", "-c", "import metier.train, training.run"], {})
    imports = time.perf_counter() - began
    turns = []
    for _ in range(size.turns):
        seen = _stamped([*verb, "train", "--force", *options], ("train: ", "run ", "training: "))
        first, evaluated_s = _first_step(scratch / "storage")
        turns.append(
            {
                "imports": imports,
                "rows and index": seen["train: "] - imports,
                "start of Ray": seen["run "] - seen["train: "],
                "start of the worker": seen["training: "] - seen["run "] - first["setup_s"] - first["seconds"],
                "worker: imports, tokens, model": first["setup_s"],
                "evaluation of the base": evaluated_s,
                "first step": first["seconds"] - evaluated_s,
                "all": seen["training: "],
            }
        )
    parts = {name: round(statistics.median(turn[name] for turn in turns), 1) for name in turns[0]}
    return {"seconds": parts, "turns": [round(turn["all"], 1) for turn in turns]}, {}


def _stamped(command: list[str], beginnings: Sequence[str]) -> dict[str, float]:
    """Run `command`; beginning -> seconds after the call at which the first line on stderr began so."""
    began = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    seen: dict[str, float] = {}
    said = []
    for line in child.stderr or ():
        said.append(line)
        for beginning in beginnings:
            if line.strip().startswith(beginning):
                seen.setdefault(beginning, time.perf_counter() - began)
    if child.wait() or len(seen) < len(beginnings):
        raise RuntimeError(f"{command!r} ended with exit code {child.returncode}:\n{''.join(said)[-3000:]}")
    return seen


def _first_step(storage: Path) -> tuple[dict[str, Any], float]:
    """What the newest run logged at its first step, and the seconds that evaluating the base before it took."""
    newest = max(storage.glob("runs/*/metrics.jsonl"), key=lambda file: file.stat().st_mtime)
    events = [json.loads(line) for line in newest.read_text(encoding="utf-8").splitlines()]
    first = next(event for event in events if "setup_s" in event)
    return first, max((event["seconds"] for event in events if event["step"] < first["step"]), default=0.0)


ARMS: dict[str, Callable[[Size, Path], tuple[Figures, Figures]]] = {
    "trl": trl,
    "llamafactory": llamafactory,
    "packing": packing,
    "workers": workers,
    "qlora": qlora,
    "startup": startup,
}


# -- one run -----------------------------------------------------------------------------------------------------


def ours(config: Config, made: Sequence[Example], scratch: Path) -> Run:
    """`made` learned by our workers, under a Ray of this run's own."""
    storage_directory = scratch / f"run-{next(COUNTER)}"
    config = config.model_copy(update={"storage": config.storage.model_copy(update={"url": str(storage_directory)})})
    storage = Storage.of(config.storage)
    examples.write(storage, "train.jsonl", made)
    tokenizer = load_tokenizer(resolve(config.base, config.models_cache))
    events: list[dict[str, Any]] = []
    with runtime.connect(config):
        launch(config, run="benchmark", datasets={"train": "train.jsonl"}, on_event=events.append)
    shutil.rmtree(storage_directory)
    steps = [event for event in events if "loss" in event]
    return Run(
        ends=[event["seconds"] for event in steps],
        losses=[event["loss"] for event in steps],
        tokens=encode(made, tokenizer, config.training.max_tokens).tokens,
        memory_bytes=max(event["memory_bytes"] for event in steps),
        setup_s=steps[0]["setup_s"],
    )


def peer(python: Path, script: str, task: Figures, scratch: Path) -> Run:
    """`task` done by a peer's script in a process of its own, with as many threads as a worker of ours."""
    directory = scratch / f"run-{next(COUNTER)}"
    directory.mkdir()
    out, listed, written = directory / "steps.jsonl", directory / "rows.jsonl", directory / "task.json"
    listed.write_text("".join(json.dumps(row) + "\n" for row in task["rows"]), encoding="utf-8")
    written.write_text(
        json.dumps({**task, "rows": str(listed), "out": str(out), "scratch": str(directory)}), encoding="utf-8"
    )
    _child([str(python), "-W", "ignore", str(PEERS / script), str(written)], {"OMP_NUM_THREADS": str(_cpus())})
    steps = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    counted = sum(len(row["input_ids"]) for row in task["rows"] if "input_ids" in row)
    shutil.rmtree(directory)
    return Run(
        ends=[step["seconds"] for step in steps],
        losses=[step["loss"] for step in steps],
        tokens=counted or steps[-1]["tokens_seen"] // EPOCHS,
        memory_bytes=max(step["memory_bytes"] for step in steps),
    )


def step_parts(layout: tuple[int, int, int], size: Size, scratch: Path) -> Figures:
    """A step of `layout` (workers, threads, rows of each) taken apart, as rank 0 sees it."""
    count, threads, batch = layout
    out, task = scratch / "parts.json", scratch / "task.json"
    task.write_text(
        json.dumps({"settings": size.settings, "batch": [batch, 320, 12], "steps": size.steps, "out": str(out)}),
        encoding="utf-8",
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [
        _start(
            [sys.executable, "-W", "ignore", "-m", "benchmarks.peers.step_parts", str(task)],
            {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(count),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": str(threads),
            },
        )
        for rank in range(count)
    ]
    try:
        for child in children:
            _finish(child)
    finally:
        for child in children:  # one that failed leaves the others waiting for it
            child.kill()
            child.wait()
    figures: Figures = json.loads(out.read_text(encoding="utf-8"))
    return figures


def take_turns(turns: int, sides: dict[str, Callable[[], Run]]) -> dict[str, list[Run]]:
    """`turns` runs of each side, the order turned round each time."""
    runs: dict[str, list[Run]] = {name: [] for name in sides}
    for turn in range(turns):
        for name in list(sides) if turn % 2 == 0 else reversed(sides):
            runs[name].append(run := sides[name]())
            print(
                f"  turn {turn + 1}/{turns}, {name}: {run.tokens_per_s:.0f} tokens/s, {run.step_s:.2f} s a step, "
                f"loss {run.losses[0]:.3f} -> {run.losses[-1]:.3f}, {run.memory_bytes / 2**30:.1f} GiB",
                file=sys.stderr,
            )
    return runs


# -- a model of 7B shape -----------------------------------------------------------------------------------------

SHAPE_7B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
"""Mistral 7B's; the vocabulary stays the default base's, whose tokenizer it uses."""


def random_base(directory: Path, shape: dict[str, int]) -> Path:
    """A model of `shape` with random bf16 weights, made on the GPU where there is one, and the default base's tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    default = load()
    source = resolve(default.base, default.models_cache)
    about = AutoConfig.from_pretrained(source)
    about.update(
        {**shape, "head_dim": shape["hidden_size"] // shape["num_attention_heads"], "tie_word_embeddings": False}
    )
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(about, dtype=torch.bfloat16)
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(source).save_pretrained(directory)
    del model
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return directory


# -- the machine -------------------------------------------------------------------------------------------------


def machine() -> Figures:
    """What this machine could do at most: bf16 products in the shapes of a batch, memory copies, and tokens a second
    if a step were nothing but those products (forward, and gradients back through frozen layers)."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = load()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(resolve(config.base, config.models_cache)))
    linear = [
        module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and name != "lm_head"
    ]
    largest = max(linear, key=lambda module: module.weight.numel())
    rows_in = torch.randn(BATCH * 320, largest.in_features, dtype=torch.bfloat16)
    weight = torch.randn(largest.in_features, largest.out_features, dtype=torch.bfloat16)
    flops = 2 * rows_in.numel() * largest.out_features / _median_s(lambda: rows_in @ weight)
    block, copied = torch.zeros(1 << 26, dtype=torch.float32), torch.ones(1 << 26, dtype=torch.float32)
    moved = 2 * block.numel() * block.element_size() / _median_s(lambda: copied.copy_(block))
    parameters = sum(module.weight.numel() for module in linear)
    return {
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "gflops_bf16": round(flops / 1e9),
        "memory_gb_per_s": round(moved / 1e9, 1),
        "ceiling_tokens_per_s": round(flops / (4 * parameters)),
    }


def _median_s(run: Callable[[], object], times: int = 9) -> float:
    seconds = []
    for _ in range(times + 2):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[2:])


# -- what the arms share -----------------------------------------------------------------------------------------


def _run(size: Size) -> list[str]:
    """Settings of every run of ours."""
    fixed = [f"training.epochs={EPOCHS}", "training.checkpoint_steps=100000", "training.max_failures=0"]
    return [*size.settings, *fixed]


def _one_worker(size: Size) -> tuple[Config, list[Example], Figures]:
    """One worker with all cores, its rows, and the same hyperparameters for a peer."""
    config = load(
        None,
        [*_run(size), "training.workers=1", f"training.cpus_per_worker={_cpus()}", f"training.batch_size={BATCH}"],
    )
    training = config.training
    return (
        config,
        _grounded(config, BATCH * size.steps),
        {
            "model": str(resolve(config.base, config.models_cache)),
            "seed": training.seed,
            "epochs": EPOCHS,
            "batch_size": training.batch_size,
            "learning_rate": training.learning_rate,
            "scheduler": training.scheduler,
            "warmup_ratio": training.warmup_ratio,
            "gradient_clipping": training.deepspeed.gradient_clipping,
            "rank": training.lora.rank,
            "alpha": training.lora.alpha,
        },
    )


def _grounded(config: Config, count: int) -> list[Example]:
    return rows.grounded(config, load_tokenizer(resolve(config.base, config.models_cache)), count)


def _encoded(config: Config, made: Sequence[Example]) -> list[Any]:
    tokenizer = load_tokenizer(resolve(config.base, config.models_cache))
    return list(encode(made, tokenizer, config.training.max_tokens).sequences)


def _side(config: Config, made: Sequence[Example], scratch: Path) -> Callable[[], Run]:
    return lambda: ours(config, made, scratch)


def _compared(runs: dict[str, list[Run]]) -> Figures:
    """By side: the median turn, every turn's rate, and first and last loss."""
    return {
        name: {
            "tokens_per_s": round(statistics.median(run.tokens_per_s for run in side), 1),
            "turns": [round(run.tokens_per_s, 1) for run in side],
            "step_s": round(statistics.median(run.step_s for run in side), 3),
            "steps": len(side[0].ends),
            "tokens_an_epoch": side[0].tokens,
            "losses": [round(side[0].losses[0], 4), round(_last_epoch_loss(side[0]), 4)],
            "memory_gib": round(statistics.median(run.memory_bytes for run in side) / 2**30, 2),
            "setup_s": round(statistics.median(run.setup_s for run in side), 1),
        }
        for name, side in runs.items()
    }


def _last_epoch_loss(run: Run) -> float:
    return statistics.mean(run.losses[len(run.losses) // 2 :])


def _ratio(runs: dict[str, list[Run]], ours_name: str, theirs: str) -> float:
    rate = {name: statistics.median(run.tokens_per_s for run in runs[name]) for name in (ours_name, theirs)}
    return round(rate[ours_name] / rate[theirs], 3)


def _cpus() -> int:
    return len(os.sched_getaffinity(0))


def _on_gpu() -> bool:
    import torch

    return bool(torch.cuda.is_available())


def _start(command: list[str], variables: dict[str, str]) -> subprocess.Popen[str]:
    offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.Popen(
        command, env={**os.environ, **offline, **variables}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def _finish(child: subprocess.Popen[str]) -> None:
    said = child.communicate()[0]
    if child.returncode:
        raise RuntimeError(f"{child.args!r} ended with exit code {child.returncode}:\n{said[-3000:]}")


def _child(command: list[str], variables: dict[str, str]) -> None:
    _finish(_start(command, variables))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one turn of a few steps")
    parser.add_argument("--turns", type=int, help="runs of each side; 3 by default, 1 with --quick")
    parser.add_argument("--steps", type=int, help="steps of an epoch; 10 by default, 2 with --quick")
    parser.add_argument("--only", help=f"arms to run, with commas: {','.join(ARMS)}")
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="override a setting of every run"
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file, anew after every arm")
    arguments = parser.parse_args()
    names = arguments.only.split(",") if arguments.only else list(ARMS)
    if unknown := [name for name in names if name not in ARMS]:
        parser.error(f"--only {unknown[0]}: no such arm; there are {', '.join(ARMS)}")
    steps, turns = (2, 1) if arguments.quick else (10, 3)
    size = Size(arguments.steps or steps, arguments.turns or turns, tuple(arguments.set))
    figures: Figures = {"machine": machine(), "ratios": {}}
    print(f"machine: {json.dumps(figures['machine'])}")
    failed = False
    for name in names:
        ratios: Figures = {}
        try:
            with tempfile.TemporaryDirectory() as scratch:
                figures[name], ratios = ARMS[name](size, Path(scratch))
        except Exception as error:  # what the other arms measure is worth having
            failed = True
            figures[name] = {"error": f"{type(error).__name__}: {error}"}
        figures["ratios"] |= ratios
        print(f"{name}: {json.dumps(figures[name])}")
        if arguments.json:
            arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(f"ratios: {json.dumps(figures['ratios'])}")
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
