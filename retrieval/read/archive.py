"""Guards for files that are ZIP archives of XML: what they unpack to is known before a parser sees it.

Every member is unpacked once in small pieces, because what the directory of an archive declares can be a lie. Document
types are refused: no office file has one, and entities (the billion laughs) need one.
"""

from __future__ import annotations

import io
import zipfile
import zlib

from retrieval.read.base import Unreadable

MOST_MEMBERS = 10_000
RATIO = 200
"""How often smaller than its content a member may be; text rarely is more than 50 times."""
HARMLESS = 10_000_000
"""Bytes of a member up to which the ratio does not matter."""
PIECE = 1 << 20


def check(data: bytes, longest: int) -> None:
    """Look through the archive in `data`.

    Args:
        longest: bytes that all members may have together.

    Raises:
        Unreadable: broken, a bomb, or with a document type.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = archive.infolist()
            if len(members) > MOST_MEMBERS:
                raise Unreadable(f"holds {len(members):,} parts; an office file has hundreds at most")
            if sum(member.file_size for member in members) > longest:
                raise _bomb(longest)
            total = 0
            for member in members:
                total += _unpacked(archive, member, longest - total)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError, OSError) as error:
        raise Unreadable(f"broken ({error}); save it again") from None


def _unpacked(archive: zipfile.ZipFile, member: zipfile.ZipInfo, room: int) -> int:
    """Bytes that `member` really unpacks to."""
    size = 0
    end = b""
    with archive.open(member) as file:
        while piece := file.read(PIECE):
            size += len(piece)
            if size > room:
                raise _bomb(room)
            if size > max(HARMLESS, RATIO * member.compress_size):
                raise Unreadable(f"{member.filename} unpacks to more than {RATIO} times its size; not read")
            if b"<!DOCTYPE" in end + piece and member.filename.lower().endswith((".xml", ".rels")):
                raise Unreadable(f"{member.filename} declares a document type, which no office file does; not read")
            end = piece[-16:]
    return size


def _bomb(longest: int) -> Unreadable:
    return Unreadable(f"unpacks to more than {longest / 1e6:.0f} MB; raise knowledge.max_file_mb if that is right")
