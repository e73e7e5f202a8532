"""A trade small enough for a test, its configuration, and what a test needs to start and end real processes.

Eight documents about the lamps of a workshop, twelve training rows, six held-out questions; models are the random
ones of :mod:`cluster.tiny`, so answers make no sense and only what moves is worth asserting.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from cluster.config import Config, load
from cluster.models import base_ref, resolve
from cluster.registry import AdapterVersion, Registry, ReleaseVersion
from cluster.release import AdapterCard, AdapterRef, EmbedderRef, KnowledgeRef, Release, prompt_hash
from cluster.storage import Storage
from metier.__main__ import main

LAMPS = {
    "alder": ("green", "three hours"),
    "birch": ("white", "five hours"),
    "cedar": ("red", "six hours"),
    "dogwood": ("amber", "two hours"),
    "elm": ("blue", "nine hours"),
    "fir": ("violet", "four hours"),
    "gorse": ("yellow", "eight hours"),
    "hazel": ("brown", "seven hours"),
}
"""Lamp -> colour of its glass, how long it burns."""
HELDOUT = ("alder", "birch")
"""Lamps that no training row asks about."""
OURS = ("ray", "milvus")
"""What stands in the command line of every process that metier starts."""


def free_port() -> int:
    """A loopback port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def write_documents(directory: Path) -> None:
    """The eight documents."""
    directory.mkdir(parents=True, exist_ok=True)
    for lamp, (colour, hours) in LAMPS.items():
        (directory / f"lamp-{lamp}.md").write_text(
            f"# Lamp {lamp}\n\nThe {lamp} lamp has {colour} glass.\n\nOne filling of the {lamp} lamp burns {hours}.\n"
        )


def write_rows(file: Path, lamps: Sequence[str], *, unanswerable: int = 0) -> None:
    """Two rows for each of `lamps`, about its glass and its filling, and questions the documents do not answer."""
    rows: list[dict[str, Any]] = []
    for lamp in lamps:
        colour, hours = LAMPS[lamp]
        rows.append(_row(f"{lamp}-glass", f"What glass has {lamp}?", colour, f"The {lamp} lamp has {colour} glass."))
        quote = f"One filling of the {lamp} lamp burns {hours}."
        rows.append(_row(f"{lamp}-burns", f"How long burns {lamp}?", hours, quote))
    for number in range(unanswerable):
        rows.append(_row(f"none-{number}", f"Who made lamp number {number}?", "", None))
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _row(name: str, question: str, answer: str, quote: str | None) -> dict[str, Any]:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    lamp = name.partition("-")[0]
    evidence = [{"document": f"lamp-{lamp}", "quote": quote}] if quote else []
    return {"id": name, "kind": "single" if quote else "none", "messages": turns, "evidence": evidence}


def settings(directory: Path) -> dict[str, Any]:
    """The configuration of the trade in `directory`, as a YAML file would say it; documents and rows are written."""
    write_documents(directory / "documents")
    write_rows(directory / "train.jsonl", [lamp for lamp in LAMPS if lamp not in HELDOUT])
    write_rows(directory / "heldout.jsonl", HELDOUT, unanswerable=2)
    return {
        "name": "lamps",
        "storage": {"url": f"{directory}/store"},
        "state_dir": f"{directory}/run",
        "models_cache": f"{directory}/models",
        "store": {"data_dir": f"{directory}/milvus"},
        "base": {"source": "tiny:llama", "dtype": "float32"},
        "embedder": {"source": "tiny:bert"},
        "knowledge": {"name": "lamps", "documents": f"{directory}/documents"},
        "retrieval": {"min_score": -1},
        "data": {"train": [f"{directory}/train.jsonl"], "heldout": [f"{directory}/heldout.jsonl"]},
        "training": {
            "adapter": "lamps",
            "lora": {"rank": 4, "alpha": 8},
            "max_steps": 12,
            "learning_rate": 0.01,
            "batch_size": 2,
            "checkpoint_steps": 2,
        },
        "serving": {
            "port": free_port(),
            "max_tokens": 24,
            "ingress": {"cpus": 0.1},
            "retriever": {"cpus": 0.1},
            "generator": {"cpus": 0.5, "threads": 1},
        },
        "evaluation": {"max_tokens": 8, "concurrency": 4},
    }


