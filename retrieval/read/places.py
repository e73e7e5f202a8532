"""Where documents are: the files below a directory, or the objects below a URL, in order of path.

Hidden files and directories (a leading dot: ``.git``, the ``..data`` of a Kubernetes ConfigMap) are not looked at.
Links to directories are not followed, so none can lead in a circle; links to files are. Nothing is opened here.
"""

from __future__ import annotations

import os
import re
import stat
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec

from cluster.config import KnowledgeConfig
from cluster.errors import BadInput, NotFound, Unavailable
from retrieval.read.base import Problem, Source, Unreadable

SUFFIXES = (".md", ".markdown", ".txt", ".html", ".htm", ".pdf", ".docx", ".jsonl", ".csv", ".parquet")
MB = 1_000_000


def sources(knowledge: KnowledgeConfig, options: Mapping[str, Any] = {}) -> tuple[list[Source], list[Problem]]:
    """The files of ``knowledge.documents`` that may hold documents, and those that are meant but cannot be read.

    Files of a kind that nobody reads are passed over in silence, unless ``knowledge.include`` asks for their ending.

    Args:
        options: arguments of the fsspec file system, ``storage.options``; not used for a directory.

    Raises:
        NotFound: ``knowledge.documents`` is not set or not there.
        BadInput: no file system is known for the URL.
        Unavailable: the object store does not answer, or refuses.
    """
    root = knowledge.documents
    if root is None:
        raise NotFound("knowledge.documents is not set; name a directory of documents", param="knowledge.documents")
    listed = _objects(root, options) if "://" in root else _files(Path(root))
    found: list[Source] = []
    problems: list[Problem] = []
    for item in sorted(listed, key=lambda item: item.path if isinstance(item, Source) else item.source):
        path = item.path if isinstance(item, Source) else item.source
        if isinstance(item, Problem) and suffix(path) not in SUFFIXES and not _fits(path, knowledge.exclude):
            problems.append(item)  # a directory, and nobody knows what is in it
        elif not _wanted(path, knowledge):
            continue
        elif isinstance(item, Problem):
            problems.append(item)
        elif suffix(path) not in SUFFIXES:
            if any(pattern.lower().endswith(suffix(path)) for pattern in knowledge.include if suffix(path)):
                problems.append(Problem(path, f"{suffix(path)} files are not read; use one of {', '.join(SUFFIXES)}"))
        elif item.size > knowledge.max_file_mb * MB:
            problems.append(Problem(path, too_large(item.size, knowledge)))
        else:
            found.append(item)
    return found, problems


def contents(source: Source, knowledge: KnowledgeConfig, options: Mapping[str, Any] = {}) -> bytes:
    """All bytes of `source`.

    Raises:
        Unreadable: it is gone, cannot be opened, or is longer than ``knowledge.max_file_mb``.
        Unavailable: the object store does not answer; its documents must not be taken for deleted.
    """
    limit = int(knowledge.max_file_mb * MB)
    try:
        if "://" in source.url:
            data = _object(source.url, limit, options)
        else:
            with Path(source.url).open("rb") as file:
                data = file.read(limit + 1)
    except OSError as error:
        raise Unreadable(f"cannot be read: {error.strerror or error}") from error
    if len(data) > limit:
        raise Unreadable(too_large(max(source.size, len(data)), knowledge))
    return data


def _object(url: str, limit: int, options: Mapping[str, Any]) -> bytes:
    fs, path = fsspec.url_to_fs(url, use_listings_cache=False, **options)
    try:
        with fs.open(path, "rb", cache_type="none") as file:
            return bytes(file.read(limit + 1))
    except (FileNotFoundError, PermissionError):
        raise
    except Exception as error:  # every object store has exceptions of its own; none of them is about one file
        raise Unavailable(f"{url} cannot be read: {error}", param="knowledge.documents") from error


