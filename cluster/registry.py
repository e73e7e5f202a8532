"""What training hands to serving: adapters, whole models, releases with their aliases, and versions of knowledge.

Two primitives carry everything, so that publishers on several machines need neither locks nor compare-and-swap:

- **objects** ``objects/<kind>/<digest>/``: immutable files and ``manifest.json``, which is written last; an object
  without it is not there. Who publishes the same content writes the same bytes to the same place.
- **logs** ``…/000001.json``, ``000002.json``, …: append-only (:class:`Log`), each entry created exclusively. A log
  holds the versions of a name, the moves of an alias, or the versions of a knowledge base.

The digest of an adapter or a model is SHA-256 over its files' SHA-256 and its card without :data:`VOLATILE`: how long
training took, how it went and who made it do not make another adapter, but the base, prompt, documents and groups do.
The digest of a release is that of its JSON (:mod:`cluster.release`).

Not covered: removing what nothing refers to, and who may publish (the storage's own rights decide that).
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import time
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from cluster.adapter_files import PEFT_FILES, check_adapter_files, tensors
from cluster.config import SLUG
from cluster.errors import BadInput, Mismatch, ModelNotFound
from cluster.materialize import is_complete, materialize
from cluster.models import is_model_file, model_files
from cluster.release import AdapterCard, ModelCard, Release, canonical_json, digest, short
from cluster.storage import Storage

M = TypeVar("M", bound=BaseModel)

VOLATILE = {"training", "metrics", "config", "run", "metier", "code"}
"""Fields of a card that do not count for the digest: the same weights from the same rows are the same adapter."""
PREFIX = re.compile(r"[0-9a-f]{6,64}")


@dataclass(frozen=True)
class AdapterVersion:
    """One version of an adapter. The same content under two names has one digest."""

    name: str
    version: int
    digest: str
    card: AdapterCard
    created: str
    """When it was published, ISO 8601 UTC."""

    @property
    def ref(self) -> str:
        return f"{self.name}@{self.version}"


@dataclass(frozen=True)
class ModelVersion:
    """One version of a published model: whole weights with tokenizer and configuration."""

    name: str
    version: int
    digest: str
    card: ModelCard
    created: str
    """When it was published, ISO 8601 UTC."""

    @property
    def ref(self) -> str:
        return f"{self.name}@{self.version}"


@dataclass(frozen=True)
class ReleaseVersion:
    """One version of a release, and the aliases that stand on it now."""

    name: str
    version: int
    digest: str
    release: Release
    created: str
    aliases: tuple[str, ...]

    @property
    def ref(self) -> str:
        return f"{self.name}@{self.version}"


@dataclass(frozen=True)
class Entry:
    """One entry of a :class:`Log`."""

    number: int
    created: str
    data: dict[str, Any]


class Log:
    """An append-only list of JSON objects under a path; numbers start at 1 and have no gaps.

    An entry appears whole, and of several processes that append at once each gets a number of its own: the next one
    is created exclusively, and who comes second tries the one after it.
    """

    def __init__(self, storage: Storage, path: str, known: dict[str, Entry] | None = None) -> None:
        """`known` keeps entries that were read, by file; they never change, so reading a log again costs one listing."""
        self.storage = storage
        self.path = path
        self.known = {} if known is None else known

    def head(self) -> int:
        """The last number; 0 if there is none."""
        return max(
            (int(name[:6]) for name in self.storage.list(self.path) if re.fullmatch(r"\d{6}\.json", name)), default=0
        )

    def entry(self, number: int) -> Entry:
        file = self._file(number)
        if file not in self.known:
            stored = json.loads(self.storage.read(file))
            self.known[file] = Entry(number, stored["created"], stored["data"])
        return self.known[file]

    def entries(self) -> list[Entry]:
        """All entries, oldest first."""
        return [self.entry(number) for number in range(1, self.head() + 1)]

    def append(self, data: dict[str, Any], *, unique: str | None = None) -> int:
        """Append `data`; with `unique`, one of its keys, not if an entry has the same value there already.

        Returns:
            The number of the new entry, or of the one that was there.
        """
        entries = self.entries() if unique else []
        for entry in entries:
            if unique and entry.data[unique] == data[unique]:
                return entry.number
        body = canonical_json({"id": uuid.uuid4().hex, "created": _now(), "data": data})
        number = (len(entries) if unique else self.head()) + 1
        while not self.storage.create(self._file(number), body):
            # Refused, but ours: the store's client lost the first answer and asked again.
            if self.storage.read(self._file(number)) == body:
                break
            if unique and self.entry(number).data[unique] == data[unique]:
                break
            number += 1
        return number

    def _file(self, number: int) -> str:
        return f"{self.path}/{number:06}.json"


class Registry:
    """Adapters, models, releases and knowledge versions in a :class:`Storage`.

    Versions are asked for by a reference: ``name`` (see each method), ``name@3``, ``name@3f9a61`` (at least six digits
    of the digest), for releases also ``name@alias``. A reference that resolves to nothing raises
    :class:`ModelNotFound`, which says what there is; a name that is not a slug :class:`BadInput`.
    """

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self._manifests: dict[str, dict[str, Any]] = {}
        """By path; they never change once written."""
        self._entries: dict[str, Entry] = {}
        """Likewise, of all logs."""

    def log(self, path: str) -> Log:
        """The log at `path`."""
        return Log(self.storage, path, self._entries)

    # -- adapters

    def publish_adapter(self, name: str, directory: Path, card: AdapterCard) -> AdapterVersion:
        """Put the PEFT adapter in `directory` (only its two PEFT files) into the registry as the next version of `name`.

        Publishing the same content under the same name again returns the version that is there, with the card of
        the first time.

        Raises:
            BadInput, NotFound, Mismatch: the files are not a plain LoRA adapter of the card's rank.
        """
        _check_slug(name, "adapter")
        config = check_adapter_files(directory)
        if config["r"] != card.rank:
            raise Mismatch(f"the card says rank {card.rank}, the adapter in {directory} has {config['r']}")
        content = self._put_files("adapters", directory, PEFT_FILES, card)
        log = self.log(f"adapters/{name}")
        return self._adapter(name, log.entry(log.append({"digest": content}, unique="digest")))

    def adapters(self) -> list[AdapterVersion]:
        """All versions of all adapters, by name, oldest first."""
        names = self.storage.list("adapters")
        return [self._adapter(name, entry) for name in names for entry in self.log(f"adapters/{name}").entries()]

    def adapter(self, ref: str) -> AdapterVersion:
        """The adapter `ref` names; a bare name is its newest version."""
        name, selector = _parse_ref(ref, "adapter")
        entries = self._versions("adapters", "adapter", name)
        return self._adapter(name, _select(ref, selector, entries))

    def fetch_adapter(self, digest: str, cache: Path) -> Path:
        """A local directory ``<cache>/<digest>`` with the PEFT files, downloaded and verified the first time.

        Raises:
            NotFound: no such adapter.
            Mismatch: what the storage holds is not what was published.
        """
        _check_digest(digest)
        target = cache / digest
        if is_complete(target):
            return target
        return materialize(target, lambda out, scratch: self._download("adapters", "adapter", digest, out))

    def copy_adapter(self, digest: str, out: Path) -> None:
        """Write the PEFT files into the directory `out`, verified; unlike :meth:`fetch_adapter` nothing is kept to be used again."""
        _check_digest(digest)
        self._download("adapters", "adapter", digest, out)

    def adapter_manifest(self, digest: str) -> dict[str, Any]:
        """What an adapter's digest is made of, as it was published: ``files`` (name -> SHA-256) and ``card``."""
        _check_digest(digest)
        return self._manifest("adapters", digest)

    def _adapter(self, name: str, entry: Entry) -> AdapterVersion:
        content = entry.data["digest"]
        card = load_card(self._manifest("adapters", content)["card"], f"the card of {name}@{entry.number}")
        return AdapterVersion(name, entry.number, content, card, entry.created)

    # -- models

    def publish_model(self, name: str, directory: Path, card: ModelCard) -> ModelVersion:
        """Put the model in `directory` (safetensors, configuration, tokenizer) into the registry as the next version of `name`.

        Raises:
            BadInput, NotFound: the directory is not a whole model.
        """
        _check_slug(name, "model")
        files = model_files(directory)
        for file in files:
            if file.endswith(".safetensors"):
                tensors(directory / file)
        content = self._put_files("models", directory, files, card)
        log = self.log(f"models/{name}")
        return self._model(name, log.entry(log.append({"digest": content}, unique="digest")))

    def models(self) -> list[ModelVersion]:
        """All versions of all published models, by name, oldest first."""
        names = self.storage.list("models")
        return [self._model(name, entry) for name in names for entry in self.log(f"models/{name}").entries()]

    def model(self, ref: str) -> ModelVersion:
        """The published model `ref` names; a bare name is its newest version."""
        name, selector = _parse_ref(ref, "model")
        return self._model(name, _select(ref, selector, self._versions("models", "model", name)))

    def fetch_model(self, digest: str, cache: Path) -> Path:
        """A model directory ``<cache>/<digest>``, downloaded and verified the first time; :meth:`fetch_adapter` says the rest."""
        _check_digest(digest)
        return self.pull_model(digest, cache / digest)

    def pull_model(self, digest: str, directory: Path) -> Path:
        """The same as `directory` itself, which must not hold anything else (:func:`cluster.materialize.materialize`)."""
        _check_digest(digest)
        return materialize(directory, lambda out, scratch: self._download("models", "model", digest, out))

    def _model(self, name: str, entry: Entry) -> ModelVersion:
        content = entry.data["digest"]
        card = _load(ModelCard, self._manifest("models", content)["card"], f"the card of {name}@{entry.number}")
        return ModelVersion(name, entry.number, content, card, entry.created)

    # -- releases

    def create_release(self, name: str, release: Release) -> ReleaseVersion:
        """Keep `release` as the next version of `name`; no alias moves. The same release again is the same version."""
        _check_slug(name, "release")
        self._put_object("releases", release.digest, {"files": {}, "release": release.model_dump(mode="json")})
        log = self.log(f"releases/{name}/versions")
        entry = log.entry(log.append({"digest": release.digest}, unique="digest"))
        return self._release(name, entry, self.aliases(name))

    def releases(self) -> list[ReleaseVersion]:
        """All versions of all releases, by name, oldest first."""
        found = []
        for name in self.storage.list("releases"):
            aliases = self.aliases(name)
            found += [self._release(name, entry, aliases) for entry in self.log(f"releases/{name}/versions").entries()]
        return found

    def release(self, ref: str) -> ReleaseVersion:
        """The release `ref` names; a bare name is alias ``prod`` if it is set, else the newest version."""
        name, selector = _parse_ref(ref, "release")
        entries = self._versions("releases", "release", name)
        aliases = self.aliases(name)
        return self._release(name, _select(ref, aliases.get(selector or "prod", selector), entries, aliases), aliases)

    def promote(self, name: str, ref: str, alias: str = "prod") -> ReleaseVersion:
        """Move `alias` to the version `ref` (``3``, ``canary``, a digest prefix, or the whole ``name@3``; `name` alone is the newest)."""
        if not re.fullmatch(SLUG, alias) or alias.isdigit() or PREFIX.fullmatch(alias):
            raise BadInput(
                f"'{alias}' cannot be an alias; use lower-case letters, such as prod or canary", param="alias"
            )
        if ref == name:
            ref = str(self._versions("releases", "release", name)[-1].number)
        target = self.release(ref if "@" in ref else f"{name}@{ref}")
        if target.name != name:
            raise BadInput(f"'{ref}' is not a version of {name}", param="ref")
        self._alias_log(name, alias).append({"action": "promote", "digest": target.digest})
        return self.release(target.ref)

    def rollback(self, name: str, alias: str = "prod") -> ReleaseVersion:
        """Move `alias` back to where it stood before the last promotion; a second time goes back one more.

        Raises:
            BadInput: it stood nowhere before.
        """
        self.release(name)
        stack = self._alias_targets(name, alias)
        if len(stack) < 2:
            where = "is not set" if not stack else f"has only ever stood on {short(stack[0])}"
            raise BadInput(
                f"{name}@{alias} {where}: there is nothing to go back to; promote a version instead", param="alias"
            )
        self._alias_log(name, alias).append({"action": "rollback", "digest": stack[-2]})
        return self.release(f"{name}@{alias}")

    def aliases(self, name: str) -> dict[str, str]:
        """The aliases of the release `name` and the digest each stands on."""
        _check_slug(name, "release")
        targets = {alias: self._alias_targets(name, alias) for alias in self.storage.list(f"releases/{name}/aliases")}
        return {alias: stack[-1] for alias, stack in targets.items() if stack}

    def _alias_log(self, name: str, alias: str) -> Log:
        return self.log(f"releases/{name}/aliases/{alias}")

    def _alias_targets(self, name: str, alias: str) -> list[str]:
        """Where the alias stood, last is now: a promotion is put on top, a rollback takes the top away."""
        stack: list[str] = []
        for entry in self._alias_log(name, alias).entries():
            if entry.data["action"] == "promote" and stack[-1:] != [entry.data["digest"]]:
                stack.append(entry.data["digest"])
            elif entry.data["action"] == "rollback" and len(stack) > 1:
                stack.pop()
        return stack

    def _release(self, name: str, entry: Entry, aliases: dict[str, str]) -> ReleaseVersion:
        content = entry.data["digest"]
        stored = self._manifest("releases", content)["release"]
        if digest(stored) != content:
            raise Mismatch(f"release {name}@{entry.number} in {self.storage.url} was changed; create it again")
        release = _load(Release, stored, f"release {name}@{entry.number}")
        standing = tuple(sorted(alias for alias, target in aliases.items() if target == content))
        return ReleaseVersion(name, entry.number, content, release, entry.created, standing)

    # -- knowledge

    def knowledge_append(self, name: str, entry: dict[str, Any]) -> int:
        """Record `entry` as the next version of the knowledge base `name`; returns that version, from 1."""
        return self._knowledge(name).append(entry)

    def knowledge_head(self, name: str) -> int:
        """The newest version of the knowledge base `name`; 0 if there is none."""
        return self._knowledge(name).head()

    def knowledge_entries(self, name: str) -> list[dict[str, Any]]:
        """What was recorded, oldest first, each with its ``version`` and when it was ``created``."""
        return [{"version": e.number, "created": e.created, **e.data} for e in self._knowledge(name).entries()]

    def _knowledge(self, name: str) -> Log:
        _check_slug(name, "knowledge base")
        return self.log(f"knowledge/{name}")

    # -- objects

    def _put_files(self, kind: str, directory: Path, names: Iterable[str], card: BaseModel) -> str:
        """Files of `directory` and their card; returns the digest."""
        files = {name: file_digest(directory / name) for name in names}
        manifest = {"files": files, "card": card.model_dump(mode="json")}
        content = content_digest(manifest)
        self._put_object(kind, content, manifest, {name: directory / name for name in files})
        return content

    def _put_object(
        self, kind: str, content: str, manifest: dict[str, Any], files: Mapping[str, Path] | None = None
    ) -> None:
        path = f"objects/{kind}/{content}"
        if self.storage.exists(f"{path}/manifest.json"):
            return
        for name, file in (files or {}).items():
            self.storage.upload(file, f"{path}/{name}")
        self.storage.create(f"{path}/manifest.json", canonical_json(manifest))

    def _download(self, kind: str, noun: str, content: str, out: Path) -> dict[str, Any]:
        manifest = self._manifest(kind, content)
        files: dict[str, str] = manifest["files"]
        strange = [name for name in files if not _is_plain(name)]
        if content_digest(manifest) != content or strange:
            raise Mismatch(
                f"the manifest of {noun} {short(content)} in {self.storage.url} was changed; publish the {noun} again"
            )
        for name, wanted in files.items():
            self.storage.download(f"objects/{kind}/{content}/{name}", out / name)
            if file_digest(out / name) != wanted:
                raise Mismatch(
                    f"{name} of {noun} {short(content)} in {self.storage.url} is damaged; publish the {noun} again"
                )
        return {"source": f"{self.storage.url}/objects/{kind}/{content}", "revision": content}

    def _manifest(self, kind: str, content: str) -> dict[str, Any]:
        path = f"objects/{kind}/{content}/manifest.json"
        if path not in self._manifests:
            self._manifests[path] = json.loads(self.storage.read(path))
        return self._manifests[path]

    def _versions(self, kind: str, noun: str, name: str) -> list[Entry]:
        path = f"{kind}/{name}/versions" if kind == "releases" else f"{kind}/{name}"
        entries = self.log(path).entries()
        if not entries:
            known = self.storage.list(kind)
            raise ModelNotFound(f"there is no {noun} '{name}' in {self.storage.url}; {_hint(name, known)}")
        return entries


