"""Generation against its peers: tokens a second with 0, 1, 8 and 64 adapters in batches of 1, 8 and 32.

``python -m benchmarks.generation [--only CASE,…] [--rounds N] [--without ARM,…] [--quick] [--json FILE]``. SmolLM2-135M in
bf16; a case is `batch` prompts of 241 tokens, 64 new ones for each, greedy and past any end of turn; adapters are of rank 8 on
all linear layers, row `i` uses adapter `i` (modulo their number, another start each round). Cases: ``base_b1``, ``base_b8``,
``base_b32``, ``adapters1_b1`` … ``adapters64_b32``, and ``prefix``. Arms:

ours
    ``NativeEngine`` through its seam; with adapters also asked for the base alone (``ours base``), in the same process. Alone
    also with an int8 and an int4 base.
vllm
    vLLM for CPUs, its offline class, with tcmalloc and libiomp5 preloaded as it recommends, in an environment of its own.
generate, continuous
    transformers' ``generate`` on one static batch, and its continuous batching (``generate_batch``).
peft
    ``generate`` on PEFT's model, several adapters by ``adapter_names``.
llama.cpp
    one stream on Q4_1 weights, in an environment of its own.

Each arm is one process for all cases with the same adapters and has all cores. In every round each arm does each case once, on
the same new token ids; while one computes the others are stopped (SIGSTOP). What stands in the result is the median over rounds,
ratios are medians of the ratios of one round. ``prefix``: 16 prompts of 400 tokens one after another, the first 320 in common,
against 16 with nothing in common; the mean time to the first token, the first prompt's included. Beside seconds stands the
processor time of the arm, which another load on the machine moves less. ``floor``: what the measured memory bandwidth (weights
and cache, each decode step) and the measured bf16 peak (products) leave as least seconds, over the seconds taken.

Peers that cannot be made or started are left out and named. Not covered: GPUs, streaming to clients, arrival over time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.peers import environment
from cluster.config import load
from cluster.models import resolve

Figures = dict[str, Any]
PEERS = Path(__file__).with_name("peers")
PROMPT, NEW, RANK = 241, 64, 8
PREFIX_PROMPTS, PREFIX_TOKENS, PREFIX_SHARED = 16, 400, 320
ADAPTERS, BATCHES = (0, 1, 8, 64), (1, 8, 32)
CONTEXT, CACHE_BYTES = 2048, 1 << 30
TOKENS = range(100, 49_000)
"""Ids that prompts are drawn from; all are words of the default base."""
CORES = len(os.sched_getaffinity(0))
BARS: dict[str, tuple[str, str, str]] = {
    "base_b8_vs_vllm": ("base_b8", "ours", "vllm"),
    "adapters8_b8_vs_vllm": ("adapters8_b8", "ours", "vllm"),
    "adapters8_b8_vs_base": ("adapters8_b8", "ours", "ours base"),
    "adapters64_b32_vs_base_b32": ("adapters64_b32", "ours", "ours base"),
    "single_vs_vllm": ("base_b1", "ours", "vllm"),
    "single_int4_vs_llamacpp": ("base_b1", "ours int4", "llama.cpp"),
}
"""Bar -> case, and the two arms whose tokens a second are divided."""
QUANTIZED = ("int8", "int4")


@dataclass(frozen=True)
class Case:
    """What every arm is asked in a round."""

    adapters: int
    batch: int

    @property
    def name(self) -> str:
        return f"adapters{self.adapters}_b{self.batch}" if self.adapters else f"base_b{self.batch}"

    def asked(self, round_: int, new: int = NEW) -> Figures:
        """The same for the same round, whatever else is measured."""
        chance = random.Random(f"{self.name} {round_}")
        rows = range(round_ * self.batch, (round_ + 1) * self.batch)
        return {
            "prompts": [chance.choices(TOKENS, k=PROMPT) for _ in range(self.batch)],
            "adapters": [row % self.adapters if self.adapters else None for row in rows],
            "new": new,
            "apart": False,
        }


CASES = {case.name: case for adapters in ADAPTERS for case in (Case(adapters, batch) for batch in BATCHES)}


@dataclass
class Arm:
    """One process that answers cases; stopped while it is not asked."""

    name: str
    python: Path
    script: str
    task: Figures
    environment: dict[str, str] = field(default_factory=dict)
    child: subprocess.Popen[str] | None = None
    ready: Figures = field(default_factory=dict)

    def start(self, log: Path) -> None:
        """Wait until it is ready.

        Raises:
            RuntimeError: it ended before; the message has the end of what it wrote.
        """
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        with log.open("w", encoding="utf-8") as errors:
            # A group, for its own processes too: what stays stopped when this process dies is hung up by the kernel.
            self.child = subprocess.Popen(
                [str(self.python), "-W", "ignore", str(PEERS / self.script), json.dumps(self.task)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=inherited | self.environment,
                process_group=0,
            )
        self.ready = self._read(log)
        self._signal(signal.SIGSTOP)

    def ask(self, asked: Figures, log: Path) -> Figures:
        assert self.child is not None and self.child.stdin is not None
        self._signal(signal.SIGCONT)
        before = self._cpu_s()
        print(json.dumps(asked), file=self.child.stdin, flush=True)
        answer = self._read(log)
        answer["cpu_s"] = self._cpu_s() - before
        self._signal(signal.SIGSTOP)
        return answer

    def end(self) -> None:
        if self.child is None:
            return
        assert self.child.stdin is not None
        with contextlib.suppress(subprocess.TimeoutExpired, ProcessLookupError, BrokenPipeError):
            self._signal(signal.SIGCONT)
            self.child.stdin.close()
            self.child.wait(30)
        with contextlib.suppress(ProcessLookupError):
            self._signal(signal.SIGKILL)  # what the arm itself may have left
        self.child.wait()
        self.child = None

    def _read(self, log: Path) -> Figures:
        assert self.child is not None and self.child.stdout is not None
        line = self.child.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended: {log.read_text(encoding='utf-8').strip()[-800:]}")
        found: Figures = json.loads(line)
        return found

    def _cpu_s(self) -> float:
        assert self.child is not None
        process = psutil.Process(self.child.pid)
        times = [each.cpu_times() for each in (process, *process.children(recursive=True))]
        return sum(each.user + each.system for each in times)

    def _signal(self, number: signal.Signals) -> None:
        assert self.child is not None
        os.killpg(self.child.pid, number)


class Bench:
    """The base, the adapters, and what a process of each arm is."""

    def __init__(self, room: Path) -> None:
        self.room = room
        config = load()
        self.model = resolve(config.base, config.models_cache)
        self.common: Figures = {
            "model": str(self.model),
            "rank": RANK,
            "batch": max(BATCHES),
            "context": CONTEXT,
            "dtype": config.base.dtype,
            "threads": CORES,
            "cache_bytes": CACHE_BYTES,
            "continuous": False,
            "options": {},
        }

    def arms(self, adapters: int) -> dict[str, Callable[[], Arm]]:
        """Arms that are asked cases with so many adapters, each made when it is needed."""
        made = {"adapters": [str(directory) for directory in self.adapters(adapters)]}
        arms: dict[str, Callable[[], Arm]] = {
            "ours": lambda: self.ours(made),
            "vllm": lambda: self.vllm(made),
        }
        if adapters:
            arms["peft"] = lambda: self.transformers("peft", made)
            return arms
        arms["generate"] = lambda: self.transformers("generate", made)
        arms["continuous"] = lambda: self.transformers("continuous", made | {"continuous": True})
        arms["llama.cpp"] = lambda: self.llamacpp(made)
        for kind in QUANTIZED:
            arms[f"ours {kind}"] = lambda kind=kind: self.ours(made, kind)  # type: ignore[misc]
        return arms

    def ours(self, made: Figures, quantization: str = "none") -> Arm:
        generator = {
            "batch_size": self.common["batch"],
            "threads": CORES,
            "cache_bytes": CACHE_BYTES,
            "adapters_resident": max(1, len(made["adapters"])),
            "max_rank": RANK,
            "quantization": quantization,
        }
        settings = [f"serving.generator.{name}={value}" for name, value in generator.items()]
        settings += [f"training.lora.rank={RANK}", f"base.context_tokens={CONTEXT}"]
        name = "ours" if quantization == "none" else f"ours {quantization}"
        return Arm(name, Path(sys.executable), "generation_ours.py", self.common | made | {"settings": settings})

    def vllm(self, made: Figures) -> Arm:
        python = environment.python("vllm")
        libraries = [environment.tcmalloc(), python.parents[1] / "lib" / "libiomp5.so"]
        preloaded = [str(library) for library in libraries if library is not None and library.exists()]
        cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
        variables = {
            "LD_PRELOAD": ":".join(preloaded),
            "VLLM_CPU_OMP_THREADS_BIND": cores,  # by itself it would keep one core free
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        return Arm("vllm", python, "generation_vllm.py", self.common | made, variables)

    def transformers(self, name: str, made: Figures) -> Arm:
        variables = {"OMP_NUM_THREADS": str(CORES)}
        return Arm(name, Path(sys.executable), "generation_transformers.py", self.common | made, variables)

    def llamacpp(self, made: Figures) -> Arm:
        python = environment.python("llamacpp")
        weights = next(python.parents[1].rglob("*.Q4_1.gguf"))
        task = self.common | made | {"model": str(weights)}
        return Arm("llama.cpp", python, "generation_llamacpp.py", task)

    def adapters(self, count: int) -> list[Path]:
        """The first `count` adapters, written when they are first asked for."""
        directories = [self.room / f"adapter-{number}" for number in range(count)]
        missing = [directory for directory in directories if not directory.exists()]
        if missing:
            write_adapters(self.model, missing)
        return directories


def write_adapters(model: Path, directories: Sequence[Path]) -> None:
    """PEFT adapters of rank 8 on all linear layers with random weights, B not zero."""
    import torch
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(base, config, autocast_adapter_dtype=False).save_pretrained(str(directories[0]))
    about = (directories[0] / "adapter_config.json").read_text(encoding="utf-8")
    shapes = {name: tensor.shape for name, tensor in load_file(directories[0] / "adapter_model.safetensors").items()}
    for directory in directories:
        chance = torch.Generator().manual_seed(int(directory.name.rpartition("-")[2]))
        directory.mkdir(exist_ok=True)
        tensors = {
            name: (torch.randn(shape, generator=chance) * (0.01 if "lora_B" in name else 0.05)).bfloat16()
            for name, shape in shapes.items()
        }
        save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
        (directory / "adapter_config.json").write_text(about, encoding="utf-8")


# -- the floor ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """What this machine does at most."""

    bytes_per_s: float
    flops_per_s: float
    layers: int
    """Parameters of the linear layers but the head's."""
    head: int
    kv_bytes: int
    """Keys and values of one token."""
    lora_bytes: int

    @classmethod
    def measured(cls, model: Path) -> Machine:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.set_num_threads(CORES)
        about = AutoConfig.from_pretrained(model)
        with torch.device("meta"):
            shell = AutoModelForCausalLM.from_config(about)
        linear = {name: each for name, each in shell.named_modules() if isinstance(each, torch.nn.Linear)}
        head = linear.pop("lm_head")
        largest = max(linear.values(), key=lambda each: each.weight.numel())
        rows = torch.randn(8 * PROMPT, largest.in_features, dtype=torch.bfloat16)
        weight = torch.randn(largest.in_features, largest.out_features, dtype=torch.bfloat16)
        flops = 2 * rows.numel() * largest.out_features / _least_s(lambda: rows @ weight)
        block, copied = torch.zeros(1 << 26), torch.ones(1 << 26)
        size = block.numel() * block.element_size()
        moved = max(size / _least_s(block.sum), 2 * size / _least_s(lambda: copied.copy_(block)))
        width = getattr(about, "head_dim", None) or about.hidden_size // about.num_attention_heads
        return cls(
            bytes_per_s=moved,
            flops_per_s=flops,
            layers=sum(each.weight.numel() for each in linear.values()),
            head=head.weight.numel(),
            kv_bytes=2 * about.num_hidden_layers * about.num_key_value_heads * width * 2,
            lora_bytes=sum(2 * RANK * (each.in_features + each.out_features) for each in linear.values()),
        )

    def floor_s(self, case: Case) -> float:
        """Least seconds of a case in bf16: the prompts' products, then each step by bytes or by products, whichever is more."""
        loras = self.lora_bytes * min(case.batch, case.adapters)
        seconds = 2 * case.batch * (self.layers * PROMPT + self.head) / self.flops_per_s
        for step in range(1, NEW):
            read = 2 * (self.layers + self.head) + loras + case.batch * (PROMPT + step) * self.kv_bytes
            products = 2 * case.batch * (self.layers + self.head)
            seconds += max(read / self.bytes_per_s, products / self.flops_per_s)
        return seconds


