"""Loading the configuration: precedence, messages that point at the line, secrets, the JSON a worker gets."""

from pathlib import Path

import pytest

from cluster.config import MILVUS_TOKEN_VARIABLE, Config, fields, from_json, load, public_dict, to_json
from cluster.errors import ConfigError


def write(directory: Path, text: str) -> Path:
    file = directory / "config.yaml"
    file.write_text(text)
    return file


def test_an_override_beats_the_file_and_the_file_beats_the_default(tmp_path: Path) -> None:
    file = write(tmp_path, "training:\n  epochs: 3\n  workers: 4\n")
    config = load(file, ["training.epochs=5"])
    assert (config.training.epochs, config.training.workers, config.training.seed) == (5.0, 4, 17)


def test_an_override_is_read_as_yaml() -> None:
    config = load(
        None, ["training.lora.target_modules=[q_proj, v_proj]", "data.train=[/a.jsonl]", "training.max_steps=null"]
    )
    assert config.training.lora.target_modules == ("q_proj", "v_proj")
    assert config.data.train == ("/a.jsonl",)
    assert config.training.max_steps is None


def test_an_unknown_key_is_refused_with_its_line_and_the_near_name(tmp_path: Path) -> None:
    file = write(tmp_path, "name: shop\ntraining:\n  seed: 1\n  epoch: 3\n")
    with pytest.raises(ConfigError, match=r"config\.yaml:4: training\.epoch is not a setting; did you mean epochs\?"):
        load(file)


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    file = write(tmp_path, "training:\n  workers: 0\nserving:\n  port: http\n")
    with pytest.raises(ConfigError) as caught:
        load(file)
    first, second = str(caught.value).splitlines()
    assert first.startswith(f"{file}:2: training.workers:")
    assert first.endswith("not 0")
    assert second.startswith(f"{file}:4: serving.port:")
    assert caught.value.param == "training.workers"


def test_settings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"chunk_tokens .* is longer than embedder\.max_tokens"):
        load(None, ["knowledge.chunk_tokens=300"])
    with pytest.raises(ConfigError, match="leave no room"):
        load(None, ["prompt.passage_tokens=2000"])


@pytest.mark.parametrize("text", ["a: [1", "- a\n- b\n"])
def test_a_file_that_is_not_a_mapping_is_one_sentence(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"config\.yaml") as caught:
        load(write(tmp_path, text))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("override", ["training.epochs", "=3"])
def test_an_override_without_key_or_value_is_refused(override: str) -> None:
    with pytest.raises(ConfigError, match=r"key\.path=value"):
        load(None, [override])


def test_a_missing_file_names_the_option() -> None:
    with pytest.raises(ConfigError, match="no such file; name one with --config"):
        load("/nowhere/config.yaml")


def test_paths_are_absolute_after_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = load(None, ["data.train=[rows.jsonl]", "knowledge.documents=docs", "storage.url=runs"])
    assert config.data.train == (str(tmp_path / "rows.jsonl"),)
    assert config.knowledge.documents == str(tmp_path / "docs")
    assert config.storage.url == str(tmp_path / "runs")
    assert load(None, ["storage.url=s3://bucket/x"]).storage.url == "s3://bucket/x"


def test_the_token_comes_from_the_environment_only(tmp_path: Path) -> None:
    config = load(None, environ={MILVUS_TOKEN_VARIABLE: "root:Milvus"})
    assert config.store.token is not None
    assert config.store.token.get_secret_value() == "root:Milvus"
    with pytest.raises(ConfigError, match=MILVUS_TOKEN_VARIABLE):
        load(write(tmp_path, "store:\n  token: root:Milvus\n"), environ={})


def test_a_worker_gets_everything_and_a_reader_no_secret() -> None:
    config = load(None, ["name=shop", "base.source=tiny:llama"], environ={MILVUS_TOKEN_VARIABLE: "root:Milvus"})
    assert from_json(to_json(config)) == config
    assert "root:Milvus" not in str(public_dict(config)) + repr(config) + config.model_dump_json()
    assert public_dict(config)["store"]["token"] == "**********"


def test_fields_lists_sections_before_what_is_in_them() -> None:
    paths = list(dict(fields()))
    assert paths.index("training") < paths.index("training.lora") < paths.index("training.lora.rank")
    assert {path.partition(".")[0] for path in paths} == set(Config.model_fields)
