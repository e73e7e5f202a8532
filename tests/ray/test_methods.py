"""Every method and objective on real workers: the loss falls, and what comes out is whole and can be loaded.

The rows are a handful of colours and the base is a random one of :mod:`cluster.tiny`. One local Ray serves all tests.
Not covered: GPUs, Liger kernels, offload to NVMe.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from cluster import runtime
from cluster.config import Config, load
from cluster.errors import Diverged, MetierError
from cluster.models import resolve
from cluster.storage import Storage
from tests import trade
from training.data import examples
from training.data.examples import Example
from training.launch import launch

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning"
)  # the libraries', of themselves
COLOURS = ("red", "green", "blue", "white")
SYSTEM = {"role": "system", "content": "s"}
Event = dict[str, Any]


def talks(count: int, first: int = 0) -> list[Example]:
    """Questions whose answer follows from the number in them."""
    return [
        Example(
            id=f"t{number}",
            messages=(SYSTEM, {"role": "user", "content": f"colour {number % 4}?"}),
            answer=COLOURS[number % 4] * (1 + number % 3),
        )
        for number in range(first, first + count)
    ]


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("methods")


@pytest.fixture(scope="module", autouse=True)
def ray(room: Path) -> Iterator[None]:
    with runtime.connect(configure(room)):
        yield
    trade.assert_no_children()


def configure(room: Path, *overrides: str) -> Config:
    own = [
        f"storage.url={room}/store",
        f"models_cache={room}/models",
        "base.source=tiny:llama",
        "base.dtype=float32",
        "training.lora.rank=4",
        "training.max_steps=8",
        "training.batch_size=2",
        "training.learning_rate=0.01",
        "training.checkpoint_steps=4",
        "training.max_tokens=128",
    ]
    return load(None, [*own, *overrides], environ={})


def run(
    room: Path,
    name: str,
    *overrides: str,
    rows: Mapping[str, Sequence[Example]] | None = None,
    on_event: Any = lambda _: None,
) -> tuple[list[Event], Path]:
    """Train; returns what was logged and a directory with what came out."""
    config = configure(room, *overrides)
    storage = Storage.of(config.storage)
    paths = {}
    for kind, part in (rows or {"train": talks(32)}).items():
        paths[kind] = f"datasets/{name}-{kind}.jsonl"
        examples.write(storage, paths[kind], part)
    events: list[Event] = []

    def note(event: Event) -> None:
        events.append(event)
        on_event(event)

    checkpoint = launch(config, run=name, datasets=paths, on_event=note)
    return events, Path(checkpoint.to_directory(str(room / name)))


def losses(events: Sequence[Event], kind: str = "loss") -> list[float]:
    return [event[kind] for event in events if kind in event]


def assert_falls(values: Sequence[float]) -> None:
    assert sum(values[-3:]) < 0.8 * sum(values[:3]), values


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("lora-zero-3", ["training.deepspeed.zero_stage=3"]),
        (
            "lora-offload",
            [
                "training.deepspeed.zero_stage=3",
                "training.deepspeed.offload.optimizer=cpu",
                "training.deepspeed.offload.parameters=cpu",
            ],
        ),
        ("qlora-zero-2", ["training.method=qlora", "base.dtype=bfloat16"]),
        ("qlora-zero-3", ["training.method=qlora", "base.dtype=bfloat16", "training.deepspeed.zero_stage=3"]),
        ("rslora-bf16", ["training.lora.variant=rslora", "base.dtype=bfloat16", "training.scheduler=linear"]),
        ("dora", ["training.lora.variant=dora", "training.publish=model", "training.gradient_checkpointing=true"]),
    ],
)
def test_adapters_are_whole_whatever_sharded_them(room: Path, name: str, overrides: list[str]) -> None:
    events, out = run(room, name, *overrides)
    assert_falls(losses(events))
    weights = load_file(out / "adapter_model.safetensors")
    pairs = {key for key in weights if ".lora_A." in key or ".lora_B." in key}
    assert len(pairs) == 2 * 7 * 2, "two matrices for seven linear layers of two blocks"
    assert all(4 in weights[key].shape for key in pairs), "rank, not a shard of it"
    assert all(weights[key].abs().sum() > 0 for key in weights), "B starts at zero, so each has learned"
    peft = json.loads((out / "adapter_config.json").read_text())
    assert peft["base_model_name_or_path"] == "tiny:llama", "no path of this machine leaves it"


@pytest.mark.parametrize("stage", [2, 3])
def test_full_tuning_moves_every_weight(room: Path, stage: int) -> None:
    overrides = ["training.method=full", "training.publish=model", f"training.deepspeed.zero_stage={stage}"]
    events, out = run(room, f"full-zero-{stage}", *overrides)
    assert_falls(losses(events))
    before = load_file(resolve(configure(room).base, room / "models") / "model.safetensors")
    after = load_file(out / "model.safetensors")
    assert {name: tuple(weight.shape) for name, weight in before.items()} == {
        name: tuple(weight.shape) for name, weight in after.items()
    }
    same = [name for name in before if (after[name] == before[name]).all()]
    assert not same
    assert (out / "config.json").is_file() and (out / "tokenizer.json").is_file()


def test_what_is_logged_goes_to_tensorboard_in_the_storage(room: Path) -> None:
    run(room, "tracked", "training.trackers=[tensorboard]", "training.max_steps=2", "training.workers=1")
    (file,) = (room / "store/runs/tracked/tensorboard").glob("events.out.tfevents.*")
    assert b"train/loss" in file.read_bytes() and b"train/grad_norm" in file.read_bytes()


def test_raw_text_and_turns_in_the_middle_are_learned(room: Path) -> None:
    text = [Example(id=f"x{number}", text=f"The {COLOURS[number % 4]} lamp burns. " * 8) for number in range(16)]
    events, _ = run(room, "domain", "training.objective=domain", rows={"train": text})
    assert_falls(losses(events))

    turns = [
        Example(
            id=f"m{number}",
            messages=(*talk.messages, {"role": "assistant", "content": talk.answer}, talk.messages[1]),
            answer="again",
            turns=(2,),
        )
        for number, talk in enumerate(talks(32))
    ]
    events, _ = run(room, "turns", rows={"train": turns})
    assert_falls(losses(events))


def test_packing_learns_the_same_rows_in_fewer_steps(room: Path) -> None:
    whole = ["training.epochs=1", "training.max_steps=null", "training.workers=1"]
    plain, _ = run(room, "unpacked", *whole, rows={"train": talks(48)})
    packed, _ = run(room, "packed", *whole, "training.packing=true", rows={"train": talks(48)})
    assert plain[0]["steps"] == 24
    assert packed[0]["steps"] <= 12
    assert_falls(losses(packed))


def test_validation_stops_a_run_and_the_best_weights_come_out(room: Path) -> None:
    """Validation asks for other answers than training teaches: the better it learns, the worse that gets."""
    wrong = [talk.model_copy(update={"answer": "zzzzzz"}) for talk in talks(8)]
    events, out = run(
        room,
        "early",
        "training.max_steps=40",
        "training.validate_steps=2",
        "training.early_stopping.patience=2",
        "data.split.validation_share=0.1",
        rows={"train": talks(32), "validation": wrong, "general": talks(4, 100)},
    )
    seen = {event["step"]: event["validation_loss"] for event in events if "validation_loss" in event}
    assert 0 in seen, "the untrained base is measured first"
    assert len(losses(events, "general_loss")) == len(seen)
    trained = {step: loss for step, loss in seen.items() if step}
    best = min(trained, key=lambda step: trained[step])
    assert max(seen) < 40, "it did not stop"
    assert max(seen) == best + 4
    assert (out / "adapter_model.safetensors").is_file()


def test_a_loss_that_is_no_number_ends_the_run_at_once(room: Path) -> None:
    events: list[Event] = []
    with pytest.raises(Diverged, match=r"the loss of step \d+ is (nan|inf).*Lower training\.learning_rate \(1e\+30\)"):
        run(room, "diverged", "training.learning_rate=1e30", "training.max_failures=3", on_event=events.append)
    assert len({event["step"] for event in events}) == len(events), "it was not tried again"
    (kept,) = (room / "store/runs/diverged").glob("bad-batch-*.json")
    batch = json.loads(kept.read_text())
    assert len(batch["rows"]) >= 2 and set(batch["rows"]) <= {talk.id for talk in talks(32)}


@pytest.mark.timeout(600)  # two runs, one of which Ray Train takes a while to give up
@pytest.mark.parametrize("workers", [1, 2])
def test_a_resumed_run_has_the_losses_of_one_that_was_never_interrupted(room: Path, workers: int) -> None:
    """Weights, optimizer, schedule, order of rows over epochs and dropout: all of it goes on where it was."""
    settings = ["training.lora.dropout=0.2", "training.max_steps=12", "training.checkpoint_steps=3"]
    settings += [f"training.workers={workers}"]
    rows = {"train": talks(14 * workers), "validation": talks(4, 100)}
    whole, _ = run(room, f"whole-{workers}", *settings, rows=rows)
    killed: list[int] = []

    def kill(event: Event) -> None:
        if event["step"] == 8 and not killed:
            victim = next(child for child in trade.family() if "RayTrainWorker" in trade.command_line(child))
            killed.append(victim.pid)
            victim.send_signal(signal.SIGKILL)

    broken, _ = run(room, f"broken-{workers}", *settings, rows=rows, on_event=kill)
    steps = [event["step"] for event in broken if "loss" in event]
    assert killed and steps.count(7) == 2, "it went on from step 6"
    wanted = {event["step"]: event for event in whole if "loss" in event}
    seen = {event["step"]: event["validation_loss"] for event in whole if "validation_loss" in event}
    assert len(seen) == 5
    for event in broken:
        if "loss" in event:
            assert event["loss"] == pytest.approx(wanted[event["step"]]["loss"], rel=1e-5), f"step {event['step']}"
            assert event["learning_rate"] == wanted[event["step"]]["learning_rate"]
        elif "validation_loss" in event:
            assert event["validation_loss"] == pytest.approx(seen[event["step"]], rel=1e-5)


def test_what_a_worker_knows_to_be_final_is_not_tried_again(room: Path) -> None:
    config = configure(room, "training.max_failures=3")
    storage = Storage.of(config.storage)
    examples.write(storage, "datasets/long.jsonl", [Example(id="long", messages=(SYSTEM,), answer="x" * 500)])
    with pytest.raises(MetierError, match=r"1 rows are longer than training.max_tokens"):
        launch(config, run="final", datasets={"train": "datasets/long.jsonl"}, on_event=lambda _: None)
