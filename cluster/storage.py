"""One URL for what metier keeps: a directory, ``s3://``, ``gs://`` or whatever else fsspec opens.

Every write is all or nothing for whoever reads, and :meth:`Storage.create` is exclusive: of several processes that
create one path, one succeeds. The registry stands on these two facts. A directory has them from ``rename`` and
``link``, S3 from its PUT with ``If-None-Match``, Google Cloud Storage from its generation match; ``memory://`` is for
tests of one process.

Not covered: locks, transactions over several paths, and large objects in memory (use :meth:`Storage.upload`).
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from cluster.config import StorageConfig
from cluster.errors import BadInput, NotFound, ResourcesShort, Unavailable
from cluster.materialize import is_disk_full

CLIENTS = ("botocore", "aiobotocore", "aiohttp", "gcsfs", "google")
"""Packages whose exceptions mean that an object store did not do what it was asked."""
PROBE = ".metier-exclusive"
CONFLICT_WAITS = (0.05, 0.1, 0.2, 0.4, 0.8)
"""Seconds between tries while S3 answers that another creation of the same path is under way (409)."""


class Storage:
    """Bytes under slash-separated relative paths; safe to use from several threads and processes.

    Every method raises :class:`Unavailable` when the store does not answer or refuses (no bucket, no credentials, no
    route) and :class:`ResourcesShort` when it is full.
    """

    def __init__(self, url: str, options: Mapping[str, Any] | None = None) -> None:
        self.url = re.sub(r"://[^/@]+@", "://", url)
        """Without credentials: it is shown in messages."""
        self.options = dict(options or {})
        try:
            # Somebody else writes too: a remembered listing would hide it.
            self.fs, self.root = fsspec.url_to_fs(url, use_listings_cache=False, **self.options)
        except (ValueError, ImportError) as error:
            raise BadInput(f"storage.url {self.url} cannot be opened: {error}", param="storage.url") from error
        self.local = isinstance(self.fs, LocalFileSystem)
        self._exclusive = self.local

    @classmethod
    def of(cls, config: StorageConfig) -> Storage:
        """The storage that a configuration names."""
        return cls(config.url, config.options)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.url, self.options)

    def read(self, path: str) -> bytes:
        """The bytes at `path`.

        Raises:
            NotFound: there are none.
        """
        with self._errors():
            try:
                return bytes(self.fs.cat_file(self._full(path)))
            except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
                self._check_bucket(error)
                raise NotFound(f"{self.url}/{path}: no such object") from None

    def exists(self, path: str) -> bool:
        """Whether there is an object at `path`."""
        with self._errors():
            try:
                return bool(self.fs.info(self._full(path))["type"] == "file")
            except (FileNotFoundError, NotADirectoryError) as error:
                self._check_bucket(error)
                return False

    def list(self, prefix: str = "") -> list[str]:
        """Names directly under `prefix`, sorted: objects and prefixes of further ones, without hidden names."""
        with self._errors():
            try:
                found = self.fs.ls(self._full(prefix), detail=False)
            except (FileNotFoundError, NotADirectoryError) as error:
                self._check_bucket(error)
                return []
        names = {str(name).rstrip("/").rpartition("/")[2] for name in found}
        return sorted(name for name in names if name and not name.startswith("."))

    def write(self, path: str, data: bytes) -> None:
        """Put `data` at `path`, over what is there; a reader sees the old bytes or the new ones."""
        target = self._full(path)
        with self._errors():
            if self.local:
                with _temporary(Path(target)) as temporary:
                    _write_durably(temporary, data)
                    temporary.replace(target)
            else:
                self.fs.pipe_file(target, data)

    def create(self, path: str, data: bytes) -> bool:
        """Put `data` at `path` if nothing is there; False if something is. Of several callers one gets True."""
        if not self._exclusive:
            self._check_exclusive()
        return self._create(path, data)

    def upload(self, file: Path, path: str) -> None:
        """Copy the local `file` to `path`; it appears when it is whole."""
        target = self._full(path)
        with self._errors():
            if self.local:
                with _temporary(Path(target)) as temporary:
                    shutil.copyfile(file, temporary)
                    _sync(temporary)
                    temporary.replace(target)
            else:
                self.fs.put_file(str(file), target)

    def download(self, path: str, file: Path) -> None:
        """Copy the object at `path` to the local `file`; it appears when it is whole.

        Raises:
            NotFound: there is no such object.
        """
        with self._errors(), _temporary(file) as temporary:
            try:
                self.fs.get_file(self._full(path), str(temporary))
            except FileNotFoundError as error:
                self._check_bucket(error)
                raise NotFound(f"{self.url}/{path}: no such object") from None
            temporary.replace(file)

    def delete(self, prefix: str) -> None:
        """Remove the object `prefix` and all under it; nothing there is fine."""
        if not prefix.strip("/"):
            raise BadInput("refusing to delete the whole storage")
        with self._errors():
            try:
                self.fs.rm(self._full(prefix), recursive=True)
            except FileNotFoundError as error:
                self._check_bucket(error)

    def arrow(self, path: str) -> tuple[Any, str]:
        """`path` for libraries that write through pyarrow (Ray Train): a file system and the path on it.

        On a directory the file system is ``None``: the path alone says it all.
        """
        if self.local:
            return None, self._full(path)
        from pyarrow.fs import FSSpecHandler, PyFileSystem

        return PyFileSystem(FSSpecHandler(self.fs)), self._full(path)

    def full_url(self, path: str) -> str:
        """`path` for libraries that open URLs by themselves: a directory path, or ``s3://bucket/prefix/path``."""
        return self._full(path) if self.local else str(self.fs.unstrip_protocol(self._full(path)))

    def _full(self, path: str) -> str:
        if path.startswith("/") or ".." in path.split("/"):
            raise BadInput(f"'{path}' leaves the storage")
        return f"{self.root.rstrip('/')}/{path}".rstrip("/")

    def _create(self, path: str, data: bytes) -> bool:
        target = self._full(path)
        with self._errors():
            try:
                if self.local:
                    with _temporary(Path(target)) as temporary:
                        _write_durably(temporary, data)
                        _link(temporary, target)
                else:
                    return self._create_object(target, data)
            except FileExistsError:
                return False
        return True

    def _create_object(self, target: str, data: bytes) -> bool:
        for wait in (*CONFLICT_WAITS, None):
            try:
                self.fs.pipe_file(target, data, mode="create")
                return True
            except OSError as error:
                code = _s3_code(error)
                if code in ("PreconditionFailed", "412"):  # s3fs knows only the wording of AWS as FileExistsError.
                    return False
                if code not in ("ConditionalRequestConflict", "409") or wait is None:
                    raise
                time.sleep(wait)
        raise AssertionError("the last round returns or raises")

    def _check_exclusive(self) -> None:
        """Once for each object: a store that takes a second creation for a write would lose versions in silence."""
        self._create(PROBE, b"made twice to see whether this store refuses the second time\n")
        if self._create(PROBE, b"made twice to see whether this store refuses the second time\n"):
            raise Unavailable(
                f"{self.url} does not honour If-None-Match on writes, so concurrent publishers would overwrite each other; "
                "use a store that does, or a directory"
            )
        self._exclusive = True

    def _check_bucket(self, error: BaseException) -> None:
        """s3fs reports a missing bucket like a missing object; only the latter is an ordinary answer."""
        if _s3_code(error) == "NoSuchBucket":
            raise Unavailable(f"{self.url}: the bucket does not exist; create it or correct storage.url") from error

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (BadInput, NotFound, Unavailable):
            raise
        except Exception as error:
            if is_disk_full(error):
                raise ResourcesShort(f"{self.url}: no space left; free some or use another storage.url") from error
            if isinstance(error, FileNotFoundError):
                self._check_bucket(error)
            if isinstance(error, OSError) or type(error).__module__.partition(".")[0] in CLIENTS:
                raise Unavailable(f"{self.url}: {_reason(error)}") from error
            raise


def _s3_code(error: BaseException) -> str:
    """The error code S3 answered with, under what s3fs made of it; empty for other errors."""
    response = getattr(error.__cause__, "response", {})
    return str(response.get("Error", {}).get("Code", ""))


def _reason(error: Exception) -> str:
    name = type(error).__name__
    if name == "NoCredentialsError":
        return "no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give the node an identity"
    if isinstance(error, PermissionError):
        return f"access is denied ({error.strerror or error}); check the credentials, or the owner of the directory"
    return f"{str(error).strip().partition(chr(10))[0] or name}; check storage.url and storage.options"


def _link(file: Path, target: str) -> None:
    try:
        os.link(file, target)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP):
            raise
        raise Unavailable(
            f"the file system of {target} has no hard links, which exclusive creation needs; use another directory, or s3://"
        ) from error


@contextmanager
def _temporary(target: Path) -> Iterator[Path]:
    """A hidden name beside `target` that is gone afterwards, renamed or removed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".{target.name}.{uuid.uuid4().hex}.tmp"
    try:
        yield temporary
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


def _write_durably(file: Path, data: bytes) -> None:
    file.write_bytes(data)
    _sync(file)


def _sync(file: Path) -> None:
    handle = os.open(file, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
