"""The model card of a pushed adapter: valid where hubs read it, honest about what is not known, silent about places."""

from typing import Any

import pytest
import yaml

from cluster.readme import readme
from cluster.release import AdapterCard, BaseRef, DatasetRef

BASE = BaseRef(source="org/base", revision="v1", dtype="bfloat16", tokenizer="t", chat_template="c", architecture="a")
CARD = AdapterCard(
    base=BASE,
    method="qlora",
    quantization="nf4",
    variant="rslora",
    rank=8,
    alpha=16,
    target_modules="all-linear",
    dataset=DatasetRef(digest="d" * 64, rows=3, documents=["salaries"]),
    groups=("board",),
)


def header(text: str) -> dict[str, Any]:
    return dict(yaml.safe_load(text.split("---\n")[1]))


def test_a_base_on_a_hub_is_linked() -> None:
    text = readme("shop", "0" * 64, CARD, 8)
    assert header(text)["base_model"] == "org/base"
    assert 'AutoModelForCausalLM.from_pretrained("org/base", dtype="bfloat16")' in text
    assert "vllm serve org/base --enable-lora --max-lora-rank 8 --lora-modules shop=PATH" in text
    assert "| precision of the base | bfloat16, held as nf4 while training |" in text
    assert "rsLoRA for org/base; digest `000000000000`, trained with metier." in text
    assert "salaries" not in text and "board" not in text


@pytest.mark.parametrize("source", ["/home/me/models/base", "~/models/base", "./base"])
def test_of_a_local_base_only_the_name_is_told(source: str) -> None:
    card = CARD.model_copy(update={"base": BASE.model_copy(update={"source": source})})
    text = readme("shop", "0" * 64, card, 8)
    assert "base_model" not in header(text)
    assert "`base`" in text and source not in text
    assert "vllm serve 'DIRECTORY OF THE BASE'" in text


def test_what_is_not_known_is_not_told() -> None:
    text = readme("shop", "0" * 64, CARD.model_copy(update={"dataset": None}), None)
    assert "trained elsewhere and published from metier" in text
    assert "objective" not in text and "vllm" not in text and "Metrics" not in text


def test_metrics_are_a_table_and_cannot_break_it() -> None:
    card = CARD.model_copy(
        update={"metrics": {"validation": {"after": 1.23456, "best_step": 7}, "a|b": None, "x": "y|z"}}
    )
    text = readme("shop", "0" * 64, card, None)
    assert "| validation.after | 1.235 |\n| validation.best_step | 7 |\n| x | y\\|z |" in text
