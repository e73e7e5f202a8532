"""Adapters to and from other places: a directory, a URL that fsspec opens, ``hub:org/name``.

What is pushed is a plain PEFT adapter with two more files: :data:`CARD_FILE`, which is written last and by which
:func:`pull` checks every byte, and a ``README.md``. What is pulled without a card is an adapter from elsewhere.

Not covered: who wrote a card. It proves that files and card belong together, not where they come from.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster import hub
from cluster.adapter_files import PEFT_FILES
from cluster.config import HUB
from cluster.errors import BadInput, MetierError, Mismatch, NotFound
from cluster.readme import readme
from cluster.registry import AdapterVersion, Registry, content_digest, file_digest, load_card
from cluster.release import AdapterCard, short
from cluster.storage import Storage
from cluster.vllm_files import vllm_max_lora_rank

CARD_FILE = "metier-card.json"
README_FILE = "README.md"
PUSHED = (*PEFT_FILES, README_FILE, CARD_FILE)
"""In the order they are written."""


def push(registry: Registry, ref: str, destination: str, options: Mapping[str, Any] | None = None) -> AdapterVersion:
    """Copy the adapter `ref` with its card to `destination`; what an earlier push left there is replaced.

    Args:
        options: of the fsspec file system, for a URL.

    Raises:
        BadInput: the destination has a README.md that no push wrote, or no token is set for a hub.
        NotFound, Mismatch, Unavailable: the adapter or the destination.
    """
    version = registry.adapter(ref)
    manifest = registry.adapter_manifest(version.digest)
    with tempfile.TemporaryDirectory(prefix="metier-push-") as scratch:
        files = Path(scratch)
        registry.copy_adapter(version.digest, files)
        card = {"digest": version.digest, "name": version.name, "version": version.version, **manifest}
        (files / CARD_FILE).write_text(json.dumps(card, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        try:
            rank: int | None = vllm_max_lora_rank(files)
        except MetierError:
            rank = None
        (files / README_FILE).write_text(readme(version.name, version.digest, version.card, rank), encoding="utf-8")
        if destination.startswith(HUB):
            hub.upload(destination.removeprefix(HUB), files, PUSHED, f"{version.ref} ({short(version.digest)})")
        else:
            _push_files(Storage(_url(destination), options), files)
    return version


def pull(source: str, out: Path, options: Mapping[str, Any] | None = None) -> AdapterCard | None:
    """Copy the PEFT files at `source` (as in :func:`push`, or ``hub:org/name@revision``) into the empty directory `out`.

    Returns:
        The card that came with them, checked; None if there is none: an adapter from elsewhere.

    Raises:
        NotFound: there is no adapter.
        Mismatch: files and card do not belong together.
        Unavailable: the source does not answer.
    """
    if source.startswith(HUB):
        repo, _, revision = source.removeprefix(HUB).partition("@")
        hub.download(repo, revision or None, (*PEFT_FILES, CARD_FILE), out)
    else:
        storage = Storage(_url(source), options)
        for name in (*PEFT_FILES, CARD_FILE):
            if storage.exists(name):
                storage.download(name, out / name)
    for name in PEFT_FILES:
        if not (out / name).is_file():
            raise NotFound(f"{source} is not a PEFT adapter: it has no {name}")
    return _checked_card(source, out) if (out / CARD_FILE).is_file() else None


def _push_files(storage: Storage, files: Path) -> None:
    if storage.exists(README_FILE) and not storage.exists(CARD_FILE):
        raise BadInput(f"{storage.url} has a {README_FILE} that is not of an adapter; push to a place of its own")
    for name in PUSHED:
        storage.upload(files / name, name)


def _checked_card(source: str, directory: Path) -> AdapterCard:
    try:
        stored = json.loads((directory / CARD_FILE).read_text(encoding="utf-8"))
        said, wanted = stored["digest"], stored["files"]
        content = content_digest(stored)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"{source}: {CARD_FILE} is not a card of metier ({error}); push the adapter again") from error
    if content != said:
        raise Mismatch(f"{source}: {CARD_FILE} was changed after it was written; push the adapter again")
    for name in PEFT_FILES:
        if file_digest(directory / name) != wanted.get(name):
            raise Mismatch(f"{source}: {name} is not the file that {CARD_FILE} speaks of; push the adapter again")
    return load_card(stored["card"], f"the card in {source}")


def _url(place: str) -> str:
    return place if "://" in place else str(Path(place).expanduser().resolve())