def _select(ref: str, selector: str | None, entries: list[Entry], aliases: Iterable[str] = ()) -> Entry:
    """The entry `selector` picks: a version number, (the start of) a digest, or None for the newest."""
    if selector is None:
        return entries[-1]
    if selector.isdigit() and len(selector) < 6:
        found = [entry for entry in entries if entry.number == int(selector)]
    elif PREFIX.fullmatch(selector):
        found = [entry for entry in entries if entry.data["digest"].startswith(selector)]
    else:
        found = []
    if len(found) > 1:
        raise BadInput(
            f"'{ref}' could be {', '.join(short(entry.data['digest']) for entry in found)}; give more digits"
        )
    if not found:
        versions = ", ".join(f"{entry.number} ({short(entry.data['digest'])})" for entry in entries)
        known = f"; aliases: {', '.join(sorted(aliases))}" if aliases else ""
        raise ModelNotFound(f"there is no '{ref}'; versions: {versions}{known}")
    return found[0]


def _parse_ref(ref: str, noun: str) -> tuple[str, str | None]:
    name, at, selector = ref.partition("@")
    _check_slug(name, noun)
    if at and not (re.fullmatch(SLUG, selector) or PREFIX.fullmatch(selector)):
        raise BadInput(f"'{ref}' is not a reference; write name, name@3 or name@<digest>")
    return name, selector or None


