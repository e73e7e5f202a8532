"""Keep a knowledge in step with its documents: look when something changed, read what changed, index what differs.

A directory tells of changes (``watchfiles``: inotify, FSEvents, …); an object store is listed every
``ingestion.interval_s``. Each change is one ingest of the documents that it touched, so that the result is that of a
whole ingest: ids and repetitions are found among all documents, whose texts are kept in memory for it.

Nothing that may pass ends it. Milvus or the store away, another writer: said, and tried again. A file that cannot be
read any more, perhaps half-written, keeps its documents until a second look finds the same. A place that is gone or
empty, perhaps not mounted, takes nothing away. Not covered: network mounts that do not tell of changes made elsewhere
(``WATCHFILES_FORCE_POLLING=1`` looks for itself).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from watchfiles import watch as changes_below

from cluster.config import KnowledgeConfig
from cluster.errors import MetierError, NotFound
from retrieval.ingest import IngestReport
from retrieval.read import Problem, Source, read_source, sources
from retrieval.steps import Read, assemble
from retrieval.types import Document

Index = Callable[[Read, Sequence[str] | None], IngestReport]
"""Makes what was read the documents of these ids, or all documents (None); :func:`retrieval.ingest.apply`."""
DEBOUNCE_MS = 400
"""Changes that follow each other within it are one."""


@dataclass
class _File:
    """One file as it was last read."""

    stamp: str
    documents: list[Document] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    doubted: str | None = None
    """The stamp at which it could not be read, while `documents` are those before."""


class Follower:
    """The documents of one knowledge, and what of them is indexed."""

    def __init__(self, knowledge: KnowledgeConfig, options: Mapping[str, Any], index: Index) -> None:
        """`options`: ``storage.options``, for documents behind a URL."""
        self._knowledge, self._options, self._index = knowledge, options, index
        self._files: dict[str, _File] = {}
        self._indexed: dict[str, Document] | None = None
        self.pending = True
        """Whether there is something to do even if nothing changes any more."""

    def step(self) -> IngestReport | None:
        """Look, and index what differs from the last time; None if nothing does.

        The first time all documents are indexed, and what is there of others is removed.

        Raises:
            NotFound: there is no document; nothing was removed.
            MetierError: it did not work; the next step tries again.
        """
        self.pending = True
        self._look()
        problems = [problem for file in self._files.values() for problem in file.problems]
        read = assemble((one for file in self._files.values() for one in file.documents), problems, self._knowledge)
        if not read.count:
            raise NotFound(
                f"{self._knowledge.documents} holds no document that can be read; what is indexed stays",
                param="knowledge.documents",
            )
        wanted = {document.doc_id: document for document in read.documents}
        report = None
        if self._indexed is None:
            report = self._index(read, None)
        elif only := [name for name in {**self._indexed, **wanted} if wanted.get(name) != self._indexed.get(name)]:
            documents = [wanted[name] for name in only if name in wanted]
            report = self._index(Read(documents, len(documents), read.problems), only)
        self._indexed = wanted
        self.pending = any(file.doubted is not None for file in self._files.values())
        return report

    def _look(self) -> None:
        found, problems = sources(self._knowledge, self._options)
        files = {source.path: self._file(source) for source in found}
        for problem in problems:
            files.setdefault(problem.source, _File("", problems=[problem]))
        self._files = files

    def _file(self, source: Source) -> _File:
        before = self._files.get(source.path)
        if before is not None and before.stamp == source.stamp:
            return before
        documents, problems = read_source(source, self._knowledge, self._options)
        if not documents and before is not None and before.documents and before.doubted != source.stamp:
            return _File(before.stamp, before.documents, problems, doubted=source.stamp)
        return _File(source.stamp, documents, problems)


def follow(
    follower: Follower,
    place: str,
    interval_s: float,
    *,
    done: Callable[[IngestReport], None],
    tell: Callable[[str], None],
    stop: threading.Event,
) -> None:
    """Step whenever something may have changed at `place`, until `stop` is set or Ctrl-C.

    Args:
        interval_s: between tries after a failure, and between looks at an object store.
        done: called with the report of each ingest.
        tell: called with a sentence when a step fails as it did not fail before.
    """
    said = ""
    for _ in _moments(place, interval_s, follower, stop):
        try:
            report = follower.step()
            said = ""
        except MetierError as error:
            if str(error) != said:
                said = str(error)
                tell(f"{said}; trying again every {interval_s:g} s")
            continue
        if report is not None:
            done(report)


def _moments(place: str, interval_s: float, follower: Follower, stop: threading.Event) -> Iterator[None]:
    """When to look: at once, when something changed, and every `interval_s` while there is something to do."""
    while not stop.is_set():
        if "://" in place or not Path(place).is_dir():
            yield
            stop.wait(interval_s)
        else:
            yield from _changes(Path(place), interval_s, follower, stop)


def _changes(root: Path, interval_s: float, follower: Follower, stop: threading.Event) -> Iterator[None]:
    """Moments at which something below `root` changed; ends when it is not the same directory any more."""
    inode = root.stat().st_ino
    told = changes_below(
        root,
        watch_filter=None,
        debounce=DEBOUNCE_MS,
        stop_event=stop,
        rust_timeout=int(interval_s * 1000),
        yield_on_timeout=True,
        ignore_permission_denied=True,
    )
    yield
    missed = True  # what changed before the watching began, in the look above
    for changes in told:
        if not root.is_dir() or root.stat().st_ino != inode:
            return
        if missed or changes or follower.pending:
            missed = False
            yield
