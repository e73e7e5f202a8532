"""Digests depend on the parts and on nothing else; a mismatch names the field, both values and the fix."""

import json
from typing import Any

import pytest
from pydantic import ValidationError

from cluster import release as module
from cluster.config import PromptConfig, RetrievalConfig
from cluster.errors import Mismatch
from cluster.release import (
    AdapterCard,
    AdapterRef,
    BaseRef,
    DatasetRef,
    EmbedderRef,
    KnowledgeRef,
    Release,
    RerankerRef,
    check_match,
    prompt_hash,
)

BASE = BaseRef(source="tiny:llama", dtype="bfloat16", tokenizer="t", chat_template="c", architecture="a")
PROMPT = PromptConfig()
CARD = AdapterCard(
    base=BASE,
    rank=8,
    alpha=16,
    target_modules=["q_proj"],
    prompt=prompt_hash(PROMPT),
    dataset=DatasetRef(digest="d", rows=3),
)


def make(**parts: Any) -> Release:
    default = {
        "base": BASE,
        "embedder": EmbedderRef(source="tiny:bert"),
        "prompt": PROMPT,
        "retrieval": RetrievalConfig(),
    }
    return Release(**(default | parts))


def test_the_digest_is_that_of_the_parts_in_any_order() -> None:
    release = make()
    shuffled = dict(reversed(release.model_dump(mode="json").items()))
    assert Release.model_validate(shuffled).digest == release.digest
    assert Release.model_validate(json.loads(release.model_dump_json())).digest == release.digest
    assert len(release.digest) == 64


@pytest.mark.parametrize(
    "part",
    [
        {"base": BASE.model_copy(update={"revision": "v2"})},
        {"adapter": AdapterRef(name="shop", version=1, digest="0" * 64)},
        {"knowledge": KnowledgeRef(name="shop", version=3)},
        {"knowledge": KnowledgeRef(name="shop", version="head")},
        {"embedder": EmbedderRef(source="tiny:other")},
        {"prompt": PromptConfig(system="Answer.")},
        {"retrieval": RetrievalConfig(top_k=4)},
    ],
)
def test_every_part_counts(part: dict[str, Any]) -> None:
    assert make(**part).digest != make().digest


def test_a_release_cannot_be_changed_or_carry_more() -> None:
    with pytest.raises(ValidationError):
        make().base = BASE  # type: ignore[misc]
    with pytest.raises(ValidationError):
        make(created="today")


def test_the_prompt_hash_follows_the_settings_and_the_format(monkeypatch: pytest.MonkeyPatch) -> None:
    before = prompt_hash(PROMPT)
    assert prompt_hash(PromptConfig(decline="No.")) != before
    assert len(before) == 16
    monkeypatch.setattr(module, "PROMPT_FORMAT", module.PROMPT_FORMAT + 1)
    assert prompt_hash(PROMPT) != before


def test_an_adapter_that_fits_is_let_in() -> None:
    check_match(CARD, BASE, PROMPT)


@pytest.mark.parametrize("field", ["source", "revision", "dtype", "tokenizer", "chat_template", "architecture"])
def test_each_field_of_the_base_is_compared(field: str) -> None:
    with pytest.raises(Mismatch, match=rf"base\.{field} is .* in the adapter, other here; \w+") as caught:
        check_match(CARD, BASE.model_copy(update={field: "other"}), PROMPT)
    assert caught.value.param == f"base.{field}"


def test_all_differences_are_told_at_once() -> None:
    other = BASE.model_copy(update={"dtype": "float32"})
    with pytest.raises(Mismatch) as caught:
        check_match(CARD, other, PromptConfig(system="Answer."))
    lines = str(caught.value).splitlines()
    assert [line.split()[0] for line in lines] == ["base.dtype", "prompt"]
    assert "bfloat16 in the adapter, float32 here" in lines[0]


def test_an_adapter_trained_elsewhere_is_compared_by_what_its_weights_need() -> None:
    foreign = CARD.model_copy(update={"prompt": None, "dataset": None})
    check_match(foreign, BASE.model_copy(update={"source": "./copy", "revision": "v2"}), PromptConfig(system="Answer."))
    with pytest.raises(Mismatch, match=r"base\.architecture"):
        check_match(foreign, BASE.model_copy(update={"architecture": "other"}), PROMPT)


def test_an_adapter_of_raw_text_knows_its_base_and_no_prompt() -> None:
    domain = CARD.model_copy(update={"prompt": None, "objective": "domain"})
    check_match(domain, BASE, PromptConfig(system="Answer."))
    with pytest.raises(Mismatch, match=r"base\.source is tiny:llama in the adapter, \./copy here"):
        check_match(domain, BASE.model_copy(update={"source": "./copy"}), PROMPT)


def test_without_a_prompt_the_base_alone_is_compared() -> None:
    check_match(CARD.model_copy(update={"prompt": "0" * 16}), BASE, None)
    with pytest.raises(Mismatch, match=r"base\.dtype"):
        check_match(CARD, BASE.model_copy(update={"dtype": "float32"}), None)


def test_a_card_of_before_says_what_was_the_case_then() -> None:
    new = ("method", "objective", "quantization", "max_tokens", "metrics", "config", "run", "code", "variant")
    old = {key: value for key, value in CARD.model_dump(mode="json").items() if key not in new}
    old["dataset"] = {"digest": "d", "rows": 3, "documents": []}
    assert AdapterCard.model_validate(old) == CARD
    assert (CARD.method, CARD.quantization, CARD.variant, CARD.objective) == ("lora", "none", "plain", "sft")


def test_a_reranker_is_part_of_a_release_and_none_changes_nothing() -> None:
    reranked = make(reranker=RerankerRef(source="org/cross-encoder", revision="abc"))
    assert Release.model_validate(json.loads(reranked.model_dump_json())) == reranked
    other = make(reranker=RerankerRef(source="org/cross-encoder", revision="abd"))
    assert len({make().digest, reranked.digest, other.digest}) == 3
    assert make().model_dump(mode="json")["reranker"] is None
