"""Ingestion against its peers: documents of mixed lengths, from files to rows in the same Milvus server.

``python -m benchmarks.ingestion [--turns N] [--documents N] [--without-llamaindex] [--quick] [--json FILE]``. Arms take
turns in one run, each turn in a process of its own; seconds count from the first file read to the last row written,
imports and the loading of models not. Arms:

script
    sentence-transformers ``encode(batch_size=32)`` and MilvusClient, as one writes it in ten minutes. Bar 1.5.
llamaindex
    LlamaIndex with its Milvus store, in an environment of its own, made on first use. Bar 1.5.
workers
    ours on a local Ray with one and with two embedding workers of one thread; their start is counted.

All use the same embedder and chunks of at most as many tokens; ours also keeps the words for BM25, which the peers do
not. What is compared is the document text that passes in a second: its tokens, counted once for all, over the median
turn. Beside it stands the CPU time of the process (of workers: of the driver alone), which another load on the machine
moves less. Not covered: parsing of PDF and HTML, several machines, GPUs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.peers import environment
from cluster import runtime
from cluster.config import Config, load
from cluster.models import resolve
from cluster.registry import Registry
from cluster.storage import Storage
from retrieval import steps as steps_of_ingest
from retrieval.embed import Embedder, token_counter
from retrieval.embedded import serve
from retrieval.ingest import ingest
from retrieval.steps import Here, Steps
from retrieval.store import Store

Figures = dict[str, Any]
PEERS = Path(__file__).with_name("peers")
SHORTEST, LONGEST = 50, 2000
"""Words of a document; lengths are spread evenly over their logarithm."""
VOCABULARY = (
    "the a of to and in is on for with by from at as that this it are be not will must may can before after during "
    "ferry harbour island ticket passenger vehicle trailer bicycle storm refund deck captain crew cargo timetable "
    "booking fare season winter summer morning evening repair engine pump valve filter pressure temperature sensor "
    "cable battery charger station panel display software update customer contract invoice payment account delivery "
    "warranty service manual procedure inspection safety emergency signal report request answer price kilometre hour "
    "minute percent local regional electric heavy narrow early late open closed available required allowed"
)
WORDS = VOCABULARY.split()


def text(words: int, chance: random.Random) -> str:
    """A Markdown document of about so many words: headings, paragraphs of a few sentences."""
    parts = [f"# {' '.join(chance.choices(WORDS, k=4)).title()}"]
    while words > 0:
        if chance.random() < 0.2:
            parts.append(f"## {' '.join(chance.choices(WORDS, k=3)).title()}")
        sentences = [chance.choices(WORDS, k=chance.randint(6, 18)) for _ in range(chance.randint(2, 6))]
        parts.append(" ".join(" ".join(sentence).capitalize() + "." for sentence in sentences))
        words -= sum(map(len, sentences))
    return "\n\n".join(parts) + "\n"


def write_documents(directory: Path, count: int) -> None:
    chance = random.Random(17)
    directory.mkdir()
    for number in range(count):
        words = round(SHORTEST * (LONGEST / SHORTEST) ** chance.random())
        (directory / f"document-{number:04}.md").write_text(text(words, chance), encoding="utf-8")


# -- ours, in a process of its own -------------------------------------------------------------------------------


def ours(settings: list[str], uri: str) -> Figures:
    """One ingest, and how long each part of it was busy."""
    config = load(None, settings, environ={})
    embedder = Embedder(resolve(config.embedder, config.models_cache), config.embedder)
    store = Store(config.store, uri)
    busy: dict[str, float] = {}

    def run(steps: Steps) -> Figures:
        started, computed = time.perf_counter(), time.process_time()
        report = ingest(config, store, embedder, Registry(Storage.of(config.storage)), steps=steps)
        figures = {"seconds": time.perf_counter() - started, "cpu_s": time.process_time() - computed}
        return figures | {"chunks": report.chunks, "busy_s": busy}

    if config.ingestion.workers:
        from retrieval.ingest_ray import OnRay

        with runtime.connect(config):
            return run(OnRay(config, uri, embedder.dimension))
    embedder.embed = timed(embedder.embed, "embed", busy)  # type: ignore[method-assign]
    store.upsert = timed(store.upsert, "write", busy)  # type: ignore[method-assign]
    cut = steps_of_ingest.rows
    steps_of_ingest.rows = lambda *given: timed_each(cut(*given), "cut", busy)  # type: ignore[assignment]
    here = Here(store, embedder)
    here.read = timed(here.read, "read", busy)  # type: ignore[method-assign]
    return run(here)


def timed(function: Callable[..., Any], name: str, busy: dict[str, float]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            busy[name] = round(busy.get(name, 0.0) + time.perf_counter() - started, 3)

    return call


def timed_each(items: Iterator[Any], name: str, busy: dict[str, float]) -> Iterator[Any]:
    advance = timed(lambda: next(items, None), name, busy)
    while (item := advance()) is not None:
        yield item


# -- turns -------------------------------------------------------------------------------------------------------


class Bench:
    """The documents, the server, and what one turn of each arm is."""

    def __init__(self, room: Path, config: Config, uri: str) -> None:
        self.room, self.config, self.uri = room, config, uri
        self.model = resolve(config.embedder, config.models_cache)
        self.documents = room / "documents"
        self.numbers = itertools.count()

    def ours(self, *overrides: str) -> Figures:
        number = next(self.numbers)
        settings = [
            f"storage.url={self.room}/registry-{number}",
            f"knowledge.name=bench{number}",
            f"knowledge.documents={self.documents}",
            *overrides,
        ]
        return child([sys.executable, "-m", "benchmarks.ingestion", "--turn", json.dumps([settings, self.uri])])

    def peer(self, interpreter: str, script: str) -> Figures:
        arguments = [self.documents, self.model, self.uri, f"peer{next(self.numbers)}"]
        command = [interpreter, PEERS / script, *arguments, self.config.knowledge.chunk_tokens]
        return child(list(map(str, command)))


def child(command: list[str]) -> Figures:
    """The last line that a process printed."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command[1:3]} failed: {done.stderr.strip()[-1500:]}")
    found: Figures = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def measure(documents: int, turns: int, llamaindex: bool, workers: bool) -> Figures:
    with tempfile.TemporaryDirectory() as name:
        room = Path(name)
        write_documents(room / "documents", documents)
        config = load(None, [f"store.data_dir={room}/milvus"], environ={})
        with serve(config.store) as uri:
            bench = Bench(room, config, uri)
            count = token_counter(bench.model, config.embedder)
            tokens = sum(count(file.read_text(encoding="utf-8")) for file in bench.documents.iterdir())
            arms: dict[str, Callable[[], Figures]] = {
                "ours": bench.ours,
                "script": lambda: bench.peer(sys.executable, "ingest_script.py"),
            }
            if llamaindex:
                interpreter = str(environment.python("llamaindex"))
                arms["llamaindex"] = lambda: bench.peer(interpreter, "llamaindex_script.py")
            if workers:
                for number in (1, 2):
                    settings = (f"ingestion.workers={number}", "ingestion.cpus_per_worker=1", "ray.num_cpus=2")
                    arms[f"workers={number}"] = lambda settings=settings: bench.ours(*settings)  # type: ignore[misc]
            runs: dict[str, list[Figures]] = {arm: [] for arm in arms}
            for _ in range(turns):
                for arm, turn in arms.items():
                    runs[arm].append(turn())
                    print(f"{arm}: {json.dumps(runs[arm][-1])}", file=sys.stderr, flush=True)
    median = {arm: statistics.median(run["seconds"] for run in of_arm) for arm, of_arm in runs.items()}
    return {
        "documents": documents,
        "tokens": tokens,
        "turns": turns,
        "arms": {
            arm: {
                "seconds": round(median[arm], 2),
                "cpu_s": round(statistics.median(run["cpu_s"] for run in of_arm), 2),
                "tokens_s": round(tokens / median[arm]),
                "chunks": of_arm[0]["chunks"],
                "chunks_s": round(of_arm[0]["chunks"] / median[arm], 1),
            }
            for arm, of_arm in runs.items()
        },
        "busy_s": runs["ours"][0]["busy_s"],
        "ratios": {
            f"ingestion_over_{arm}": round(median[arm] / median["ours"], 2)
            for arm in ("script", "llamaindex")
            if arm in median
        }
        | ({"workers_2_over_1": round(median["workers=1"] / median["workers=2"], 2)} if workers else {}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--documents", type=int, default=300)
    parser.add_argument("--without-llamaindex", action="store_true")
    parser.add_argument("--quick", action="store_true", help="one turn of 40 documents, without workers")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--turn", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.turn:
        print(json.dumps(ours(*json.loads(arguments.turn))))
        return
    documents, turns = (40, 1) if arguments.quick else (arguments.documents, arguments.turns)
    figures = measure(documents, turns, not arguments.without_llamaindex, not arguments.quick)
    for name, value in figures.items():
        print(f"{name}: {json.dumps(value)}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