def write_config(directory: Path) -> Path:
    """The trade in `directory`, ready for the command line: ``metier.yaml`` and what it names."""
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / "metier.yaml"
    file.write_text(yaml.safe_dump(settings(directory)))
    return file


def configure(directory: Path, *overrides: str) -> Config:
    """The same, loaded."""
    return load(write_config(directory), overrides, environ={})


def registry(config: Config) -> Registry:
    return Registry(Storage(config.storage.url, config.storage.options))


def index(config: Config) -> int:
    """Documents -> embedded Milvus -> the version of the knowledge, in this process."""
    from retrieval.embed import Embedder
    from retrieval.embedded import serve
    from retrieval.ingest import ingest
    from retrieval.store import Store

    embedder = Embedder(resolve(config.embedder, config.models_cache), config.embedder)
    with serve(config.store) as uri:
        store = Store(config.store, uri)
        report = ingest(config, store, embedder, registry(config))
        store.close()
    return report.version


def knowledge_entry(**fields: Any) -> dict[str, Any]:
    """What an ingest appends to the versions of a knowledge."""
    embedder = {"source": "tiny:bert", "max_tokens": 64, "fingerprint": "f" * 32, "dimension": 16}
    made = {"collection": "k_docs_v1", "embedder": embedder, "chunk_tokens": 64, "overlap_tokens": 0}
    return made | fields


def write_adapter(config: Config, directory: Path, *, rank: int = 4, seed: int = 1) -> Path:
    """A PEFT directory with random LoRA matrices, large enough that answers change."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        base = AutoModelForCausalLM.from_pretrained(resolve(config.base, config.models_cache), dtype=torch.float32)
        lora = LoraConfig(r=rank, lora_alpha=4 * rank, target_modules="all-linear", init_lora_weights=False)
        get_peft_model(base, lora).save_pretrained(directory)
    return directory


def publish(config: Config, directory: Path, name: str, *, rank: int = 4, **card: Any) -> AdapterVersion:
    """The PEFT `directory` in the registry, with a card as training would write it, except for what `card` says."""
    facts: dict[str, Any] = {
        "base": base_ref(config.base, resolve(config.base, config.models_cache)),
        "rank": rank,
        "alpha": 4 * rank,
        "target_modules": "all-linear",
        "prompt": prompt_hash(config.prompt),
        "groups": config.knowledge.groups,
    }
    return registry(config).publish_adapter(name, directory, AdapterCard(**facts | card))


def release(config: Config, adapter: AdapterVersion | None) -> ReleaseVersion:
    """A release of the configuration with `adapter`; no alias moves."""
    parts = Release(
        base=base_ref(config.base, resolve(config.base, config.models_cache)),
        adapter=adapter and AdapterRef(name=adapter.name, version=adapter.version, digest=adapter.digest),
        knowledge=KnowledgeRef(name=config.knowledge.name),
        embedder=EmbedderRef(source=config.embedder.source),
        prompt=config.prompt,
        retrieval=config.retrieval,
    )
    return registry(config).create_release(config.name, parts)


# -- processes ---------------------------------------------------------------------------------------------------


def family(pid: int | None = None) -> list[psutil.Process]:
    """All descendants of `pid` (of this process) now."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def command_line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline()) or process.name()
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return ""


def alive(process: psutil.Process) -> bool:
    """Whether it runs; a zombie that nobody reaps, as in a container without an init, does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_for(what: str, condition: Callable[[], Any], seconds: float = 60) -> Any:
    """The first true value of `condition`; fails after `seconds`, which only a broken program needs."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {seconds:g} s in vain for: {what}"
        time.sleep(0.1)
    return value


def assert_gone(processes: Sequence[psutil.Process], seconds: float = 120) -> None:
    """Of `processes` none is left after a moment; two of Ray's agents take a minute to notice a killed Ray."""
    deadline = time.monotonic() + seconds
    while left := [process for process in processes if alive(process)]:
        if time.monotonic() > deadline:
            names = [f"{process.pid} {command_line(process)[:120]}" for process in left]
            for process in left:  # reported below; not left for the next test
                process.kill()
            raise AssertionError(f"still there: {names}")
        time.sleep(0.1)