def _check_slug(name: str, noun: str) -> None:
    if not re.fullmatch(SLUG, name):
        raise BadInput(
            f"'{name}' is no valid {noun} name; use lower-case letters, digits, '.', '_' and '-'", param="name"
        )


def _hint(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}" if known else "there are none yet"


def load_card(data: Any, what: str) -> AdapterCard:
    """The card of an adapter that was stored as `data`; one that another version wrote is refused by its field."""
    return _load(AdapterCard, data, what)


def _load(model: type[M], data: Any, what: str) -> M:
    try:
        return model.model_validate(data)
    except ValidationError as error:
        detail = error.errors()[0]
        field = ".".join(map(str, detail["loc"]))
        raise Mismatch(
            f"{what} was written by another version of metier ({field}: {detail['msg']}); use that version, or make it again"
        ) from error


def content_digest(manifest: Mapping[str, Any]) -> str:
    """Digest of an adapter or model by its manifest: ``files`` (name -> SHA-256) and ``card``."""
    card = {key: value for key, value in manifest["card"].items() if key not in VOLATILE}
    return digest({"files": manifest["files"], "card": card})


def file_digest(file: Path) -> str:
    """SHA-256 of a file's bytes, 64 hex digits."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _is_plain(name: str) -> bool:
    """Whether a manifest may name this file: a relative path that stays below, of a kind that is published."""
    path = PurePosixPath(name)
    return is_model_file(name) and not path.is_absolute() and ".." not in path.parts


def _check_digest(digest: str) -> None:
    if not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise BadInput(f"'{digest}' is not a digest (64 hex digits)")


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