def _least_s(run: Callable[[], object]) -> float:
    seconds = []
    for _ in range(11):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


# -- rounds ------------------------------------------------------------------------------------------------------


class Measured:
    """Answers by case and arm, a round after the other."""

    def __init__(self) -> None:
        self.answers: dict[str, dict[str, list[Figures]]] = {}
        self.startup_s: dict[str, float] = {}
        self.about: dict[str, Figures] = {}
        self.left_out: dict[str, str] = {}
        self.prefix: dict[str, list[float]] = {}

    def add(self, case: Case, arm: str, answer: Figures) -> None:
        self.answers.setdefault(case.name, {}).setdefault(arm, []).append(answer)

    def leave_out(self, arm: str, adapters: int, error: Exception) -> None:
        """`arm` could not be started or ended too early: what it has answered so far is no median of as many rounds."""
        self.left_out[f"{arm}, {adapters} adapters"] = str(error)[-300:]
        for case, arms in self.answers.items():
            if CASES[case].adapters == adapters:
                arms.pop(arm, None)
                if arm == "ours":
                    arms.pop("ours base", None)

    def figures(self, machine: Machine) -> Figures:
        cases: Figures = {}
        for name, arms in self.answers.items():
            case = CASES[name]
            cases[name] = {arm: self._figures(case, arms, arm, machine) for arm in arms}
        return cases

    def _figures(self, case: Case, arms: dict[str, list[Figures]], arm: str, machine: Machine) -> Figures:
        seconds = statistics.median(answer["seconds"] for answer in arms[arm])
        first = [[ids[0] for ids in answer["tokens"]] for answer in arms[arm]]
        found = {
            "tokens_per_s": round(case.batch * NEW / seconds, 1),
            "cpu_s": round(statistics.median(answer["cpu_s"] for answer in arms[arm]), 2),
            "floor": round(machine.floor_s(case) / seconds, 3),
        }
        reference = "peft" if case.adapters else "generate"
        if reference in arms and arm not in (reference, "ours base"):
            others = [[ids[0] for ids in answer["tokens"]] for answer in arms[reference]]
            pairs = [
                (a, b) for mine, theirs in zip(first, others, strict=True) for a, b in zip(mine, theirs, strict=True)
            ]
            found[f"first tokens as {reference}"] = round(sum(a == b for a, b in pairs) / len(pairs), 2)
        return found

    def ratios(self) -> dict[str, float]:
        found = {}
        for bar, (case, mine, theirs) in BARS.items():
            arms = self.answers.get(case, {})
            if mine in arms and theirs in arms:
                pairs = zip(arms[mine], arms[theirs], strict=True)
                found[bar] = round(statistics.median(b["seconds"] / a["seconds"] for a, b in pairs), 2)
        if "ours" in self.prefix:
            found["prefix_ttft"] = round(statistics.median(self.prefix["ours"]), 3)
        return found


