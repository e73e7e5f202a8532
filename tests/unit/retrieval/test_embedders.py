"""Which model a version gets: real sentence-transformers models of a few thousand weights, from directories."""

from __future__ import annotations

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cluster.config import EmbedderConfig
from cluster.errors import Mismatch, NotFound, Unavailable
from cluster.knowledge import EmbedderState
from retrieval import embedders as module
from retrieval.embed import Embedder
from retrieval.embedders import RESIDENT, Embedders
from tests.knowledge import tiny_embedder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[EmbedderState]:
    directory = tmp_path_factory.mktemp("models")
    made = []
    for number, dimension in enumerate((16, 24, 32)):
        config = EmbedderConfig(source=str(tiny_embedder(directory / str(number), dimension, number)), max_tokens=32)
        loaded = Embedder(Path(config.source), config)
        made.append(
            EmbedderState(
                source=config.source, max_tokens=32, fingerprint=loaded.fingerprint, dimension=loaded.dimension
            )
        )
    return made


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Directories that models were loaded from, in order."""
    found: list[str] = []

    class Counted(Embedder):
        def __init__(self, directory: Path, config: EmbedderConfig, *rest: Any) -> None:
            found.append(str(directory))
            super().__init__(directory, config, *rest)

    monkeypatch.setattr(module, "Embedder", Counted)
    return found


def test_each_version_gets_its_model_and_two_stay(
    models: list[EmbedderState], loads: list[str], tmp_path: Path
) -> None:
    embedders = Embedders(EmbedderConfig(source=models[0].source), str(tmp_path))
    assert [embedders(state).dimension for state in (models[0], models[1], models[0])] == [16, 24, 16]
    assert len(loads) == RESIDENT == 2
    assert embedders(models[2]).dimension == 32
    assert embedders(models[0]).dimension == 16 and len(loads) == 3, "the one asked for last stays"
    embedders(models[1])
    assert len(loads) == 4


def test_of_many_threads_one_loads(models: list[EmbedderState], loads: list[str], tmp_path: Path) -> None:
    embedders = Embedders(EmbedderConfig(source=models[0].source), str(tmp_path))
    start = threading.Barrier(8)

    def ask(_: int) -> int:
        start.wait()
        return id(embedders(models[0]))

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(ask, range(8)))) == 1
    assert len(loads) == 1


def test_a_model_that_is_coming_is_loaded_before_it_is_asked_for(
    models: list[EmbedderState], loads: list[str], tmp_path: Path
) -> None:
    embedders = Embedders(EmbedderConfig(source=models[0].source), str(tmp_path))
    embedders.prepare(models[1])
    assert embedders(models[1]).dimension == 24
    embedders.prepare(models[1])
    assert loads == [models[1].source]
    embedders.prepare(models[2].model_copy(update={"source": "./nowhere"}))
    assert embedders(models[0]).dimension == 16


def test_a_watch_loads_what_a_build_names_and_outlives_a_silent_registry(
    models: list[EmbedderState], loads: list[str], tmp_path: Path
) -> None:
    answers = iter([None, Unavailable("the storage does not answer"), models[1]])
    loaded = threading.Event()

    def coming() -> EmbedderState | None:
        answer = next(answers, models[1])
        if isinstance(answer, Unavailable):
            raise answer
        if loads:
            loaded.set()
        return answer

    embedders = Embedders(EmbedderConfig(source=models[0].source), str(tmp_path))
    ended = embedders.watch(coming, every_s=0.01)
    assert loaded.wait(60)
    ended.set()
    assert embedders(models[1]).dimension == 24 and loads == [models[1].source]


def test_another_model_under_the_same_name_is_refused_and_may_come_back(
    models: list[EmbedderState], tmp_path: Path
) -> None:
    here = tmp_path / "here"
    shutil.copytree(models[1].source, here)
    state = models[0].model_copy(update={"source": str(here)})
    embedders = Embedders(EmbedderConfig(source=models[1].source), str(tmp_path))
    with pytest.raises(Mismatch, match=r"is another model \(24 dimensions\) than .*reindex"):
        embedders(state)
    shutil.rmtree(here)
    shutil.copytree(models[0].source, here)
    assert embedders(state).dimension == 16, "a failure is not remembered"


def test_the_configured_copy_serves_where_the_named_one_is_not(models: list[EmbedderState], tmp_path: Path) -> None:
    moved = models[0].model_copy(update={"source": "./moved-away"})
    assert Embedders(EmbedderConfig(source=models[0].source), str(tmp_path))(moved).dimension == 16
    with pytest.raises(NotFound, match="moved-away"):
        Embedders(EmbedderConfig(source=models[1].source), str(tmp_path))(moved)


def test_models_that_are_loaded_at_once_leave_transformers_as_it_was(
    models: list[EmbedderState], tmp_path: Path
) -> None:
    from transformers import PreTrainedModel

    before = PreTrainedModel.tie_weights
    for _ in range(4):
        embedders = Embedders(EmbedderConfig(source=models[0].source), str(tmp_path))
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(embedders, models[:2]))
    assert PreTrainedModel.tie_weights is before
