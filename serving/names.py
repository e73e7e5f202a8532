"""What the ``model`` of a request means: a release, an adapter on the bare base, or the base itself.

===========================  =====================================================================
``base``                     the bare base model, with the prompt and retrieval of the configuration
``base:adapter[@version]``   an adapter of the registry on it, likewise
``name``                     the release that alias ``prod`` points at (the newest if there is none)
``name@alias``, ``name@3``   that alias, that version
``name@3f9a12…``             that digest, at least six of its digits
===========================  =====================================================================

Names are looked up in the registry's logs on every request, so a moved alias counts from the next request on;
what they point at is immutable and cached by digest. Nothing goes by time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from cluster.config import Config, PromptConfig, RetrievalConfig
from cluster.errors import BadInput, Mismatch, ModelNotFound, NotFound
from cluster.registry import AdapterVersion, Registry, ReleaseVersion
from cluster.release import BaseRef, KnowledgeRef, RerankerRef, check_match, short


@dataclass(frozen=True)
class Resolved:
    """All that an answer is made with."""

    model: str
    """The full name, as it comes back in the response: ``support@3f9a12345678``."""
    adapter: str | None
    """Digest."""
    knowledge: KnowledgeRef | None
    """``None``: closed book, unless the request asks for passages."""
    prompt: PromptConfig
    retrieval: RetrievalConfig
    release: str | None = None
    """Digest; ``None`` for a bare base or adapter."""


@dataclass(frozen=True)
class Served:
    """One line of ``/v1/models``."""

    id: str
    root: str
    """What it stands on: the base model's name."""
    parent: str | None
    """What it is a name for: an alias's release digest, an adapter's base."""
    created: str


class Names:
    """Resolution of names against one registry and one base model."""

    def __init__(self, config: Config, registry: Registry, base: BaseRef) -> None:
        self.config, self.registry, self.base = config, registry, base
        self.base_name = config.base.served_name

    def resolve(self, model: str) -> Resolved:
        """What `model` names.

        Raises:
            ModelNotFound: it names nothing; the message lists near names.
            Mismatch: the release or adapter was made for another base, tokenizer or prompt.
        """
        if model == self.base_name:
            return self._bare(model, None)
        if model.startswith(self.base_name + ":"):
            adapter = self._adapter(model.removeprefix(self.base_name + ":"))
            check_match(adapter.card, self.base, self.config.prompt)
            return self._bare(f"{self.base_name}:{adapter.name}@{adapter.version}", adapter.digest)
        return self._release(model)

    def check(self, found: ReleaseVersion) -> None:
        """Raise :class:`cluster.errors.Mismatch` if this server cannot answer as that release."""
        release = found.release
        if release.adapter is not None:
            adapter = self.registry.adapter(f"{release.adapter.name}@{release.adapter.digest}")
            check_match(adapter.card, self.base, release.prompt)
        own = self.config.reranker
        loaded = RerankerRef(source=own.source, revision=own.revision) if own else None
        if release.reranker not in (None, loaded):
            raise Mismatch(
                f"release {found.ref} orders passages with {release.reranker.source}, this server with "
                f"{loaded.source if loaded else 'no reranker'}; set reranker.source, or create the release again",
                param="reranker",
            )
        pairs = {field: (getattr(release.base, field), getattr(self.base, field)) for field in BaseRef.model_fields}
        wrong = {field: pair for field, pair in pairs.items() if pair[0] != pair[1]}
        if wrong:
            lines = [
                f"base.{field} is {a} in release {found.ref}, {b} here; serve that base, or create the release again"
                for field, (a, b) in wrong.items()
            ]
            raise Mismatch("\n".join(lines), param=f"base.{next(iter(wrong))}")

    def list(self) -> Iterator[Served]:
        """The base, every adapter, and every release by each of its names."""
        yield Served(self.base_name, self.base_name, None, "")
        for adapter in self.registry.adapters():
            yield Served(
                f"{self.base_name}:{adapter.name}@{adapter.version}", self.base_name, self.base_name, adapter.created
            )
        releases = self.registry.releases()
        bare = {found.name: found for found in releases}
        bare |= {found.name: found for found in releases if "prod" in found.aliases}
        for found in releases:
            digest = f"{found.name}@{short(found.digest)}"
            yield Served(digest, self.base_name, self._parent(found), found.created)
            for alias in found.aliases:
                yield Served(f"{found.name}@{alias}", self.base_name, digest, found.created)
            if bare[found.name] is found:
                yield Served(found.name, self.base_name, digest, found.created)

    def _parent(self, found: ReleaseVersion) -> str:
        adapter = found.release.adapter
        return f"{self.base_name}:{adapter.name}@{adapter.version}" if adapter else self.base_name

    def _bare(self, model: str, adapter: str | None) -> Resolved:
        return Resolved(model, adapter, None, self.config.prompt, self.config.retrieval)

    def _adapter(self, ref: str) -> AdapterVersion:
        try:
            return self.registry.adapter(ref)
        except (BadInput, NotFound) as error:
            raise ModelNotFound(f"model '{self.base_name}:{ref}': {error}", param="model") from error

    def _release(self, model: str) -> Resolved:
        try:
            found = self.registry.release(model)
        except (BadInput, NotFound) as error:
            raise ModelNotFound(f"model '{model}': {error}", param="model") from error
        self.check(found)
        release = found.release
        return Resolved(
            f"{found.name}@{short(found.digest)}",
            release.adapter.digest if release.adapter else None,
            release.knowledge,
            release.prompt,
            release.retrieval,
            found.digest,
        )
