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
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ValidationError

from cluster.adapter_files import PEFT_FILES, check_adapter_files, tensors
from cluster.claim import Claim, claim
from cluster.config import SLUG
from cluster.errors import BadInput, Mismatch, ModelNotFound, NotFound
from cluster.knowledge import Build, Forgotten, KnowledgeVersion, compacted, forgotten, kept, pins
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
        """Record the next version of `name`: the fields of :class:`KnowledgeVersion` but its number and when it was made.

        ``reads`` may be left out by a version that shows its own rows. Returns the number, from 1.
        """
        return self._knowledge(name).append(entry)

    def knowledge_next(self, name: str) -> int:
        """The number that the next version of `name` will have."""
        return self._knowledge(name).head() + 1

    def knowledge_head(self, name: str) -> int:
        """The newest version of the knowledge base `name`; 0 if there is none, or it was dropped."""
        head = self.knowledge_latest(name)
        return head.number if head else 0

    def knowledge_latest(self, name: str) -> KnowledgeVersion | None:
        """The newest version, if there is one and the knowledge was not dropped."""
        log = self._knowledge(name)
        number = log.head()
        latest = _knowledge_version(log.entry(number)) if number else None
        return None if latest is None or latest.kind == "drop" else latest

    def knowledge_version(self, name: str, number: int | Literal["head"] = "head") -> KnowledgeVersion:
        """One version of `name`.

        Raises:
            NotFound: there is none of that number, or its rows were removed by a compaction.
        """
        versions = {version.number: version for version in self.knowledge_versions(name)}
        wanted = max(versions, default=0) if number == "head" else number
        if wanted in versions:
            return versions[wanted]
        if wanted in self._compacted(name):
            raise NotFound(
                f"version {wanted} of knowledge '{name}' was compacted: its rows are gone; `metier knowledge versions "
                f"{name}` lists what is kept, and `metier knowledge pin` keeps a version",
                param="knowledge.version",
            )
        raise NotFound(
            f"knowledge '{name}' has no version {number}; `metier knowledge versions {name}` lists them"
            if versions
            else f"knowledge '{name}' is empty or not there; run `metier index`",
            param="knowledge.name",
        )

    def knowledge_versions(self, name: str) -> list[KnowledgeVersion]:
        """The versions since `name` was last dropped that have their rows, oldest first."""
        gone = self._compacted(name)
        return [version for version in self.knowledge_history(name) if version.number not in gone]

    def knowledge_history(self, name: str) -> list[KnowledgeVersion]:
        """The versions since `name` was last dropped, oldest first, with those that were compacted."""
        versions: list[KnowledgeVersion] = []
        for version in map(_knowledge_version, self._knowledge(name).entries()):
            versions = [] if version.kind == "drop" else [*versions, version]
        return versions

    def knowledge_collections(self, name: str) -> list[str]:
        """Every collection that a version of `name` was ever in, or that was begun for one; they need not be there."""
        entries = [*self._knowledge(name).entries(), *self._beside("builds", name).entries()]
        return list(dict.fromkeys(entry.data["collection"] for entry in entries))

    def knowledge_names(self) -> list[str]:
        """Every knowledge that has a version."""
        return [name for name in self.storage.list("knowledge") if self.knowledge_head(name)]

    def knowledge_claim(self, name: str, doing: str) -> AbstractContextManager[Claim]:
        """Be the one writer of `name` for the length of a ``with``.

        Args:
            doing: for those who are refused meanwhile, for example ``metier index``.

        Raises:
            Mismatch: a living process writes it; the sentence names it.
        """
        _check_slug(name, "knowledge base")
        return claim(self.storage, f"knowledge-writers/{name}", f"knowledge '{name}'", doing)

    def knowledge_build_claim(self, name: str, doing: str) -> AbstractContextManager[Claim]:
        """Be the one who fills or abandons a collection beside the one that serves; others may write meanwhile."""
        _check_slug(name, "knowledge base")
        return claim(self.storage, f"knowledge-builders/{name}", f"the next collection of knowledge '{name}'", doing)

    def knowledge_pin(self, name: str, number: int, label: str = "") -> KnowledgeVersion:
        """Keep version `number` of `name` through every compaction; a second time changes its label."""
        version = self.knowledge_version(name, number)
        if self.knowledge_pins(name).get(number) != label:
            self._beside("pins", name).append({"action": "pin", "version": number, "label": label})
        return version

    def knowledge_unpin(self, name: str, number: int) -> None:
        """Let version `number` go with the others.

        Raises:
            NotFound: it is not pinned.
        """
        if number not in self.knowledge_pins(name):
            raise NotFound(f"version {number} of knowledge '{name}' is not pinned", param="version")
        self._beside("pins", name).append({"action": "unpin", "version": number})

    def knowledge_pins(self, name: str) -> dict[int, str]:
        """Pinned versions of `name` and their labels."""
        return pins(entry.data for entry in self._beside("pins", name).entries())

    def knowledge_releases(self, name: str) -> dict[int | Literal["head"], list[str]]:
        """Version of `name`, or ``head``, and the releases that name it."""
        found: dict[int | Literal["head"], list[str]] = {}
        for release in self.releases():
            if (ref := release.release.knowledge) is not None and ref.name == name:
                found.setdefault(ref.version, []).append(release.ref)
        return found

    def knowledge_kept(self, name: str, keep: int) -> dict[int, str]:
        """The versions of `name` that a compaction to the newest `keep` leaves, and why each stays."""
        named = self.knowledge_releases(name)
        released = {number: refs for number, refs in named.items() if number != "head"}
        return kept(self.knowledge_versions(name), keep=keep, pinned=self.knowledge_pins(name), released=released)

    def knowledge_compacted(self, name: str, gone: Iterable[int]) -> None:
        """Record that versions can no longer be searched; done before their rows are removed."""
        self._beside("compactions", name).append({"gone": sorted(gone)})

    def _compacted(self, name: str) -> set[int]:
        return compacted(entry.data for entry in self._beside("compactions", name).entries())

    def knowledge_build(self, name: str) -> Build | None:
        """The collection that is being filled beside the one that serves, if there is one."""
        log = self._beside("builds", name)
        last = log.entry(number) if (number := log.head()) else None
        if last is None or last.data["action"] == "end":
            return None
        fields = {key: value for key, value in last.data.items() if key != "action"}
        return _load(Build, fields | {"began": last.created}, f"a build of knowledge '{name}'")

    def knowledge_build_begin(self, name: str, fields: dict[str, Any]) -> Build:
        """Record that a collection is being filled: the fields of :class:`Build` but when it began."""
        self._beside("builds", name).append({"action": "begin", **fields})
        build = self.knowledge_build(name)
        assert build is not None
        return build

    def knowledge_build_end(self, name: str, collection: str, outcome: Literal["moved", "aborted"]) -> None:
        """Record that `collection` is no longer being filled."""
        self._beside("builds", name).append({"action": "end", "collection": collection, "outcome": outcome})

    def knowledge_forget(self, name: str, doc_id: str, tenant: str | None) -> None:
        """Keep a document from coming back with the next ingest.

        Args:
            tenant: whose; None: of every tenant.
        """
        self._beside("forgotten", name).append({"action": "forget", "doc_id": doc_id, "tenant": tenant})

    def knowledge_unforget(self, name: str, doc_id: str, tenant: str | None) -> None:
        """Let a document come back with the next ingest.

        Raises:
            NotFound: it was not forgotten.
        """
        if not any(f.doc_id == doc_id and tenant in (None, f.tenant) for f in self.knowledge_forgotten(name)):
            of = f" of tenant {tenant}" if tenant else ""
            raise NotFound(f"document '{doc_id}'{of} of knowledge '{name}' was not forgotten", param="doc_id")
        self._beside("forgotten", name).append({"action": "undo", "doc_id": doc_id, "tenant": tenant})

    def knowledge_forgotten(self, name: str) -> list[Forgotten]:
        """The documents of `name` that do not come back."""
        return forgotten(entry.data | {"at": entry.created} for entry in self._beside("forgotten", name).entries())

    def _knowledge(self, name: str) -> Log:
        _check_slug(name, "knowledge base")
        return self.log(f"knowledge/{name}")

    def _beside(self, what: Literal["pins", "compactions", "builds", "forgotten"], name: str) -> Log:
        _check_slug(name, "knowledge base")
        return self.log(f"knowledge-{what}/{name}")

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


def _knowledge_version(entry: Entry) -> KnowledgeVersion:
    data = {"reads": entry.number, **entry.data, "number": entry.number, "created": entry.created}
    return _load(KnowledgeVersion, data, f"version {entry.number} of a knowledge")


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
