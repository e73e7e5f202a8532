"""``metier adapters`` and ``metier models`` on a registry in a directory, in process; hubs are in tests/contract."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.config import Config
from cluster.models import base_ref, resolve
from cluster.release import DatasetRef, ModelCard
from metier.__main__ import main
from tests import trade

Run = Callable[..., int]
SECRET_DOCUMENT = "salaries-2026"


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return trade.configure(tmp_path)


@pytest.fixture
def metier(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """``metier("adapters", "list")``: exit code of that command line."""

    def run(*argv: object) -> int:
        monkeypatch.setattr("sys.argv", ["metier", *map(str, argv), "-c", str(tmp_path / "metier.yaml")])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0)

    return run


@pytest.fixture
def published(config: Config, tmp_path: Path) -> Any:
    """The adapter ``lamps@1``, as training would publish it."""
    return trade.publish(
        config,
        trade.write_adapter(config, tmp_path / "trained"),
        "lamps",
        dataset=DatasetRef(digest="d" * 64, rows=16, documents=[SECRET_DOCUMENT]),
        knowledge={"name": "lamps", "version": 1},
        training={"steps": 12, "loss_first": 3.5, "loss_last": 1.25},
        metrics={"validation": {"before": 3.25, "after": 1.5, "best_step": 10}},
    )


def test_what_is_pushed_is_pulled_as_the_same_adapter(
    metier: Run, published: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "pushed"
    assert metier("adapters", "push", "lamps", out) == 0
    assert sorted(file.name for file in out.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "metier-card.json",
    ]
    assert f"adapter lamps@1 ({published.digest[:12]}) is at {out}" in capsys.readouterr().err.replace("\n", "")
    assert metier("adapters", "pull", out, "--name", "copy", "--json") == 0
    pulled = json.loads(capsys.readouterr().out)
    assert (pulled["name"], pulled["version"], pulled["digest"]) == ("copy", 1, published.digest)
    assert pulled["card"] == published.card.model_dump(mode="json")


def test_the_model_card_says_how_it_was_made_and_names_no_document(metier: Run, published: Any, tmp_path: Path) -> None:
    assert metier("adapters", "push", "lamps", tmp_path / "pushed") == 0
    text = (tmp_path / "pushed" / "README.md").read_text()
    assert text.startswith('---\nlibrary_name: "peft"\n')
    for part in (
        "# lamps",
        "LoRA for `tiny:llama`; digest `",
        "trained with metier.",
        "| objective | answers (supervised fine-tuning) |",
        "| method | lora, plain, rank 4, alpha 16 |",
        "| rows | 16 (digest `dddddddddddd`) |",
        "| loss, last | 1.25 |",
        "| validation.after | 1.5 |",
        "--max-lora-rank 8 --lora-modules lamps=PATH",
        "## Licence",
    ):
        assert part in text, part
    assert SECRET_DOCUMENT not in text
    assert "base_model" not in text, "a base that is on no hub is not linked"


def test_any_url_that_fsspec_opens_will_do(metier: Run, published: Any) -> None:
    assert metier("adapters", "push", "lamps@1", "memory://shelf/lamps") == 0
    assert metier("adapters", "pull", "memory://shelf/lamps", "--name", "copy") == 0


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("adapter_model.safetensors", "adapter_model.safetensors is not the file that metier-card.json speaks of"),
        ("adapter_config.json", "adapter_config.json is not the file that metier-card.json speaks of"),
        ("metier-card.json", "metier-card.json was changed after it was written"),
    ],
)
def test_what_was_changed_on_the_way_is_refused(
    metier: Run, published: Any, tmp_path: Path, name: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert metier("adapters", "push", "lamps", tmp_path / "pushed") == 0
    file = tmp_path / "pushed" / name
    data = file.read_bytes()
    file.write_bytes(data.replace(b'"rank": 4', b'"rank": 5') if name == "metier-card.json" else data[:-1] + b" ")
    assert metier("adapters", "pull", tmp_path / "pushed", "--name", "copy") == 4
    assert said in capsys.readouterr().err
    assert metier("adapters", "show", "copy") == 3


def test_a_card_without_what_a_card_has_is_refused(
    metier: Run, published: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert metier("adapters", "push", "lamps", tmp_path / "pushed") == 0
    (tmp_path / "pushed" / "metier-card.json").write_text("[]")
    assert metier("adapters", "pull", tmp_path / "pushed", "--name", "copy") == 2
    assert "metier-card.json is not a card of metier" in capsys.readouterr().err


def test_without_a_card_an_adapter_is_taken_in_as_by_add(
    metier: Run, config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = trade.write_adapter(config, tmp_path / "foreign")
    assert metier("adapters", "pull", directory, "--name", "foreign", "--json") == 0
    pulled = json.loads(capsys.readouterr().out)
    assert (pulled["card"]["dataset"], pulled["card"]["prompt"], pulled["card"]["rank"]) == (None, None, 4)
    assert metier("adapters", "add", directory, "--name", "foreign", "--json") == 0
    assert json.loads(capsys.readouterr().out)["version"] == 1
    (directory / "adapter_model.safetensors").unlink()
    assert metier("adapters", "pull", directory, "--name", "foreign") == 3
    assert "is not a PEFT adapter: it has no adapter_model.safetensors" in capsys.readouterr().err


def test_a_readme_that_no_push_wrote_stays(
    metier: Run, published: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "README.md").write_text("mine")
    assert metier("adapters", "push", "lamps", tmp_path / "project") == 2
    assert "has a README.md that is not of an adapter" in capsys.readouterr().err
    assert [file.read_text() for file in (tmp_path / "project").iterdir()] == ["mine"]
    assert metier("adapters", "push", "lamps", tmp_path / "again") == 0
    assert metier("adapters", "push", "lamps", tmp_path / "again") == 0


# -- merging


def test_merging_writes_a_model_that_can_be_the_base(
    metier: Run, config: Config, published: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    out = tmp_path / "merged"
    assert metier("adapters", "merge", "lamps", "--output", out, "--json") == 0
    assert json.loads(capsys.readouterr().out)["dtype"] == "float32"
    ids = torch.tensor([[5, 80, 99, 7, 200]])
    base = AutoModelForCausalLM.from_pretrained(resolve(config.base, config.models_cache), dtype=torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    with torch.inference_mode():
        alone = base(ids).logits.clone()
        wanted = PeftModel.from_pretrained(base, tmp_path / "trained")(ids).logits
        got = merged(ids).logits
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)
    assert (wanted - alone).abs().max() > 0.1

    assert metier("adapters", "merge", "lamps", "--output", out) == 2
    assert "already holds something" in capsys.readouterr().err
    assert metier("models", "fetch", "--set", f"base.source={out}") == 0


def test_another_base_is_refused_before_anything_is_written(
    metier: Run, published: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert metier("adapters", "merge", "lamps", "-o", tmp_path / "out", "--set", "base.source=tiny:qwen2") == 4
    err = capsys.readouterr().err
    assert "base.source is tiny:llama in the adapter, tiny:qwen2 here" in err
    assert "base.architecture" in err
    assert not (tmp_path / "out").exists()
    assert metier("adapters", "merge", "lamps", "-o", tmp_path / "out", "--set", "prompt.decline=No.") == 0


# -- whole models


def test_published_models_are_listed_and_pulled(
    metier: Run, config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = resolve(config.base, config.models_cache)
    card = ModelCard(base=base_ref(config.base, directory), method="full")
    model = trade.registry(config).publish_model("lamps", directory, card)
    assert metier("models", "list", "--published") == 0
    assert "lamps@1" in (shown := capsys.readouterr().out) and "full" in shown
    assert metier("models", "pull", "lamps", tmp_path / "here", "--json") == 0
    assert json.loads(capsys.readouterr().out)["digest"] == model.digest
    assert base_ref(config.base, tmp_path / "here") == card.base
    assert metier("models", "pull", "lamps", tmp_path / "here") == 2
    assert "already holds something; name a directory that is not there" in capsys.readouterr().err
