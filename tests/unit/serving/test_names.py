"""What the ``model`` of a request means, against a real registry in a directory."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.config import Config, PromptConfig, RetrievalConfig
from cluster.errors import Mismatch, ModelNotFound
from cluster.models import base_ref
from cluster.registry import AdapterVersion, Registry
from cluster.release import AdapterCard, AdapterRef, BaseRef, EmbedderRef, KnowledgeRef, Release, prompt_hash
from cluster.storage import Storage
from serving.names import Names, Served

A, B = "a" * 64, "b" * 64


@pytest.fixture
def config(make_config: Callable[..., Config]) -> Config:
    return make_config("base.name=small")


@pytest.fixture
def base(config: Config, tiny_llama: Path) -> BaseRef:
    return base_ref(config.base, tiny_llama)


@pytest.fixture
def registry(config: Config) -> Registry:
    return Registry(Storage(config.storage.url))


@pytest.fixture
def names(config: Config, registry: Registry, base: BaseRef) -> Names:
    return Names(config, registry, base)


@pytest.fixture
def publish(
    config: Config, registry: Registry, base: BaseRef, adapters: dict[str, Path]
) -> Callable[..., AdapterVersion]:
    """``publish("shop", A, base=…)``: an adapter whose card fits the configuration but for what is said."""

    def publish(name: str, which: str = A, **card: Any) -> AdapterVersion:
        rank = {A: 4, B: 2}[which]
        fits = {
            "base": base,
            "rank": rank,
            "alpha": 2 * rank,
            "target_modules": [],
            "prompt": prompt_hash(config.prompt),
        }
        return registry.publish_adapter(name, adapters[which], AdapterCard(**(fits | card)))

    return publish


def release(base: BaseRef, adapter: AdapterVersion | None = None, **parts: Any) -> Release:
    ref = AdapterRef(name=adapter.name, version=adapter.version, digest=adapter.digest) if adapter else None
    default = {"base": base, "adapter": ref, "embedder": EmbedderRef(source="tiny:bert"), "prompt": PromptConfig()}
    return Release(**(default | {"retrieval": RetrievalConfig()} | parts))


# -- the base and adapters on it


def test_the_base_answers_with_the_configurations_settings(names: Names, config: Config) -> None:
    found = names.resolve("small")
    assert (found.model, found.adapter, found.knowledge, found.release) == ("small", None, None, None)
    assert (found.prompt, found.retrieval) == (config.prompt, config.retrieval)


def test_an_adapter_is_found_by_name_version_and_digest(names: Names, publish: Callable[..., AdapterVersion]) -> None:
    one, two = publish("shop", A), publish("shop", B)
    assert (names.resolve("small:shop").model, names.resolve("small:shop").adapter) == ("small:shop@2", two.digest)
    for ref in ("small:shop@1", f"small:shop@{one.digest}", f"small:shop@{one.digest[:8]}"):
        assert (names.resolve(ref).model, names.resolve(ref).adapter) == ("small:shop@1", one.digest)


@pytest.mark.parametrize(
    ("card", "field"),
    [
        ({"prompt": prompt_hash(PromptConfig(system="Other."))}, "prompt"),
        ({"base": {"dtype": "bfloat16"}}, "base.dtype"),
        ({"base": {"tokenizer": "other"}}, "base.tokenizer"),
        ({"base": {"chat_template": "other"}}, "base.chat_template"),
        ({"base": {"architecture": "other"}}, "base.architecture"),
    ],
)
def test_an_adapter_made_for_something_else_is_refused_by_field(
    names: Names, base: BaseRef, publish: Callable[..., AdapterVersion], card: dict[str, Any], field: str
) -> None:
    if "base" in card:
        card = {"base": base.model_copy(update=card["base"])}
    publish("shop", **card)
    with pytest.raises(Mismatch, match=rf"{field} is .* in the adapter") as caught:
        names.resolve("small:shop")
    assert caught.value.param == field


# -- releases


def test_a_release_brings_all_its_parts(
    names: Names, registry: Registry, base: BaseRef, publish: Callable[..., AdapterVersion]
) -> None:
    adapter = publish("shop", prompt=prompt_hash(PromptConfig(decline="No.")))
    parts = release(
        base,
        adapter,
        knowledge=KnowledgeRef(name="docs", version=3),
        prompt=PromptConfig(decline="No."),
        retrieval=RetrievalConfig(top_k=7),
    )
    made = registry.create_release("support", parts)
    found = names.resolve("support")
    assert found.model == f"support@{made.digest[:12]}"
    assert (found.release, found.adapter, found.knowledge) == (made.digest, adapter.digest, parts.knowledge)
    assert (found.prompt, found.retrieval) == (parts.prompt, parts.retrieval)


def test_a_release_is_found_by_alias_version_and_digest(names: Names, registry: Registry, base: BaseRef) -> None:
    one, two = (registry.create_release("support", release(base, retrieval=RetrievalConfig(top_k=k))) for k in (1, 2))
    registry.promote("support", "1")
    registry.promote("support", "2", "canary")
    for ref in ("support", "support@prod", "support@1", f"support@{one.digest[:6]}"):
        assert names.resolve(ref).release == one.digest
    for ref in ("support@canary", "support@2", f"support@{two.digest}"):
        assert names.resolve(ref).release == two.digest


def test_a_moved_alias_counts_from_the_next_request_on(names: Names, registry: Registry, base: BaseRef) -> None:
    one, two = (registry.create_release("support", release(base, retrieval=RetrievalConfig(top_k=k))) for k in (1, 2))
    registry.promote("support", "1")
    assert names.resolve("support").release == one.digest
    registry.promote("support", "2")
    assert names.resolve("support").release == two.digest
    registry.rollback("support")
    assert names.resolve("support").release == one.digest


def test_a_release_whose_adapter_does_not_match_its_prompt_is_refused(
    names: Names, registry: Registry, base: BaseRef, publish: Callable[..., AdapterVersion]
) -> None:
    registry.create_release("support", release(base, publish("shop"), prompt=PromptConfig(system="Other.")))
    with pytest.raises(Mismatch, match=r"prompt is .* in the adapter") as caught:
        names.resolve("support")
    assert caught.value.param == "prompt"


def test_a_release_of_another_base_is_refused_though_it_has_no_adapter(
    names: Names, registry: Registry, base: BaseRef
) -> None:
    registry.create_release("support", release(base.model_copy(update={"source": "tiny:qwen2", "revision": "v2"})))
    with pytest.raises(Mismatch, match=r"base\.source is tiny:qwen2 in release support@1, tiny:llama here") as caught:
        names.resolve("support")
    assert caught.value.param == "base.source"
    assert [line.split()[0] for line in str(caught.value).splitlines()] == ["base.source", "base.revision"]


# -- names that mean nothing


@pytest.mark.parametrize(
    "model",
    [
        "nothing",
        "support@nothing",
        "support@9",
        "small:nothing",
        "small:shop@9",
        "small:",
        "Org/Model",
        "GPT-4o",
        "@1",
        "../x",
    ],
)
def test_a_name_that_means_nothing_is_a_model_not_found(
    names: Names, registry: Registry, base: BaseRef, publish: Callable[..., AdapterVersion], model: str
) -> None:
    publish("shop")
    registry.create_release("support", release(base))
    with pytest.raises(ModelNotFound) as caught:
        names.resolve(model)
    assert caught.value.param == "model"
    assert model in str(caught.value)


@pytest.mark.parametrize(("model", "near"), [("suport", "support"), ("small:shp", "shop")])
def test_a_near_name_is_offered(
    names: Names, registry: Registry, base: BaseRef, publish: Callable[..., AdapterVersion], model: str, near: str
) -> None:
    publish("shop")
    registry.create_release("support", release(base))
    with pytest.raises(ModelNotFound, match=f"did you mean {near}"):
        names.resolve(model)


def test_a_storage_that_fails_is_not_a_wrong_name(names: Names, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError("connection lost")

    monkeypatch.setattr(names.registry, "adapter", fail)
    with pytest.raises(OSError, match="connection lost"):
        names.resolve("small:shop")


# -- the list


def test_the_list_has_every_name_with_what_it_stands_on(
    names: Names, registry: Registry, base: BaseRef, publish: Callable[..., AdapterVersion]
) -> None:
    adapter = publish("shop")
    one = registry.create_release("support", release(base))
    two = registry.create_release("support", release(base, adapter))
    registry.promote("support", "1")
    registry.promote("support", "2", "canary")
    first, second = f"support@{one.digest[:12]}", f"support@{two.digest[:12]}"
    assert list(names.list()) == [
        Served("small", "small", None, ""),
        Served("small:shop@1", "small", "small", adapter.created),
        Served(first, "small", "small", one.created),
        Served("support@prod", "small", first, one.created),
        Served("support", "small", first, one.created),
        Served(second, "small", "small:shop@1", two.created),
        Served("support@canary", "small", second, two.created),
    ]


def test_a_release_without_prod_is_listed_by_its_bare_name_as_it_resolves(
    names: Names, registry: Registry, base: BaseRef
) -> None:
    for k in (1, 2):
        registry.create_release("support", release(base, retrieval=RetrievalConfig(top_k=k)))
    (bare,) = (entry for entry in names.list() if entry.id == "support")
    assert bare.parent == names.resolve("support").model


def test_every_listed_name_resolves(
    names: Names, registry: Registry, base: BaseRef, publish: Callable[..., AdapterVersion]
) -> None:
    registry.create_release("support", release(base, publish("shop")))
    registry.promote("support", "1", "canary")
    listed = [entry.id for entry in names.list()]
    assert len(listed) == 5
    for name in listed:
        names.resolve(name)
