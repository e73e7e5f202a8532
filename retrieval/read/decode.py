"""Bytes -> text: byte order marks, UTF-8, UTF-16, what the file declares, then legacy encodings, if one is sure.

What is not Unicode is guessed from the bytes: Vietnamese ones (windows-1258, TCVN3) by whether what they spell are
Vietnamese syllables, the others by charset-normalizer among :data:`LEGACY`. Where that is not sure, nothing is read:
wrong letters in an index are worse than a file that is reported.

Not covered: VNI and VPS, which also spell Vietnamese; EBCDIC, DOS and Macintosh code pages.
"""

from __future__ import annotations

import codecs
import re
import unicodedata

from charset_normalizer import from_bytes

from retrieval.read.base import Unreadable

BOMS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
LEGACY = (
    *("cp1252", "cp1250", "cp1251", "cp1253", "cp1254", "cp1255", "cp1256", "cp1257", "iso8859_2", "koi8_r"),
    *("cp932", "euc_jp", "gb18030", "big5", "cp949"),
)
"""In order of preference where two spell the same text equally well."""
MANY_BYTES = ("cp932", "euc_jp", "gb18030", "big5", "cp949")
NAMES = {"cp932": "Shift_JIS", "koi8_r": "KOI8-R", "iso8859_2": "ISO-8859-2", "euc_jp": "EUC-JP", "cp949": "EUC-KR"}
SAMPLE = 65_536
"""Bytes of lines with letters beyond ASCII that a guess looks at."""
HIGH_CONTROLS = re.compile(rb"[\x80-\x9f]")
"""Bytes that TCVN3 has no letters for."""
HIGH = re.compile(rb"[\x80-\xff]")

TCVN3 = dict(
    zip(
        range(0xA1, 0x100),
        "ĂÂÊÔƠƯĐăâêôơưđẰ\u0300\u0309\u0303\u0301\u0323àảãáạẲằẳẵắẴẮẦẨẪẤỀặầẩẫấậèỂẻẽéẹềểễếệìỉỄẾỒĩíịòỔỏõóọồổỗốộờởỡớợùỖủũúụừửữứựỳỷỹýỵỐ",
        strict=True,
    )
)
"""Bytes of TCVN 5712:1993, which fonts named ``.Vn…`` show as Vietnamese."""
SYLLABLE = re.compile(
    "(?:b|ch?|d|đ|gh?|gi|h|kh?|l|m|nh?|ngh?|ph?|qu|r|s|th?|tr|v|x)?"
    "(?:[aăâeêioôơuưy]|[aoôơuưâ]i|[aâou]y|[aeo]o|[aâêiư]u|i[aê]|o[aăe]|u[aâêôơy]|ư[aơ]|yê|oa[iyo]|oeo|uây|uôi|ươ[iu]|uy[aêu]|[iy]êu)"
    "(?:ch?|m|n|ng|nh|p|t)?"
)
"""A Vietnamese syllable without its tone."""
TONES = dict.fromkeys(map(ord, "\u0300\u0301\u0303\u0309\u0323"))
LETTERS = re.compile(r"[^\W\d_]+")


def decode(data: bytes, declared: str = "") -> tuple[str, str]:
    """The text in `data`, and a note if its encoding was guessed.

    Args:
        declared: encoding that the file itself names, as HTML does; tried after UTF-8.

    Raises:
        Unreadable: it is not text, or not in an encoding that can be told.
    """
    for mark, encoding in BOMS:
        if data.startswith(mark):
            return _strict(data.removeprefix(mark), encoding), ""
    if b"\0" in data:
        if encoding := _without_mark(data):
            return _strict(data, encoding), ""
        raise Unreadable("not a text file (it holds NUL bytes)")
    try:
        return data.decode(), ""
    except UnicodeDecodeError as error:
        place = error.start
    if declared and (text := _declared(data, declared)) is not None:
        return text, ""
    if _mostly_utf8(data):
        raise Unreadable(f"not UTF-8 (byte {place}), though most of it is; mend it there")
    text, name = _vietnamese(data) or _legacy(data) or ("", "")
    if not name:
        raise Unreadable(f"not UTF-8 (byte {place}), and its encoding cannot be told; convert it to UTF-8")
    return text, f"read as {name}; convert it to UTF-8 if that is wrong"


def _strict(data: bytes, encoding: str) -> str:
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise Unreadable(f"not {encoding.upper()} (byte {error.start}); convert it to UTF-8") from None
    if "\0" in text:
        raise Unreadable("not a text file (it holds NUL bytes)")
    return text


def _without_mark(data: bytes) -> str:
    """UTF-16 that is mostly Latin letters has a NUL in every second byte."""
    half = max(1, len(data) // 2)
    even, odd = data[::2].count(0) / half, data[1::2].count(0) / half
    if odd > 0.4 and even < 0.05:
        return "utf-16-le"
    return "utf-16-be" if even > 0.4 and odd < 0.05 else ""


def _declared(data: bytes, name: str) -> str | None:
    """Text in the declared encoding; ISO-8859-1 means windows-1252, as the WHATWG encoding standard has it."""
    try:
        encoding = codecs.lookup(name).name
        return data.decode("cp1252" if encoding in ("iso8859-1", "ascii") else encoding)
    except (LookupError, UnicodeDecodeError):
        return None


def _mostly_utf8(data: bytes) -> bool:
    text = data.decode("utf-8", "replace")
    broken = text.count("\ufffd")
    return len(text) - len(text.encode("ascii", "ignore")) - broken > 3 * broken


def _vietnamese(data: bytes) -> tuple[str, str] | None:
    for name, spell in (("windows-1258", _cp1258), ("TCVN3", _tcvn3)):
        text = spell(data)
        words = {word for word in LETTERS.findall(text[: 4 * SAMPLE].lower()) if not word.isascii()}
        spelled = sum(map(_is_syllable, words))
        if spelled >= 5 and spelled >= 0.9 * len(words) and "\ufffd" not in text:
            return text, name
    return None


def _cp1258(data: bytes) -> str:
    return unicodedata.normalize("NFC", data.decode("cp1258", "replace"))


def _tcvn3(data: bytes) -> str:
    if HIGH_CONTROLS.search(data):
        return ""
    return unicodedata.normalize("NFC", data.decode("latin-1").translate(TCVN3))


def _is_syllable(word: str) -> bool:
    marked = unicodedata.normalize("NFD", word)
    bare = marked.translate(TONES)
    return len(marked) - len(bare) <= 1 and SYLLABLE.fullmatch(unicodedata.normalize("NFC", bare)) is not None


def _legacy(data: bytes) -> tuple[str, str] | None:
    sample = b"\n".join(line for line in data.splitlines() if not line.isascii())[:SAMPLE]
    sample = sample or data[:SAMPLE]
    found = sorted(from_bytes(sample, cp_isolation=[*LEGACY]), key=lambda match: match.chaos)
    alike = [match for match in found if match.chaos <= min(0.2, found[0].chaos + 0.01)]
    best = max((match.coherence for match in alike), default=0.0)
    names = [match.encoding for match in alike if match.coherence >= best - 0.02]
    share = len(HIGH.findall(sample)) / len(sample)
    for name in LEGACY:
        if name in names and (share >= 0.3 if name in MANY_BYTES else best >= 0.2):
            try:
                return data.decode(name), NAMES.get(name, name.replace("cp", "windows-"))
            except UnicodeDecodeError:
                return None
    return None