def measure(names: Sequence[str], rounds: int, without: Sequence[str]) -> Figures:
    measured = Measured()
    with tempfile.TemporaryDirectory() as room:
        bench = Bench(Path(room))
        machine = Machine.measured(bench.model)
        for adapters in ADAPTERS:
            cases = [case for name, case in CASES.items() if name in names and case.adapters == adapters]
            prefix = "prefix" in names and not adapters
            if cases or prefix:
                _group(bench, adapters, cases, prefix, rounds, without, measured)
    return {
        "cores": CORES,
        "rounds": rounds,
        "load": round(os.getloadavg()[0], 2),
        "memory_gb_per_s": round(machine.bytes_per_s / 1e9, 1),
        "gflops_bf16": round(machine.flops_per_s / 1e9),
        "floor_tokens_per_s": {
            name: round(CASES[name].batch * NEW / machine.floor_s(CASES[name])) for name in measured.answers
        },
        "cases": measured.figures(machine),
        "prefix_ttft": {arm: round(statistics.median(values), 3) for arm, values in measured.prefix.items()},
        "startup_s": measured.startup_s,
        "about": measured.about,
        "left_out": measured.left_out,
        "ratios": measured.ratios(),
    }


def _group(
    bench: Bench,
    adapters: int,
    cases: Sequence[Case],
    prefix: bool,
    rounds: int,
    without: Sequence[str],
    measured: Measured,
) -> None:
    """All rounds of the cases with so many adapters, on processes that live as long."""
    arms: dict[str, Arm] = {}
    try:
        wanted = {
            name: make
            for name, make in bench.arms(adapters).items()
            if (name not in without and any(_takes(name, case) for case in cases))
            or (prefix and name in ("ours", "vllm") and name not in without)
        }
        for name, make in wanted.items():
            _progress(f"{name}, {adapters} adapters: starting")
            try:
                arms[name] = arm = make()
                arm.start(_log(bench, name))
            except RuntimeError as error:
                measured.leave_out(name, adapters, error)
                if name in arms:
                    arms.pop(name).end()
                continue
            about = dict(arm.ready)
            measured.startup_s[f"{name}, {adapters} adapters"] = round(about.pop("ready_s"), 1)
            measured.about[name] = about | ({"preloaded": arm.environment["LD_PRELOAD"]} if name == "vllm" else {})
        for round_ in range(-1, rounds):  # the first one warms up
            for case in [*cases, *([None] if prefix else [])]:
                for name, arm in _rotated(arms, round_):
                    try:
                        if case is not None and _takes(name, case):
                            _ask(bench, case, name, arm, round_, measured)
                        elif case is None and name in ("ours", "vllm"):
                            _ask_prefix(bench, name, arm, round_, measured)
                    except RuntimeError as error:
                        measured.leave_out(name, adapters, error)
                        arms.pop(name).end()
    finally:
        for arm in arms.values():
            arm.end()


