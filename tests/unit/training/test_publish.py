"""What a run puts into the registry: a card that tells how it was made, and files that PEFT alone loads."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.config import Config
from cluster.errors import BadInput
from cluster.models import base_ref
from cluster.registry import Registry
from cluster.release import DatasetRef, KnowledgeRef, prompt_hash
from cluster.storage import Storage
from cluster.vllm_files import vllm_max_lora_rank
from tests.decoders import random_adapter
from training.publish import Origin, publish, settings, source_digest

EVENTS = [{"step": n, "loss": 4.0 - n, "seconds": 2.0 * n, "tokens_per_s": 50.0} for n in (1, 2, 3)]
IDS = torch.tensor([[5, 80, 99, 7, 200]])
Make = Callable[..., Config]


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(Storage(str(tmp_path / "store")))


@pytest.fixture(scope="module")
def trained(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Any]]:
    """``trained("rslora")``: the files a worker saves at the end, and the model it had then."""
    from transformers import AutoModelForCausalLM

    def train(variant: str = "plain") -> tuple[Path, Any]:
        base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
        flags = {"plain": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}[variant]
        directory = tmp_path_factory.mktemp("final")
        shape = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", **flags}
        model = random_adapter(base, directory, seed=3, scale=0.1, **shape)
        (directory / "training_args.bin").write_bytes(b"pickle")
        return directory, model

    return train


def origin(config: Config, directory: Path, **more: Any) -> Origin:
    facts: dict[str, Any] = {
        "base": base_ref(config.base, directory),
        "base_directory": directory,
        "dataset": DatasetRef(digest="d", rows=3, documents=["a"], groups=("drivers",)),
        "knowledge": KnowledgeRef(name="shop", version=2),
        "groups": ("drivers",),
        "events": EVENTS,
        "recipe": "r" * 64,
        "run": "shop-1",
    }
    return Origin(**facts | more)


@pytest.mark.parametrize("variant", ["plain", "rslora"])
def test_plain_peft_loads_what_was_published_to_what_training_had(
    variant: str,
    trained: Callable[..., tuple[Path, Any]],
    make_config: Make,
    tiny_llama: Path,
    registry: Registry,
    tmp_path: Path,
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    directory, model = trained(variant)
    config = make_config(f"training.lora.variant={variant}")
    made = publish(registry, config, directory, origin(config, tiny_llama))
    fetched = registry.fetch_adapter(made.digest, tmp_path / "cache")
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    with torch.inference_mode():
        before = base(input_ids=IDS).logits.clone()
        after = PeftModel.from_pretrained(base, fetched).eval()(input_ids=IDS).logits
        had = model(input_ids=IDS).logits
    torch.testing.assert_close(after, had)
    assert (before - had).abs().max() > 0.1
    assert vllm_max_lora_rank(fetched) == 16
    assert made.card.variant == variant


def test_the_card_tells_how_it_was_made(
    trained: Callable[..., tuple[Path, Any]], make_config: Make, tiny_llama: Path, registry: Registry, tmp_path: Path
) -> None:
    config = make_config("training.method=qlora", f"data.train=[{tmp_path}/rows/train.jsonl]", "data.leakage=drop")
    given = origin(config, tiny_llama)
    card = publish(registry, config, trained()[0], given).card
    assert (card.method, card.quantization, card.objective) == ("qlora", "nf4", "sft")
    assert (card.rank, card.alpha, card.target_modules) == (16, 32, "all-linear")
    assert (card.max_tokens, card.prompt, card.run) == (768, prompt_hash(config.prompt), "shop-1")
    assert card.groups == ("drivers",)
    assert card.dataset == given.dataset
    assert (card.training["steps"], card.training["loss_first"], card.training["loss_last"]) == (3, 3.0, 1.0)
    assert (card.metier, card.code) == ("0.1.0", source_digest())
    assert (card.config["data"]["train"], card.config["data"]["leakage"]) == (["train.jsonl"], "drop")
    assert str(tmp_path) not in json.dumps(card.config)


def test_evaluations_are_told_from_steps_and_go_on_the_card(
    trained: Callable[..., tuple[Path, Any]], make_config: Make, tiny_llama: Path, registry: Registry
) -> None:
    config = make_config()
    watched = [{"step": n, "validation_loss": 5.0 - n} for n in (0, 3)]
    events = [watched[0], *EVENTS, watched[1]]
    card = publish(registry, config, trained()[0], origin(config, tiny_llama, events=events)).card
    assert (card.training["steps"], card.training["loss_first"], card.training["tokens_per_s"]) == (3, 3.0, 50.0)
    assert card.metrics == {"best_step": 3, "validation_before": 5.0, "validation_after": 2.0}


def test_raw_text_leaves_no_prompt(
    trained: Callable[..., tuple[Path, Any]], make_config: Make, tiny_llama: Path, registry: Registry
) -> None:
    config = make_config("training.objective=domain")
    card = publish(registry, config, trained()[0], origin(config, tiny_llama, knowledge=None, events=[])).card
    assert (card.objective, card.prompt, card.knowledge) == ("domain", None, None)
    assert card.training["steps"] == 0


def test_dora_is_not_published_as_an_adapter(
    trained: Callable[..., tuple[Path, Any]], make_config: Make, tiny_llama: Path, registry: Registry
) -> None:
    config = make_config()
    with pytest.raises(BadInput, match="DoRA is not served as an adapter"):
        publish(registry, config, trained("dora")[0], origin(config, tiny_llama))
    assert registry.adapters() == []


def test_whole_weights_become_a_model_that_serves_as_a_base(
    make_config: Make, tiny_llama: Path, registry: Registry, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    model.lm_head.weight.data *= -1
    model.save_pretrained(tmp_path / "final")  # no tokenizer, as a worker leaves it
    config = make_config("training.method=full", "training.publish=model", "training.adapter=shop")
    made = publish(registry, config, tmp_path / "final", origin(config, tiny_llama))
    assert (made.ref, made.card.method, made.card.rank, made.card.variant) == ("shop@1", "full", None, None)
    fetched = registry.fetch_model(made.digest, tmp_path / "cache")
    assert base_ref(config.base, fetched) == base_ref(config.base, tiny_llama)
    again = AutoModelForCausalLM.from_pretrained(fetched, dtype=torch.float32)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_merged_weights_say_which_lora_is_in_them(
    trained: Callable[..., tuple[Path, Any]], make_config: Make, tiny_llama: Path, registry: Registry, tmp_path: Path
) -> None:
    config = make_config("training.lora.variant=dora", "training.publish=model")
    made = publish(registry, config, trained("dora")[0], origin(config, tiny_llama))
    card = made.card
    assert "tokenizer.json" in {file.name for file in registry.fetch_model(made.digest, tmp_path / "cache").iterdir()}
    assert (card.method, card.variant, card.rank, card.alpha) == ("lora", "dora", 16, 32)


def test_settings_keep_no_secret_and_no_place_where_things_run(make_config: Make) -> None:
    shown = settings(
        make_config("ray.runtime_env={env_vars: {WANDB_API_KEY: s3cr3t}}", "storage.options={key: s3cr3t}")
    )
    assert "s3cr3t" not in json.dumps(shown)
    assert shown["training"]["lora"]["rank"] == 16