def too_large(size: int, knowledge: KnowledgeConfig) -> str:
    """The sentence about a file of `size` bytes."""
    return (
        f"holds {size / MB:.0f} MB, over knowledge.max_file_mb ({knowledge.max_file_mb:g}); split it or raise the limit"
    )


def suffix(path: str) -> str:
    """The ending of `path` in small letters, with its dot."""
    return PurePosixPath(path).suffix.lower()


def _files(root: Path) -> Iterator[Source | Problem]:
    if not root.is_dir():
        raise NotFound(f"{root}: no such directory; set knowledge.documents to where the documents are")
    errors: list[OSError] = []
    for directory, below, names in os.walk(root, onerror=errors.append):
        below[:] = [name for name in below if not name.startswith(".")]
        for name in names:
            file = Path(directory, name)
            if name.startswith("."):
                continue
            path = _nfc(file.relative_to(root).as_posix())
            try:
                status = file.stat()
            except OSError as error:
                # A link that leads nowhere is not a file, and yet somebody meant a document by it.
                if suffix(path) in SUFFIXES:
                    yield Problem(path, f"cannot be read: {error.strerror}")
                continue
            if stat.S_ISREG(status.st_mode):
                stamp = f"{status.st_mtime_ns}-{status.st_size}"
                yield Source(path, str(file.absolute()), status.st_size, stamp)
            elif suffix(path) in SUFFIXES:
                yield Problem(path, "not a regular file")
    for failed in errors:
        path = _nfc(Path(failed.filename).relative_to(root).as_posix())
        yield Problem(path, f"directory cannot be read: {failed.strerror}; what is below it counts as gone")


def _objects(root: str, options: Mapping[str, Any]) -> list[Source]:
    try:
        fs, base = fsspec.url_to_fs(root, use_listings_cache=False, **options)
    except (ValueError, ImportError) as error:
        raise BadInput(f"knowledge.documents {root} cannot be opened: {error}", param="knowledge.documents") from error
    try:
        found = fs.find(base, detail=True)
    except FileNotFoundError:
        found = {}
    except Exception as error:  # every object store has exceptions of its own; none of them is about one file
        raise Unavailable(f"{root} cannot be listed: {error}", param="knowledge.documents") from error
    if not found:
        raise NotFound(f"{root}: nothing is there; set knowledge.documents to where the documents are")
    base = base.rstrip("/")
    return [
        Source(_nfc(path), fs.unstrip_protocol(name), int(entry["size"] or 0), _stamp(entry))
        for name, entry in found.items()
        if (path := name.removeprefix(base).lstrip("/")) and not any(part.startswith(".") for part in path.split("/"))
    ]


def _stamp(entry: dict[str, object]) -> str:
    names = ("ETag", "etag", "md5Hash", "LastModified", "last_modified", "updated", "mtime", "created")
    tag = next((str(entry[name]) for name in names if entry.get(name)), "")
    return f"{tag.strip(chr(34))}-{entry['size']}"


def _wanted(path: str, knowledge: KnowledgeConfig) -> bool:
    return (not knowledge.include or _fits(path, knowledge.include)) and not _fits(path, knowledge.exclude)


def _fits(path: str, patterns: Iterable[str]) -> bool:
    return any(_pattern(pattern).fullmatch(path) for pattern in patterns)


@cache
def _pattern(glob: str) -> re.Pattern[str]:
    """``*`` and ``?`` stay inside a name, ``**`` does not; without a slash any name on the way may fit.

    What names a directory means all that is below it.
    """
    glob = _nfc(glob).removesuffix("/")
    parts = [
        {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}.get(part) or re.escape(part)
        for part in re.split(r"(\*\*/|\*\*|\*|\?)", glob)
        if part
    ]
    anywhere = "" if "/" in glob else "(?:.*/)?"
    return re.compile(f"{anywhere}{''.join(parts)}(?:/.*)?", re.DOTALL)


def _nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)
