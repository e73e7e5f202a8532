"""Uploaded files in the storage: ``files/<id>/`` holds the bytes, and ``meta.json``, which is written last.

A file belongs to the tenant that uploaded it and is read by the groups of who did; its bytes never change. Not
covered: expiry, and removing what an upload left that was killed before its end.
"""

from __future__ import annotations

import json
import re
import time
import unicodedata
import uuid
from collections.abc import Iterator, Sequence, Set
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from cluster.errors import NotFound
from cluster.storage import Storage
from retrieval.types import Principal

FILE_ID = re.compile(r"file-[0-9a-f]{24}")
SUFFIX = re.compile(r"\.[a-z0-9]{1,16}")
FILENAME_BYTES = 255


@dataclass(frozen=True)
class File:
    """What is known of an uploaded file."""

    id: str
    filename: str
    bytes: int
    created_at: int
    """Seconds since the epoch."""
    purpose: str
    tenant: str
    groups: tuple[str, ...]
    path: str
    """Of its bytes in the storage; it keeps the ending of the name, which says what kind of file it is."""

    def to_openai(self) -> dict[str, Any]:
        """OpenAI's ``file``."""
        fields = ("id", "filename", "bytes", "created_at", "purpose")
        return {"object": "file", **{name: getattr(self, name) for name in fields}, "status": "processed"}


class Files:
    """Files of all tenants; safe to use from several threads and processes."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._known: dict[str, File] = {}
        """What was read; only its removal changes what is known of a file, so the ids are listed each time."""

    def add(self, local: Path, size: int, filename: str, purpose: str, principal: Principal) -> File:
        """Keep the bytes of the file `local`, which is read once."""
        filename = plain_name(filename)
        suffix = PurePosixPath(filename).suffix.lower()
        file_id = f"file-{uuid.uuid4().hex[:24]}"
        path = f"files/{file_id}/content{suffix if SUFFIX.fullmatch(suffix) else ''}"
        self._storage.upload(local, path)
        made = File(file_id, filename, size, int(time.time()), purpose, principal.tenant, principal.groups, path)
        self._storage.write(_meta(file_id), json.dumps(asdict(made)).encode())
        self._known[file_id] = made
        return made

    def get(self, file_id: str, principal: Principal) -> File:
        """One file.

        Raises:
            NotFound: there is none of that id that `principal` may read.
        """
        if FILE_ID.fullmatch(file_id):
            with suppress(NotFound):
                found = self._read(file_id)
                if _may_read(found, principal):
                    return found
        raise _missing(file_id)

    def several(self, file_ids: Sequence[str], principal: Principal) -> list[File]:
        """Files in the order of `file_ids`.

        Raises:
            NotFound: one of them is not there, or `principal` may not read it.
        """
        mine = {file.id: file for file in self._some(set(file_ids)) if _may_read(file, principal)}
        for file_id in file_ids:
            if file_id not in mine:
                raise _missing(file_id)
        return [mine[file_id] for file_id in file_ids]

    def list(self, principal: Principal, purpose: str | None = None) -> list[File]:
        """The files that `principal` may read, oldest first."""
        mine = [file for file in self._some() if _may_read(file, principal) and purpose in (None, file.purpose)]
        return sorted(mine, key=lambda file: (file.created_at, file.id))

    def download(self, file: File, local: Path) -> None:
        """Write the bytes of `file` to `local`."""
        self._storage.download(file.path, local)

    def remove(self, file: File) -> None:
        """Remove it; from then on it is not there."""
        self._storage.delete(_meta(file.id))
        self._storage.delete(f"files/{file.id}")
        self._known.pop(file.id, None)

    def _some(self, file_ids: Set[str] | None = None) -> Iterator[File]:
        """The files that are there, or those of `file_ids`."""
        for file_id in filter(FILE_ID.fullmatch, self._storage.list("files")):
            if file_ids is None or file_id in file_ids:
                if file_id not in self._known:
                    try:
                        self._known[file_id] = self._read(file_id)
                    except NotFound:  # an upload under way, or one that was removed meanwhile
                        continue
                yield self._known[file_id]

    def _read(self, file_id: str) -> File:
        data = json.loads(self._storage.read(_meta(file_id)))
        return File(**data | {"groups": tuple(data["groups"])})


def plain_name(filename: str) -> str:
    """The last part of what a client calls its file, without what does not belong into a name."""
    last = re.split(r"[/\\]", unicodedata.normalize("NFC", filename))[-1]
    shown = "".join(char for char in last if unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Co", "Cn")).strip()
    stem, suffix = PurePosixPath(shown).stem, PurePosixPath(shown).suffix
    room = FILENAME_BYTES - len(suffix.encode())
    if room < 1:
        return shown.encode()[:FILENAME_BYTES].decode(errors="ignore")
    name = stem.encode()[:room].decode(errors="ignore") + suffix
    return name if name.strip(". ") else "file"


def _missing(file_id: str) -> NotFound:
    return NotFound(f"there is no file '{file_id}'; GET /v1/files lists what is there", param="file_id")


def _may_read(file: File, principal: Principal) -> bool:
    return file.tenant == principal.tenant and not set(file.groups).isdisjoint(principal.groups)


def _meta(file_id: str) -> str:
    return f"files/{file_id}/meta.json"