def _ask(bench: Bench, case: Case, name: str, arm: Arm, round_: int, measured: Measured) -> None:
    asked = case.asked(round_, new=NEW if round_ >= 0 else 8)
    turns = {name: asked}
    if name == "ours" and case.adapters:
        # Other tokens than with adapters would be fair too; these are not in the prefix cache, which adapters do not share.
        turns["ours base"] = asked | {"adapters": [None] * case.batch}
    for turn, each in turns.items():
        answer = arm.ask(each, _log(bench, name))
        if round_ >= 0:
            measured.add(case, turn, answer)
            _progress(f"round {round_ + 1}, {case.name}, {turn}: {case.batch * NEW / answer['seconds']:.1f} tokens/s")


def _ask_prefix(bench: Bench, name: str, arm: Arm, round_: int, measured: Measured) -> None:
    chance = random.Random(f"prefix {round_}")
    shared = chance.choices(TOKENS, k=PREFIX_SHARED)
    alone = [chance.choices(TOKENS, k=PREFIX_TOKENS) for _ in range(PREFIX_PROMPTS)]
    common = [[*shared, *chance.choices(TOKENS, k=PREFIX_TOKENS - PREFIX_SHARED)] for _ in range(PREFIX_PROMPTS)]
    means = [
        statistics.mean(
            arm.ask(
                {"prompts": prompts, "adapters": [None] * PREFIX_PROMPTS, "new": 1, "apart": True}, _log(bench, name)
            )["first_s"]
        )
        for prompts in (alone, common)
    ]
    if round_ >= 0:
        measured.prefix.setdefault(name, []).append(means[1] / means[0])
        _progress(f"round {round_ + 1}, prefix, {name}: {1000 * means[1]:.0f} of {1000 * means[0]:.0f} ms")


