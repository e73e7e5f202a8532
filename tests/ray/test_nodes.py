"""Training over two nodes: a worker on each, the weights of a run on one node, an adapter in the registry.

Nodes are Ray nodes of their own on this machine (:mod:`tests.nodes`), where possible in network namespaces, so that
gradients and, in ZeRO-3, weights cross a network. GPUs, NCCL and storage that is not one directory are not covered.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.config import load
from tests import nodes, trade

pytestmark = pytest.mark.timeout(3600)
STEPS = 6


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trade, indexed."""
    file = trade.write_config(tmp_path_factory.mktemp("trade"))
    with trade.desk(file) as desk:
        desk.ok("index", timeout=900)
    return file


@pytest.fixture(scope="module", params=[False, True], ids=["loopback", "namespaces"])
def cluster(request: pytest.FixtureRequest) -> Iterator[nodes.Cluster]:
    """Two nodes with one CPU each."""
    with nodes.cluster((1, 1), namespaces=request.param) as up:
        yield up


def train(name: str, stage: int, *more: str) -> tuple[str, ...]:
    """The words that train `name`."""
    settings = [
        f"training.adapter={name}",
        f"training.deepspeed.zero_stage={stage}",
        f"training.max_steps={STEPS}",
    ]
    return ("train", *(word for setting in (*settings, *more) for word in ("--set", setting)))


def weights(desk: trade.Desk, name: str, cache: Path) -> dict[str, Any]:
    """The published LoRA matrices of `name`, by their names."""
    from safetensors.torch import load_file

    registry = trade.registry(load(desk.config, environ={}))
    adapter = next(adapter for adapter in registry.adapters() if adapter.name == name)
    assert adapter.card.training["steps"] == STEPS
    return dict(load_file(registry.fetch_adapter(adapter.digest, cache) / "adapter_model.safetensors"))


@pytest.mark.parametrize("stage", [2, 3])
def test_two_nodes_train_what_one_node_trains(config: Path, cluster: nodes.Cluster, stage: int, tmp_path: Path) -> None:
    near, far = f"near-{stage}-{time.time_ns()}", f"far-{stage}-{time.time_ns()}"
    with trade.desk(config) as desk:
        desk.ok(*train(near, stage), timeout=900)

    desk = trade.Desk(config, cluster.environment, cluster.mark)
    log = tmp_path / "log"
    with cluster.head.inside():
        child = desk.start(*train(far, stage, f"ray.address={cluster.address}"), log=log)
    trade.wait_for(
        "a worker on each node",
        lambda: child.poll() is not None or [len(node.workers()) for node in cluster.nodes] == [1, 1],
        900,
    )
    assert child.poll() is None, log.read_text()
    assert child.wait(900) == 0, log.read_text()
    assert f"2 workers, DeepSpeed ZeRO-{stage}" in log.read_text()

    there, here = weights(desk, far, tmp_path / "far"), weights(desk, near, tmp_path / "near")
    assert there.keys() == here.keys()
    assert max(float(there[name].abs().max()) for name in there if "lora_B" in name) > 1e-3, "it did not learn"
    for name in there:
        assert float((there[name] - here[name]).abs().max()) < 1e-5, name