def assert_no_children() -> None:
    """No Ray and no Milvus below this process."""
    assert_gone([child for child in family() if any(word in command_line(child) for word in OURS)])


@dataclass(frozen=True)
class Ran:
    """What a verb did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output, which must be one JSON document."""
        return json.loads(self.out)


def verb(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *argv: object, width: int) -> Ran:
    """``metier ARGV …`` in this process, on a terminal so many columns wide."""
    monkeypatch.setattr("sys.argv", ["metier", *map(str, argv)])
    monkeypatch.setattr("metier.console.out.width", width)
    capsys.readouterr()
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as ended:
            main()
    finally:
        signal.signal(signal.SIGTERM, handler)
    said = capsys.readouterr()
    return Ran(int(ended.value.code or 0), said.out, said.err)


@dataclass
class Desk:
    """A user's terminal: verbs of metier with one configuration, each a process of its own.

    Everything it starts carries :attr:`mark` in its environment, so that what is left can be found wherever it went.
    """

    config: Path
    environment: dict[str, str] = field(default_factory=dict)
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)

    def run(self, *verb: str, timeout: float = 300) -> Ran:
        """Run `verb` to its end."""
        child = self.start(*verb)
        try:
            out, err = child.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            child.kill()
            out, err = child.communicate()
            raise AssertionError(f"metier {' '.join(verb)} did not end\n{out}\n{err}") from None
        return Ran(child.returncode, out, err)

    def ok(self, *verb: str, timeout: float = 300) -> Ran:
        """Run `verb`, which must succeed."""
        ran = self.run(*verb, timeout=timeout)
        assert ran.code == 0, f"metier {' '.join(verb)} -> {ran.code}\n{ran.out}\n{ran.err}"
        assert "Traceback" not in ran.err
        return ran

    def fails(self, code: int, *verb: str, timeout: float = 300) -> str:
        """Run `verb`, which must exit with `code` and a sentence; returns what it says."""
        ran = self.run(*verb, timeout=timeout)
        assert ran.code == code, f"metier {' '.join(verb)} -> {ran.code}\n{ran.out}\n{ran.err}"
        assert_sentence(ran.err)
        return ran.err

    def start(self, *verb: str, log: Path | None = None) -> subprocess.Popen[str]:
        """Begin `verb` in a process group of its own, as a shell would; its output in the file `log`, or piped."""
        command = [sys.executable, "-m", "metier", *verb]
        if verb[0] != "--version":
            command += ["--config", str(self.config)]
        environment = {
            **os.environ,
            "METIER_TEST_MARK": self.mark,
            "COLUMNS": "200",
            "NO_COLOR": "1",
            **self.environment,
        }
        with log.open("w") if log else nullcontext(subprocess.PIPE) as sink:
            return subprocess.Popen(
                command,
                stdout=sink,
                stderr=sink,
                stdin=subprocess.DEVNULL,
                text=True,
                env=environment,
                process_group=0,
                preexec_fn=hear_ctrl_c,
            )

    def left(self) -> list[psutil.Process]:
        """Processes that were started from here and live."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("METIER_TEST_MARK") == self.mark and alive(process):
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
                continue
        return found

    def assert_nothing_left(self) -> None:
        assert_gone(self.left())


def hear_ctrl_c() -> None:
    """A shell that runs the tests in the background makes them, and what they start, deaf to it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def desk(config: Path, **environment: str) -> Iterator[Desk]:
    """A :class:`Desk` after which nothing runs; it fails if something had to be ended."""
    made = Desk(config, environment)
    try:
        yield made
    finally:
        made.assert_nothing_left()


def interrupt(child: subprocess.Popen[str]) -> None:
    """Ctrl-C: SIGINT to the whole foreground process group, as a terminal sends it."""
    os.killpg(child.pid, signal.SIGINT)


def assert_sentence(err: str) -> None:
    """What a user is told: an ``error:`` line, and nothing of our insides."""
    assert "error: " in err, err
    assert "Traceback" not in err, err
    assert "*** SIG" not in err, err
