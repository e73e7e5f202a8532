"""What DeepSpeed is told, from the configuration."""

import json
from collections.abc import Callable

import pytest

from cluster.config import Config
from training.deepspeed import ds_config

Make = Callable[..., Config]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_zero_stage_is_the_configured_one(make_config: Make, stage: int) -> None:
    assert ds_config(make_config(f"training.deepspeed.zero_stage={stage}"))["zero_optimization"]["stage"] == stage


@pytest.mark.parametrize(("dtype", "on"), [("float32", set()), ("bfloat16", {"bf16"}), ("float16", {"fp16"})])
def test_the_precision_is_that_of_the_base(make_config: Make, dtype: str, on: set[str]) -> None:
    told = ds_config(make_config(f"base.dtype={dtype}"))
    assert {name for name in ("bf16", "fp16") if told[name]["enabled"]} == on


def test_cpu_workers_use_torchs_adam(make_config: Make) -> None:
    assert ds_config(make_config())["optimizer"]["params"]["torch_adam"] is True
    assert ds_config(make_config("training.gpus_per_worker=1"))["optimizer"]["params"]["torch_adam"] is False


def test_batch_learning_rate_and_clipping_are_the_configured_ones(make_config: Make) -> None:
    told = ds_config(
        make_config(
            "training.batch_size=3",
            "training.gradient_accumulation=5",
            "training.learning_rate=0.01",
            "training.deepspeed.gradient_clipping=0.5",
        )
    )
    assert told["train_micro_batch_size_per_gpu"] == 3
    assert told["gradient_accumulation_steps"] == 5
    assert told["optimizer"]["params"]["lr"] == 0.01
    assert told["gradient_clipping"] == 0.5


def test_it_is_json(make_config: Make) -> None:
    told = ds_config(make_config())
    assert json.loads(json.dumps(told)) == told


def test_offload_goes_where_it_is_told(make_config: Make) -> None:
    assert not {"offload_optimizer", "offload_param"} & ds_config(make_config())["zero_optimization"].keys()
    told = ds_config(
        make_config(
            "training.deepspeed.zero_stage=3",
            "training.deepspeed.offload.optimizer=nvme",
            "training.deepspeed.offload.parameters=cpu",
            "training.deepspeed.offload.nvme_path=/fast",
        )
    )["zero_optimization"]
    assert (told["offload_optimizer"]["device"], told["offload_optimizer"]["nvme_path"]) == ("nvme", "/fast")
    assert told["offload_param"]["device"] == "cpu"


def test_weight_decay_is_the_configured_one(make_config: Make) -> None:
    assert ds_config(make_config("training.weight_decay=0.1"))["optimizer"]["params"]["weight_decay"] == 0.1


def test_buffers_do_not_take_gigabytes_whatever_is_trained(make_config: Make) -> None:
    zero = ds_config(make_config())["zero_optimization"]
    assert max(zero["reduce_bucket_size"], zero["allgather_bucket_size"]) * 4 <= 200_000_000
