"""Training on a real local Ray: documents in Milvus, two workers under DeepSpeed ZeRO-2, an adapter in the registry.

Covered too: the same run again, a worker killed in the middle, a cluster that is too small. GPUs, several nodes and
quantized bases are not.
"""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from cluster.config import Config
from cluster.errors import ResourcesShort
from cluster.models import resolve
from cluster.release import prompt_hash
from tests import trade
from training.run import train

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning"
)  # the libraries', of themselves
Event = dict[str, Any]
STEPS = 12


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """The trade, indexed."""
    made = trade.configure(tmp_path_factory.mktemp("trade"))
    assert trade.index(made) == 1
    return made


@pytest.fixture(autouse=True)
def nothing_left() -> Any:
    yield
    trade.assert_no_children()


def changed(config: Config, **training: Any) -> Config:
    return config.model_copy(update={"training": config.training.model_copy(update=training)})


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def workers() -> list[Any]:
    return [child for child in trade.family() if "RayTrainWorker" in trade.command_line(child)]


def test_rows_become_an_adapter_with_its_card_and_the_same_again_is_free(config: Config, tmp_path: Path) -> None:
    events: list[Event] = []
    said: list[str] = []
    made = train(config, say=said.append, on_event=events.append)

    assert [event["step"] for event in events] == list(range(1, STEPS + 1))
    losses = [event["loss"] for event in events]
    assert mean(losses[-STEPS // 3 :]) < mean(losses[: STEPS // 3]), losses
    assert any("2 workers" in line and "ZeRO-2" in line for line in said)

    card = made.card
    assert (made.ref, card.prompt) == ("lamps@1", prompt_hash(config.prompt))
    assert card.knowledge is not None and (card.knowledge.name, card.knowledge.version) == ("lamps", 1)
    assert card.dataset is not None and card.dataset.rows == 12
    rows = [json.loads(line) for line in Path(config.data.train[0]).read_text().splitlines()]
    gold = {evidence["document"] for row in rows for evidence in row["evidence"]}
    assert gold <= set(card.dataset.documents) <= {f"lamp-{lamp}" for lamp in trade.LAMPS}
    assert card.training["steps"] == STEPS
    assert float(card.training["loss_last"]) < float(card.training["loss_first"])
    stored = trade.registry(config).storage.read(f"datasets/{card.dataset.digest}.jsonl")
    assert len(stored.splitlines()) == 12

    files = trade.registry(config).fetch_adapter(made.digest, tmp_path / "cache")
    assert plain_peft_moves(config, files), "the adapter changes nothing"

    again: list[Event] = []
    assert train(config, say=said.append, on_event=again.append) == made
    assert again == []
    assert trade.registry(config).adapters() == [made]


def plain_peft_moves(config: Config, files: Path) -> bool:
    """Whether PEFT, without us, loads `files` and the model then answers otherwise."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(resolve(config.base, config.models_cache), dtype=torch.float32)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        before = base(ids).logits.clone()
        after = PeftModel.from_pretrained(base, files)(ids).logits
    return bool((before - after).abs().max() > 1e-3)


def test_a_worker_that_is_killed_costs_the_steps_since_the_last_checkpoint(
    config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    events: list[Event] = []
    killed: list[int] = []

    def on_event(event: Event) -> None:
        events.append(event)
        if event["step"] >= 5 and not killed:
            victim = workers()[0]
            killed.append(victim.pid)
            victim.send_signal(signal.SIGKILL)

    made = train(changed(config, adapter="survivor"), say=lambda _: None, on_event=on_event)

    steps = [event["step"] for event in events]
    restart = next(i for i in range(1, len(steps)) if steps[i] <= steps[i - 1])
    assert killed
    assert 1 < steps[restart] <= steps[restart - 1], "it did not go on from a checkpoint"
    assert steps[restart:] == list(range(steps[restart], STEPS + 1))
    assert made.ref == "survivor@1" and made.card.training["steps"] == STEPS
    assert "worker died" not in capsys.readouterr().out, "what Ray notices is not a result"


def test_more_cpus_than_there_are_is_refused_in_numbers(config: Config) -> None:
    small = changed(config, adapter="too-large")
    small = small.model_copy(update={"ray": small.ray.model_copy(update={"num_cpus": 1})})
    said: list[str] = []
    with pytest.raises(ResourcesShort, match=r"2 CPUs needed, 1 there \(2 training workers × 1 CPU") as refused:
        train(small, say=said.append, on_event=lambda _: None)
    assert "training.workers" in refused.value.message
    assert not any("workers, DeepSpeed" in line for line in said)
