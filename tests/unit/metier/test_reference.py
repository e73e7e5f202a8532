"""docs/configuration.md is what the schema says now."""

from __future__ import annotations

from pathlib import Path

from cluster.config import fields
from metier.reference import markdown

ROOT = Path(__file__).parents[3]


def test_the_page_is_current() -> None:
    page = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")
    assert page == markdown(), "run `make docs`"


def test_every_setting_is_explained() -> None:
    bare = [path for path, info in fields() if not info.description and not hasattr(info.annotation, "model_fields")]
    assert not bare, "write a docstring under these settings in cluster/config.py"
