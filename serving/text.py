"""Token ids -> text, piece by piece, without ever showing half a character or part of a stop string."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

REPLACEMENT = "\ufffd"
"""What a tokenizer decodes an incomplete UTF-8 sequence to."""
BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
"""How SentencePiece writes a byte that it has no piece for."""


def _byte_alphabet() -> dict[str, int]:
    """Character -> byte, as byte-level BPE writes them (GPT-2's ``bytes_to_unicode``, the other way round)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(others)}


BYTES = _byte_alphabet()


class Detokenizer:
    """Decodes a growing answer; only the tail since the last shown piece is decoded again."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.text = ""
        self.prefix = 0
        """First id of the window that is decoded; the window starts with ids already shown, for the spaces between."""
        self.shown = 0

    def push(self, ids: Sequence[int]) -> str:
        """Take more ids; returns the text that is now certain."""
        self.ids.extend(ids)
        piece = self._window()
        if not ids or piece.endswith(REPLACEMENT):
            return ""
        return self._show(piece)

    def flush(self) -> str:
        """What is left at the end, broken characters and all."""
        return self._show(self._window())

    def _window(self) -> str:
        before = self._decode(self.ids[self.prefix : self.shown])
        return self._decode(self.ids[self.prefix :])[len(before) :]

    def _show(self, piece: str) -> str:
        self.prefix, self.shown = self.shown, len(self.ids)
        self.text += piece
        return piece

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


class StopText:
    """The text of a growing answer up to its first stop string; what may become one is held back.

    The stop string that is complete first ends the answer, of several the longest; the text comes without it. What is
    shown does not depend on how the ids were cut into steps.

    Args:
        stop: strings that end the answer, none of them empty.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self.detokenizer = Detokenizer(tokenizer)
        self.stop = stop
        self.text = ""
        """What was shown."""
        self.held = ""
        self.stopped = False

    def push(self, ids: Sequence[int]) -> str:
        """Take more ids; returns the text that is now certain to be part of the answer."""
        return "" if self.stopped else self._show(self.detokenizer.push(ids))

    def flush(self) -> str:
        """What is left when no more ids come."""
        return "" if self.stopped else self._show(self.detokenizer.flush(), last=True)

    def _show(self, piece: str, last: bool = False) -> str:
        text = self.held + piece
        found = [(start + len(stop), start) for stop in self.stop if (start := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            border = min(found)[1]
        else:
            border = len(text) - (0 if last else self._begun(text))
        shown, self.held = text[:border], text[border:]
        self.text += shown
        return shown

    def _begun(self, text: str) -> int:
        """Length of the longest end of `text` that a stop string begins with."""
        longest = max((len(stop) for stop in self.stop), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self.stop):
                return length
        return 0


class Pieces:
    """What single tokens stand for: their text and their bytes, as OpenAI's ``logprobs`` tell them."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.anchor = tokenizer.encode("a", add_special_tokens=False)[-1:]
        """A token before the one in question, because some tokenizers drop the space that a text begins with."""
        self.before = self._decode(self.anchor)

    def of(self, token: int) -> tuple[str, list[int]]:
        """Text and bytes of `token`; part of a character has the replacement character as its text."""
        text = self._decode([*self.anchor, token])[len(self.before) :]
        if REPLACEMENT not in text:
            return text, list(text.encode())
        piece = self.tokenizer.convert_ids_to_tokens(token)
        if match := BYTE_PIECE.fullmatch(piece):
            return text, [int(match[1], 16)]
        if all(character in BYTES for character in piece):
            return text, [BYTES[character] for character in piece]
        return text, list(text.encode())

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids))