def _takes(arm: str, case: Case) -> bool:
    """Whether `arm` is asked `case`: single streams are what llama.cpp and quantized bases are compared in."""
    alone = arm == "llama.cpp" or arm.removeprefix("ours ") in QUANTIZED
    return case.batch == 1 and not case.adapters if alone else True


def _rotated(arms: dict[str, Arm], round_: int) -> list[tuple[str, Arm]]:
    """Each round begins with another arm."""
    listed = list(arms.items())
    start = round_ % len(listed) if listed else 0
    return listed[start:] + listed[:start]


def _log(bench: Bench, arm: str) -> Path:
    return bench.room / f"{arm}.log"


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = [*CASES, "prefix"]
    parser.add_argument("--only", help=f"cases, by comma: {', '.join(every)}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--without", default="", help="arms to leave out, by comma")
    parser.add_argument("--quick", action="store_true", help="one round of the cases that have a bar")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # arms are ended on the way out
    quick = [*dict.fromkeys(case for case, _, _ in BARS.values()), "prefix"]
    names = arguments.only.split(",") if arguments.only else quick if arguments.quick else every
    if unknown := set(names) - set(every):
        parser.error(f"no case is called {', '.join(sorted(unknown))}")
    figures = measure(names, 1 if arguments.quick else arguments.rounds, arguments.without.split(","))
    for name, value in figures.items():
        print(f"{name}: {json.dumps(value)}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
