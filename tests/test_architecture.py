"""The house rules as data, checked on the syntax tree: who may import whom, and the one home of each heavy library."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = {
    "cluster": set(),
    "retrieval": {"cluster"},
    "training": {"cluster", "retrieval"},
    "serving": {"cluster", "retrieval"},
    "evaluation": {"cluster", "retrieval", "training", "serving"},
    "metier": {"cluster", "retrieval", "training", "serving", "evaluation"},
    "k8s": {"cluster"},
}
"""Room -> the rooms it may import. Training and serving never see each other."""

HOMES = {
    "ray": {
        "cluster/runtime.py",
        "cluster/jobs.py",
        "retrieval/ingest_ray.py",
        "training/launch.py",
        "training/callbacks.py",
        "training/group.py",
        "training/sft.py",
        "serving/app.py",
        "serving/router.py",
        "serving/up.py",
    },
    "pymilvus": {"retrieval/store.py", "retrieval/calls.py", "retrieval/collection.py"},
    "milvus_lite": {"retrieval/milvus_child.py"},
    "deepspeed": {"training/base.py", "training/resize.py", "training/sft.py"},
    "trl": {"training/arguments.py", "training/sft.py", "training/trainer.py"},
    "peft": {"training/base.py", "training/merge.py"},
    "datasets": {"training/sft.py", "training/data/hub.py"},
    "pyarrow": {"cluster/storage.py", "training/data/read.py", "retrieval/read/rows.py"},
    "watchfiles": {"retrieval/watch.py"},
    "pypdf": {"retrieval/read/pdf.py"},
    "docx": {"retrieval/read/docx.py"},
    "selectolax": {"retrieval/read/html.py"},
    "charset_normalizer": {"retrieval/read/decode.py"},
    "matplotlib": {"training/plot.py", "training/data/lengths.py", "evaluation/retrieval_plot.py"},
    "datasketch": {"retrieval/duplicates.py"},
    "ftfy": {"training/data/text_quality.py"},
    "py3langid": {"training/data/language.py"},
    "phonenumbers": {"training/data/sensitive.py"},
    "sentence_transformers": {"retrieval/embed.py", "retrieval/rerank.py"},
    "ir_measures": {"evaluation/retrieval.py"},
    "huggingface_hub": {"cluster/models.py", "cluster/hub.py"},
    "fsspec": {"cluster/storage.py", "retrieval/read/places.py"},
    "fastapi": {"serving/app.py", "serving/http.py", "serving/knowledge/routes.py"},
    "vllm": {"serving/engine/vllm.py"},
    "llguidance": {"serving/engine/native/grammar.py"},
    "typer": {"metier/*"},
    "rich": {"metier/console.py"},
}
"""Library -> the only files that may import it."""

LIGHT = {
    "torch",
    "ray",
    "transformers",
    "peft",
    "trl",
    "deepspeed",
    "datasets",
    "pymilvus",
    "sentence_transformers",
    "fastapi",
    "numpy",
    "pyarrow",
    "matplotlib",
}
"""Never imported at the top of a file that the command line loads to parse its arguments."""


def sources() -> list[Path]:
    return sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py") if "chart" not in path.parts)


def imports(path: Path) -> Iterator[tuple[str, int, bool]]:
    """(module, line, at top level) of every import in a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = set(map(id, tree.body))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno, id(node) in top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}:{node.lineno}: relative import; name the room"
            yield node.module, node.lineno, id(node) in top


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_room_imports_only_rooms_below_it(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0]
    for module, line, _ in imports(path):
        target = module.split(".")[0]
        if target in ROOMS and target != room:
            assert target in ROOMS[room], f"{path}:{line}: {room} may not import {target}"


@pytest.mark.parametrize("library", sorted(HOMES))
def test_each_heavy_library_has_one_home(library: str) -> None:
    users = {
        str(path.relative_to(ROOT))
        for path in sources()
        for module, _, _ in imports(path)
        if module.split(".")[0] == library
    }
    strangers = {
        user for user in users if user not in HOMES[library] and f"{user.split('/')[0]}/*" not in HOMES[library]
    }
    assert not strangers, f"{library} is imported outside its home"
    gone = {home for home in HOMES[library] if not home.endswith("/*") and home not in users}
    assert not gone, f"{library}: these homes no longer use it"


@pytest.mark.parametrize("path", sorted((ROOT / "metier").glob("*.py")), ids=lambda path: path.name)
def test_verbs_import_heavy_things_in_their_bodies(path: Path) -> None:
    for module, line, top in imports(path):
        if top:
            name = module.split(".")[0]
            assert name not in LIGHT, f"{path}:{line}: import {module} inside the function that needs it"
            assert name not in {"retrieval", "training", "serving", "evaluation"}, f"{path}:{line}: likewise"


def test_nothing_pickles_or_evaluates() -> None:
    for path in sources():
        for module, line, _ in imports(path):
            assert module.split(".")[0] not in {"pickle", "cloudpickle", "marshal", "shelve"}, f"{path}:{line}"
