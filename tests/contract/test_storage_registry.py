"""Storage and registry against a directory and a real S3 server (moto's, on loopback, in a process of its own).

The server runs single-threaded: moto looks and then writes when it is asked for an exclusive PUT, so only one request
at a time makes it as atomic as S3 is. The writers race for real: they are processes.
"""

import json
import os
import re
import signal
import struct
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import botocore.exceptions
import fsspec
import pytest

from cluster.adapter_files import PEFT_FILES
from cluster.config import PromptConfig, RetrievalConfig
from cluster.errors import BadInput, Mismatch, ModelNotFound, NotFound, ResourcesShort, Unavailable
from cluster.registry import Registry, content_digest, file_digest
from cluster.release import AdapterCard, AdapterRef, BaseRef, DatasetRef, EmbedderRef, ModelCard, Release
from cluster.storage import Storage
from tests import trade

REPOSITORY = Path(__file__).resolve().parents[2]
BASE = BaseRef(source="tiny:llama", dtype="float32", tokenizer="t", chat_template="c", architecture="a")
CARD = AdapterCard(base=BASE, rank=2, alpha=4, target_modules=["q_proj"])


@pytest.fixture(params=["directory", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "directory":
        return Storage(str(tmp_path / "storage"))
    options = request.getfixturevalue("s3")
    bucket = f"test-{uuid.uuid4().hex[:12]}"
    fsspec.filesystem("s3", **options).mkdir(bucket)
    return Storage(f"s3://{bucket}/some/prefix", options)


@pytest.fixture
def registry(storage: Storage) -> Registry:
    return Registry(storage)


def adapter(directory: Path, seed: int = 0) -> Path:
    """A PEFT directory of rank 2 with `seed` in its weights, and things beside it that are nobody's business."""
    directory.mkdir(parents=True, exist_ok=True)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    entries = {"x.q_proj.lora_A.weight": ([2, 3], [0, 24]), "x.q_proj.lora_B.weight": ([3, 2], [24, 48])}
    head = json.dumps({k: {"dtype": "F32", "shape": s, "data_offsets": o} for k, (s, o) in entries.items()}).encode()
    weights = struct.pack("<Q", len(head)) + head + struct.pack("<12f", *[seed] * 12)
    (directory / "adapter_model.safetensors").write_bytes(weights)
    (directory / "training_args.bin").write_bytes(b"pickle")
    (directory / "README.md").write_text("notes")
    return directory


def release(top_k: int = 3) -> Release:
    prompt, retrieval = PromptConfig(), RetrievalConfig(top_k=top_k)
    return Release(base=BASE, embedder=EmbedderRef(source="tiny:bert"), prompt=prompt, retrieval=retrieval)


def start(storage: Storage, body: str, *arguments: str) -> subprocess.Popen[str]:
    """A Python process with `storage`, `registry` and the helpers of this file; it says "ready" and waits for a line."""
    script = (
        "import sys, json, os, signal\nfrom pathlib import Path\nfrom cluster.storage import Storage\nfrom cluster.registry import Registry\n"
        "import cluster.storage\nfrom cluster.release import AdapterCard\n"
        "url, options, *arguments = json.loads(sys.argv[1])\nstorage = Storage(url, options)\nregistry = Registry(storage)\n"
        "storage.list()\nprint('ready', flush=True)\nsys.stdin.readline()\n" + body
    )
    url = str(storage.root) if storage.local else f"s3://{storage.root}"
    command = [sys.executable, "-c", script, json.dumps([url, storage.options, *arguments])]
    return subprocess.Popen(
        command, cwd=REPOSITORY, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def race(processes: list[subprocess.Popen[str]]) -> list[str]:
    """What each prints, all let go at the same moment."""
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n", process.communicate()[1]
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        results = [process.communicate(timeout=60) for process in processes]
        assert [process.returncode for process in processes] == [0] * len(processes), [error for _, error in results]
        return [out for out, _ in results]
    finally:
        for process in processes:
            process.kill()
            process.communicate()


# -- storage -----------------------------------------------------------------------------------------------------


def test_what_is_written_is_read_and_listed(storage: Storage, tmp_path: Path) -> None:
    assert storage.list() == []
    assert not storage.exists("a/b.json")
    storage.write("a/b.json", b"1")
    storage.write("a/b.json", b"2")
    storage.write("a/c/d.json", b"3")
    assert storage.read("a/b.json") == b"2"
    assert storage.list() == ["a"]
    assert storage.list("a") == ["b.json", "c"]
    assert storage.exists("a/b.json")
    assert not storage.exists("a/c")
    (tmp_path / "file").write_bytes(b"x" * 100_000)
    storage.upload(tmp_path / "file", "a/big")
    storage.download("a/big", tmp_path / "back" / "file")
    assert (tmp_path / "back" / "file").read_bytes() == b"x" * 100_000
    assert os.listdir(tmp_path / "back") == ["file"]
    storage.delete("a/c")
    storage.delete("a/c")
    assert storage.list("a") == ["b.json", "big"]


def test_what_is_not_there_is_not_found(storage: Storage, tmp_path: Path) -> None:
    storage.write("a/b.json", b"1")
    for path in ("nothing", "a/nothing", "a"):
        with pytest.raises(NotFound, match="no such object"):
            storage.read(path)
    with pytest.raises(NotFound):
        storage.download("nothing", tmp_path / "file")
    assert not (tmp_path / "file").exists()
    assert storage.list("nothing") == []


def test_creation_is_exclusive_and_shows_nothing_else(storage: Storage) -> None:
    assert storage.create("log/000001.json", b"first")
    assert not storage.create("log/000001.json", b"second")
    assert storage.read("log/000001.json") == b"first"
    assert storage.list("log") == ["000001.json"]


@pytest.mark.parametrize("path", ["../x", "a/../../x", "/etc/passwd"])
def test_no_path_leaves_the_storage(storage: Storage, path: str) -> None:
    for act in (storage.read, storage.exists, storage.list, storage.delete):
        with pytest.raises(BadInput):
            act(path)
    with pytest.raises(BadInput):
        storage.write(path, b"")
    with pytest.raises(BadInput, match="whole storage"):
        storage.delete("")


def test_processes_that_create_the_same_paths_share_them_out(storage: Storage) -> None:
    body = "print(json.dumps([n for n in range(20) if storage.create(f'race/{n}', arguments[0].encode())]))"
    winners = [json.loads(out) for out in race([start(storage, body, str(n)) for n in range(3)])]
    assert sorted(n for won in winners for n in won) == list(range(20))
    for number, won in enumerate(winners):
        assert all(storage.read(f"race/{n}") == str(number).encode() for n in won)


def test_a_missing_bucket_is_said(s3: dict[str, Any]) -> None:
    storage = Storage("s3://nobody-made-this/x", s3)
    for act in (
        storage.read,
        storage.exists,
        storage.list,
        lambda path: storage.write(path, b""),
        lambda path: storage.create(path, b""),
    ):
        with pytest.raises(Unavailable, match="s3://nobody-made-this/x: the bucket does not exist; create it"):
            act("a")


def test_a_store_that_does_not_answer_is_said() -> None:
    options = {
        "endpoint_url": "http://127.0.0.1:9",
        "key": "k",
        "secret": "s3cr3t",
        "config_kwargs": {"retries": {"total_max_attempts": 1}},
    }
    with pytest.raises(Unavailable, match=r"s3://bucket: Could not connect.*check storage\.url") as caught:
        Storage("s3://bucket", options).read("x")
    assert "s3cr3t" not in str(caught.value)


def test_a_scheme_nobody_knows_is_refused() -> None:
    with pytest.raises(BadInput, match=r"storage\.url"):
        Storage("nosuch://bucket")


def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    storage = Storage(str(tmp_path))
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ResourcesShort, match="no space left"):
        storage.write("a", b"1")
    assert storage.list() == []


def test_a_store_that_overwrites_instead_of_refusing_is_noticed(
    s3: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    fsspec.filesystem("s3", **s3).mkdir("forgetful")
    storage = Storage("s3://forgetful", s3)
    pipe_file = storage.fs.pipe_file
    monkeypatch.setattr(storage.fs, "pipe_file", lambda path, data, mode="": pipe_file(path, data))
    with pytest.raises(Unavailable, match="If-None-Match"):
        storage.create("a", b"1")


@pytest.mark.parametrize("code", ["PreconditionFailed", "412"])
def test_a_refusal_in_other_words_than_those_of_aws_is_understood(
    s3: dict[str, Any], monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    fsspec.filesystem("s3", **s3).mkdir(f"words-{code.lower()}")
    storage = Storage(f"s3://words-{code.lower()}", s3)
    assert storage.create("a", b"1")
    monkeypatch.setattr(storage.fs, "pipe_file", Answers(code))
    assert not storage.create("b", b"1")


def test_a_conflict_on_s3_is_asked_again(s3: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.filesystem("s3", **s3).mkdir("conflicts")
    storage = Storage("s3://conflicts", s3)
    assert storage.create("a", b"1")
    answers = Answers("ConditionalRequestConflict", "ConditionalRequestConflict")
    monkeypatch.setattr(storage.fs, "pipe_file", answers)
    assert storage.create("b", b"1")
    assert answers.codes == []
    monkeypatch.setattr("cluster.storage.CONFLICT_WAITS", (0.0,))
    monkeypatch.setattr(storage.fs, "pipe_file", Answers(*["ConditionalRequestConflict"] * 2))
    with pytest.raises(Unavailable, match="s3://conflicts"):
        storage.create("b", b"1")


class Answers:
    """A ``pipe_file`` that fails as s3fs does, once with each of `codes`."""

    def __init__(self, *codes: str) -> None:
        self.codes = list(codes)

    def __call__(self, path: str, data: bytes, mode: str) -> None:
        if self.codes:
            cause = botocore.exceptions.ClientError({"Error": {"Code": self.codes.pop(0)}}, "PutObject")
            raise OSError(22, "refused") from cause


# -- adapters ----------------------------------------------------------------------------------------------------


def test_an_adapter_comes_back_as_it_was_published(registry: Registry, tmp_path: Path) -> None:
    source = adapter(tmp_path / "a")
    published = registry.publish_adapter("shop", source, CARD)
    assert (published.ref, published.card) == ("shop@1", CARD)
    fetched = registry.fetch_adapter(published.digest, tmp_path / "cache")
    assert fetched == tmp_path / "cache" / published.digest
    visible = sorted(name for name in os.listdir(fetched) if not name.startswith("."))
    assert visible == ["adapter_config.json", "adapter_model.safetensors"]
    assert all((fetched / name).read_bytes() == (source / name).read_bytes() for name in visible)
    assert registry.fetch_adapter(published.digest, tmp_path / "cache") == fetched


def test_the_same_content_is_the_same_version(registry: Registry, tmp_path: Path) -> None:
    first = registry.publish_adapter("shop", adapter(tmp_path / "a"), CARD)
    how = {"training": {"seconds": 99.0}, "metrics": {"validation": 1.5}, "config": {"name": "x"}, "run": "shop-2"}
    slower = CARD.model_copy(update=how | {"metier": "0.2.0", "code": "c"})
    assert registry.publish_adapter("shop", adapter(tmp_path / "b"), slower) == first
    second = registry.publish_adapter("shop", adapter(tmp_path / "c", seed=1), CARD)
    assert (second.version, len({first.digest, second.digest})) == (2, 2)
    assert registry.publish_adapter("shop", adapter(tmp_path / "a"), CARD) == first
    elsewhere = registry.publish_adapter("depot", adapter(tmp_path / "a"), CARD)
    assert (elsewhere.ref, elsewhere.digest) == ("depot@1", first.digest)
    assert [version.ref for version in registry.adapters()] == ["depot@1", "shop@1", "shop@2"]


@pytest.mark.parametrize(
    "change",
    [
        {"groups": ("drivers",)},
        {"prompt": "abc"},
        {"dataset": DatasetRef(digest="d", rows=2, documents=["fees"])},
        {"method": "qlora", "quantization": "nf4"},
        {"objective": "domain"},
    ],
)
def test_other_rights_or_other_rows_make_another_adapter(
    registry: Registry, tmp_path: Path, change: dict[str, Any]
) -> None:
    first = registry.publish_adapter("shop", adapter(tmp_path), CARD)
    assert registry.publish_adapter("shop", adapter(tmp_path), CARD.model_copy(update=change)).digest != first.digest


def test_an_adapter_published_before_cards_had_more_fields_is_still_fetched(registry: Registry, tmp_path: Path) -> None:
    source = adapter(tmp_path / "a")
    old = {
        "base": BASE.model_dump(mode="json"),
        "method": "lora",
        "rank": 2,
        "alpha": 4.0,
        "target_modules": ["q_proj"],
    }
    manifest = {"files": {name: file_digest(source / name) for name in PEFT_FILES}, "card": old}
    content = content_digest(manifest)
    for name in PEFT_FILES:
        registry.storage.upload(source / name, f"objects/adapters/{content}/{name}")
    registry.storage.write(f"objects/adapters/{content}/manifest.json", json.dumps(manifest).encode())
    registry.log("adapters/shop").append({"digest": content})
    assert registry.adapter("shop").card == CARD
    assert registry.fetch_adapter(content, tmp_path / "cache").is_dir()


def test_references_to_adapters(registry: Registry, tmp_path: Path) -> None:
    one, two = (registry.publish_adapter("shop", adapter(tmp_path, seed), CARD) for seed in (1, 2))
    assert registry.adapter("shop") == two
    assert registry.adapter("shop@1") == one
    assert registry.adapter(f"shop@{one.digest[:6]}") == one
    assert registry.adapter(f"shop@{one.digest}") == one
    with pytest.raises(ModelNotFound, match=r"no 'shop@3'; versions: 1 \(.{12}\), 2"):
        registry.adapter("shop@3")
    with pytest.raises(ModelNotFound, match=r"no adapter 'shpo' .*did you mean shop"):
        registry.adapter("shpo")
    with pytest.raises(ModelNotFound, match="there are shop"):
        registry.adapter("zzz")


@pytest.mark.parametrize("name", ["../x", "Shop", "", "a/b", "shop\n", "x" * 64])
def test_a_name_that_is_no_slug_never_reaches_storage(registry: Registry, tmp_path: Path, name: str) -> None:
    for act in (
        lambda: registry.publish_adapter(name, adapter(tmp_path), CARD),
        lambda: registry.adapter(name),
        lambda: registry.create_release(name, release()),
        lambda: registry.release(f"{name}@prod"),
        lambda: registry.knowledge_append(name, {}),
        lambda: registry.fetch_adapter(name, tmp_path),
    ):
        with pytest.raises(BadInput):
            act()
    assert registry.storage.list() == []


def test_an_adapter_of_another_rank_than_its_card_is_refused(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(Mismatch, match=r"the card says rank 8, .* has 2"):
        registry.publish_adapter("shop", adapter(tmp_path), CARD.model_copy(update={"rank": 8}))
    assert registry.adapters() == []


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_damaged_files_are_not_handed_out(registry: Registry, tmp_path: Path, name: str) -> None:
    content = registry.publish_adapter("shop", adapter(tmp_path / "a"), CARD).digest
    good = registry.storage.read(f"objects/adapters/{content}/{name}")
    registry.storage.write(f"objects/adapters/{content}/{name}", good[:-1] + b"?")
    with pytest.raises(Mismatch, match=f"{name} of adapter {content[:12]}.*is damaged"):
        registry.fetch_adapter(content, tmp_path / "cache")
    assert [entry for entry in os.listdir(tmp_path / "cache") if not entry.endswith(".lock")] == []
    registry.storage.write(f"objects/adapters/{content}/{name}", good)
    assert registry.fetch_adapter(content, tmp_path / "cache").is_dir()


def test_a_changed_manifest_is_noticed(registry: Registry, tmp_path: Path) -> None:
    content = registry.publish_adapter("shop", adapter(tmp_path / "a"), CARD).digest
    path = f"objects/adapters/{content}/manifest.json"
    manifest = json.loads(registry.storage.read(path))
    manifest["card"]["groups"] = ["everyone"]
    registry.storage.write(path, json.dumps(manifest).encode())
    with pytest.raises(Mismatch, match="manifest"):
        Registry(registry.storage).fetch_adapter(content, tmp_path / "cache")


# -- releases ----------------------------------------------------------------------------------------------------


def test_a_release_comes_back_and_is_found_by_every_reference(registry: Registry) -> None:
    with_adapter = release().model_copy(update={"adapter": AdapterRef(name="shop", version=1, digest="0" * 64)})
    one = registry.create_release("support", with_adapter)
    two = registry.create_release("support", release(top_k=5))
    assert (one.ref, one.release, one.aliases) == ("support@1", with_adapter, ())
    assert one.digest == with_adapter.digest
    assert registry.create_release("support", with_adapter) == one
    assert registry.release("support") == two  # The newest, until prod stands somewhere.
    assert registry.promote("support", "1").aliases == ("prod",)
    assert registry.release("support").digest == one.digest
    for ref in ("support@prod", "support@1", f"support@{one.digest[:8]}"):
        assert registry.release(ref).digest == one.digest
    assert [(r.ref, r.aliases) for r in registry.releases()] == [("support@1", ("prod",)), ("support@2", ())]
    with pytest.raises(ModelNotFound, match=r"no 'support@canary'; versions: 1 .*; aliases: prod"):
        registry.release("support@canary")
    with pytest.raises(ModelNotFound, match="did you mean support"):
        registry.release("suport")


def test_rollback_goes_back_one_step_each_time(registry: Registry) -> None:
    digests = [registry.create_release("support", release(top_k=k)).digest for k in (1, 2, 3)]
    with pytest.raises(BadInput, match="support@prod is not set"):
        registry.rollback("support")
    for ref in ("1", "support@2", digests[2][:10]):
        registry.promote("support", ref)
    registry.promote("support", "support@prod")  # Standing still is not a step.
    assert registry.rollback("support").digest == digests[1]
    assert registry.rollback("support").digest == digests[0]
    with pytest.raises(BadInput, match=f"has only ever stood on {digests[0][:12]}.*promote"):
        registry.rollback("support")
    registry.promote("support", "support")
    assert registry.release("support").digest == digests[2]
    assert registry.rollback("support").digest == digests[0]


def test_aliases_move_apart(registry: Registry) -> None:
    one, two = (registry.create_release("support", release(top_k=k)) for k in (1, 2))
    registry.promote("support", "1")
    registry.promote("support", "2", "canary")
    assert registry.aliases("support") == {"prod": one.digest, "canary": two.digest}
    registry.promote("support", "canary")
    assert registry.release("support@2").aliases == ("canary", "prod")
    assert registry.rollback("support").digest == one.digest
    assert registry.aliases("support")["canary"] == two.digest


@pytest.mark.parametrize("alias", ["3", "facade", "../prod", "Prod", ""])
def test_an_alias_that_could_be_a_version_or_a_path_is_refused(registry: Registry, alias: str) -> None:
    registry.create_release("support", release())
    with pytest.raises(BadInput):
        registry.promote("support", "1", alias)
    assert registry.aliases("support") == {}


def test_promoting_what_is_not_there_moves_nothing(registry: Registry) -> None:
    registry.create_release("support", release())
    registry.create_release("other", release())
    with pytest.raises(ModelNotFound):
        registry.promote("support", "9")
    with pytest.raises(BadInput, match="not a version of support"):
        registry.promote("support", "other@1")
    assert registry.aliases("support") == {}


def test_a_changed_release_is_noticed(registry: Registry) -> None:
    made = registry.create_release("support", release())
    document = json.loads(registry.storage.read(f"objects/releases/{made.digest}/manifest.json"))
    document["release"]["retrieval"]["top_k"] = 9
    registry.storage.write(f"objects/releases/{made.digest}/manifest.json", json.dumps(document).encode())
    with pytest.raises(Mismatch, match=r"release support@1 .* was changed"):
        Registry(registry.storage).release("support")


# -- models ------------------------------------------------------------------------------------------------------

MODEL_CARD = ModelCard(base=BASE, method="full", dataset=DatasetRef(digest="d", rows=2))


def model(directory: Path, seed: int = 0) -> Path:
    """A model in two shards, with a tokenizer, and things that are no part of it."""
    directory.mkdir(parents=True, exist_ok=True)
    shards = {"w0": "model-00001-of-00002.safetensors", "w1": "model-00002-of-00002.safetensors"}
    for name, file in shards.items():
        head = json.dumps({name: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
        (directory / file).write_bytes(struct.pack("<Q", len(head)) + head + struct.pack("<2f", seed, seed))
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    (directory / "config.json").write_text("{}")
    (directory / "tokenizer.json").write_text("{}")
    (directory / "1_Pooling").mkdir(exist_ok=True)
    (directory / "1_Pooling" / "config.json").write_text("{}")
    (directory / "optimizer.pt").write_bytes(b"pickle")
    (directory / ".complete.json").write_text("{}")
    return directory


MODEL_FILES = [
    "1_Pooling/config.json",
    "config.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
]


def visible(directory: Path) -> list[str]:
    names = (file.relative_to(directory).as_posix() for file in directory.rglob("*") if file.is_file())
    return sorted(name for name in names if not name.startswith("."))


def test_a_model_comes_back_whole_and_without_pickles(registry: Registry, tmp_path: Path) -> None:
    source = model(tmp_path / "m")
    first = registry.publish_model("shop", source, MODEL_CARD)
    assert (first.ref, first.card) == ("shop@1", MODEL_CARD)
    fetched = registry.fetch_model(first.digest, tmp_path / "cache")
    assert visible(fetched) == MODEL_FILES
    assert all((fetched / name).read_bytes() == (source / name).read_bytes() for name in MODEL_FILES)
    pulled = registry.pull_model(first.digest, tmp_path / "here")
    assert (pulled, visible(pulled)) == (tmp_path / "here", MODEL_FILES)

    assert registry.publish_model("shop", source, MODEL_CARD.model_copy(update={"run": "again"})) == first
    second = registry.publish_model("shop", model(tmp_path / "n", seed=1), MODEL_CARD)
    assert [version.ref for version in registry.models()] == ["shop@1", "shop@2"]
    assert registry.model("shop") == second
    assert registry.model(f"shop@{first.digest[:8]}") == first
    assert registry.adapters() == []
    with pytest.raises(ModelNotFound, match=r"no model 'shpo' .*did you mean shop"):
        registry.model("shpo")


@pytest.mark.parametrize("lost", ["config.json", "tokenizer.json", "model-00002-of-00002.safetensors"])
def test_half_a_model_is_not_published(registry: Registry, tmp_path: Path, lost: str) -> None:
    directory = model(tmp_path / "m")
    (directory / lost).unlink()
    with pytest.raises(NotFound, match=f"not a model directory: it has no {re.escape(lost)}"):
        registry.publish_model("shop", directory, MODEL_CARD)
    cut = model(tmp_path / "cut") / "model-00001-of-00002.safetensors"
    cut.write_bytes(cut.read_bytes()[:-1])
    with pytest.raises(BadInput, match="copy it again"):
        registry.publish_model("shop", cut.parent, MODEL_CARD)
    assert registry.models() == []


def test_a_model_that_was_changed_in_storage_is_not_delivered(registry: Registry, tmp_path: Path) -> None:
    made = registry.publish_model("shop", model(tmp_path / "m"), MODEL_CARD)
    registry.storage.write(f"objects/models/{made.digest}/config.json", b"{ }")
    with pytest.raises(Mismatch, match=r"config\.json of model .{12} .* is damaged; publish the model again"):
        registry.fetch_model(made.digest, tmp_path / "cache")
    assert not (tmp_path / "cache" / made.digest).exists()


@pytest.mark.parametrize("name", ["../x.json", "/x.json", "a/../../x.json", "pytorch_model.bin", "code.py"])
def test_a_manifest_cannot_name_files_elsewhere_or_code(registry: Registry, tmp_path: Path, name: str) -> None:
    manifest = {"files": {name: "0" * 64}, "card": MODEL_CARD.model_dump(mode="json")}
    content = content_digest(manifest)
    registry.storage.write(f"objects/models/{content}/manifest.json", json.dumps(manifest).encode())
    with pytest.raises(Mismatch, match=r"the manifest of model .* was changed"):
        registry.fetch_model(content, tmp_path / "cache")


# -- knowledge ---------------------------------------------------------------------------------------------------


def test_versions_of_knowledge_are_counted_from_one(registry: Registry) -> None:
    assert (registry.knowledge_head("docs"), registry.knowledge_latest("docs")) == (0, None)
    assert [registry.knowledge_append("docs", trade.knowledge_entry(added=n)) for n in (5, 5)] == [1, 2]
    assert (registry.knowledge_head("docs"), registry.knowledge_next("docs")) == (2, 3)
    versions = registry.knowledge_versions("docs")
    assert [(v.number, v.reads, v.added) for v in versions] == [(1, 1, 5), (2, 2, 5)]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", versions[0].created)
    assert registry.knowledge_version("docs", 1) == versions[0]
    with pytest.raises(NotFound, match="has no version 7"):
        registry.knowledge_version("docs", 7)


def test_a_dropped_knowledge_is_gone_and_its_numbers_are_not_used_again(registry: Registry) -> None:
    registry.knowledge_append("docs", trade.knowledge_entry())
    registry.knowledge_append("docs", trade.knowledge_entry(kind="drop"))
    assert (registry.knowledge_head("docs"), registry.knowledge_versions("docs")) == (0, [])
    assert registry.knowledge_names() == []
    assert registry.knowledge_append("docs", trade.knowledge_entry()) == 3
    assert [version.number for version in registry.knowledge_versions("docs")] == [3]


def test_an_answer_lost_on_the_way_does_not_append_twice(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    create = registry.storage.create
    monkeypatch.setattr(registry.storage, "create", lambda path, data: create(path, data) and create(path, data))
    assert [registry.knowledge_append("docs", trade.knowledge_entry()) for _ in range(2)] == [1, 2]
    assert registry.knowledge_head("docs") == 2


def test_a_twin_that_came_between_looking_and_writing_is_noticed(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = registry.log("twins")
    assert log.append({"digest": "a"}, unique="digest") == 1
    monkeypatch.setattr(log, "entries", list)  # What it saw before the other wrote.
    assert log.append({"digest": "a"}, unique="digest") == 1
    assert log.append({"digest": "b"}, unique="digest") == 2
    assert log.head() == 2


# -- several processes, and processes that die -------------------------------------------------------------------


def test_racing_appenders_lose_nothing_and_leave_no_gap(registry: Registry) -> None:
    body = "print(json.dumps([registry.knowledge_append('docs', {'by': arguments[0], 'n': n}) for n in range(8)]))"
    numbers = [json.loads(out) for out in race([start(registry.storage, body, str(k)) for k in range(3)])]
    assert sorted(n for mine in numbers for n in mine) == list(range(1, 25))
    entries = [entry.data for entry in registry.log("knowledge/docs").entries()]
    for by, mine in enumerate(numbers):
        assert mine == sorted(mine)
        assert [(entries[n - 1]["by"], entries[n - 1]["n"]) for n in mine] == [(str(by), n) for n in range(8)]


def test_racing_publishers_of_the_same_content_make_one_version(registry: Registry, tmp_path: Path) -> None:
    body = (
        "print(registry.publish_adapter('shop', Path(arguments[0]), AdapterCard.model_validate_json(arguments[1])).ref)"
    )
    same = [start(registry.storage, body, str(adapter(tmp_path / "same")), CARD.model_dump_json()) for _ in range(2)]
    other = start(registry.storage, body, str(adapter(tmp_path / "other", seed=1)), CARD.model_dump_json())
    *refs, different = race([*same, other])
    assert len(set(refs)) == 1
    assert {refs[0], different} == {"shop@1\n", "shop@2\n"}
    versions = registry.adapters()
    assert len({version.digest for version in versions}) == 2
    assert all(registry.fetch_adapter(version.digest, tmp_path / "cache").is_dir() for version in versions)


@pytest.mark.parametrize("moment", ["while a file is copied", "before the manifest", "before the version"])
def test_a_publisher_killed_half_way_leaves_nothing_to_see(registry: Registry, tmp_path: Path, moment: str) -> None:
    storage = registry.storage
    if moment == "while a file is copied" and not storage.local:
        pytest.skip("one PUT is all or nothing on the server's side")
    body = (
        "def die(*arguments, **options): os.kill(os.getpid(), signal.SIGKILL)\n"
        "def half(source, target): Path(target).write_bytes(Path(source).read_bytes()[:20]); die()\n"
        "moment, directory, card = arguments\n"
        "if moment == 'while a file is copied': cluster.storage.shutil.copyfile = half\n"
        "elif moment == 'before the manifest': storage.create = die\n"
        "else: registry.log = die\n"
        "registry.publish_adapter('shop', Path(directory), AdapterCard.model_validate_json(card))"
    )
    with start(storage, body, moment, str(adapter(tmp_path / "a")), CARD.model_dump_json()) as process:
        process.communicate("go\n", timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert registry.adapters() == []
    with pytest.raises(ModelNotFound, match="none yet"):
        registry.adapter("shop")

    published = registry.publish_adapter("shop", adapter(tmp_path / "a"), CARD)
    assert published.version == 1
    fetched = registry.fetch_adapter(published.digest, tmp_path / "cache")
    name = "adapter_model.safetensors"
    assert (fetched / name).read_bytes() == (tmp_path / "a" / name).read_bytes()


def test_a_name_that_was_resolved_costs_listings_only(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry(storage)
    registry.create_release("desk", release())
    registry.promote("desk", "1")
    registry.release("desk")
    monkeypatch.setattr(Storage, "read", lambda self, path: pytest.fail(f"{path} was read again"))
    assert registry.release("desk").aliases == ("prod",)
