"""Demand is computed from the configuration, and a shortage is said in numbers."""

import pytest

from cluster.config import load
from cluster.errors import ResourcesShort
from cluster.resources import Amount, check, demand, total


def test_training_asks_for_all_workers_at_once() -> None:
    config = load(None, ["training.workers=4", "training.cpus_per_worker=2", "training.gpus_per_worker=1"])
    assert total(demand(config, "train")) == Amount(cpus=8, gpus=4)


def test_serving_asks_for_the_first_replicas_of_every_stage() -> None:
    stages = ["ingress", "retriever", "generator"]
    config = load(
        None, [f"serving.{stage}.cpus={n}" for n, stage in enumerate(stages, 1)] + ["serving.retriever.min_replicas=0"]
    )
    asks = demand(config, "serve")
    assert [ask.count for ask in asks] == [1, 1, 1]  # A stage that scales to zero must still be able to wake.
    assert total(asks).cpus == 6


def test_a_shortage_names_both_numbers_and_the_setting() -> None:
    asks = demand(load(None, ["training.workers=3"]), "train")
    check(asks, Amount(cpus=3))
    with pytest.raises(ResourcesShort, match=r"3 CPUs needed, 2 there.*training\.workers"):
        check(asks, Amount(cpus=2))


def test_unknown_memory_is_not_a_shortage() -> None:
    asks = demand(load(None, ["serving.generator.memory_bytes=1000"]), "serve")
    check(asks, Amount(cpus=64, memory=0))
    with pytest.raises(ResourcesShort, match="1000 bytes of memory needed, 999 there"):
        check(asks, Amount(cpus=64, memory=999))
