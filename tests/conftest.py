"""Marks by folder, and what every test may lean on: a configuration in a directory of its own, a tiny model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.config import Config, ModelConfig, load
from cluster.models import load_tokenizer, resolve

FOLDER_MARKS = ("ray", "e2e", "gpu")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        folder = Path(item.path).parent.name
        if folder in FOLDER_MARKS:
            item.add_marker(getattr(pytest.mark, folder))


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[..., Config]:
    """``make_config("training.epochs=1", …)``: a configuration whose every path lies under ``tmp_path``."""

    def make(*overrides: str) -> Config:
        own = [
            f"storage.url={tmp_path}/store",
            f"store.data_dir={tmp_path}/milvus",
            f"state_dir={tmp_path}/run",
            "base.source=tiny:llama",
            "base.dtype=float32",
        ]
        return load(None, [*own, *overrides])

    return make


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a random llama with a byte-level tokenizer (one token a byte) and a ChatML template."""
    return resolve(ModelConfig(source="tiny:llama"), tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def tokenizer(tiny_llama: Path) -> Any:
    """The tokenizer of :func:`tiny_llama`."""
    return load_tokenizer(tiny_llama)
