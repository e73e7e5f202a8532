"""Training when a node goes: killed at once, or cut off from the network without anybody being told.

The run goes on from its last checkpoint: with a new node in its place, or, where ``training.min_workers`` allows it, with
those that are left. The loss of the head is not covered: the
run ends with it, and the same command on a new cluster goes on, as in ``test_faults.py``.
"""

from __future__ import annotations

import re
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest

from cluster.config import load
from tests import nodes, trade

pytestmark = [pytest.mark.fault, pytest.mark.timeout(3600)]
STEPS = 10
"""Not more: ``metier train`` then reports every one of its steps, also those it trains twice."""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trade, indexed."""
    file = trade.write_config(tmp_path_factory.mktemp("trade"))
    with trade.desk(file) as desk:
        desk.ok("index", timeout=900)
    return file


def training(cluster: nodes.Cluster, config: Path, log: Path, name: str, *more: str) -> subprocess.Popen[str]:
    """A run of `name` over both nodes, past its second checkpoint."""
    desk = trade.Desk(config, cluster.environment, cluster.mark)
    settings = [
        f"ray.address={cluster.address}",
        f"training.adapter={name}",
        f"training.max_steps={STEPS}",
        *more,
    ]
    with cluster.head.inside():
        child = desk.start("train", *(word for setting in settings for word in ("--set", setting)), log=log)
    runs = Path(load(config, environ={}).storage.url, "runs")

    def checkpoints() -> bool:
        assert child.poll() is None, log.read_text()
        return len(list(runs.glob(f"{name}-*/checkpoint_*"))) >= 2

    trade.wait_for("two checkpoints", checkpoints, 900)
    return child


def steps(log: Path) -> list[int]:
    """The steps that ``metier train`` reports when it is not on a terminal: ``  training: 7/10 loss …``."""
    return [int(step) for step in re.findall(rf"training: (\d+)/{STEPS} ", log.read_text())]


def assert_goes_on(seen: list[int]) -> None:
    """Every step follows the one before, or is taken again from a checkpoint; none is left out."""
    assert seen[0] == 1 and seen[-1] == STEPS, seen
    for before, after in pairwise(seen):
        assert after == before + 1 or 2 < after <= before, seen


@pytest.mark.parametrize("loss", ["killed", "unplugged"])
def test_a_node_that_is_lost_costs_the_steps_since_the_last_checkpoint(loss: str, config: Path, tmp_path: Path) -> None:
    apart = loss == "unplugged"
    log = tmp_path / "log"
    with nodes.cluster((1, 1), namespaces=apart) as cluster:
        child = training(cluster, config, log, loss)
        lost = cluster.nodes[1]
        assert [len(node.workers()) for node in cluster.nodes] == [1, 1]
        if apart:
            lost.unplug()
        else:
            trade.assert_gone(lost.kill())
        assert max(steps(log)) < STEPS, "too late: the run is at its end"

        new = cluster.add()
        trade.wait_for("a worker on the new node", lambda: child.poll() is not None or new.workers(), 900)
        assert child.poll() is None, log.read_text()
        assert child.wait(900) == 0, log.read_text()
    assert_goes_on(steps(log))
    assert f"adapter {loss}@1" in log.read_text()
    assert "Traceback" not in log.read_text()


def test_the_nodes_that_are_left_go_on_where_so_few_workers_are_allowed(config: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with nodes.cluster((1, 1)) as cluster:
        child = training(cluster, config, log, "fewer", "training.min_workers=1")
        cluster.nodes[1].kill()
        assert max(steps(log)) < STEPS, "too late: the run is at its end"
        assert child.wait(900) == 0, log.read_text()
    assert_goes_on(steps(log))
    assert "adapter fewer@1" in log.read_text()
