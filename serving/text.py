"""Token ids -> text, piece by piece, without ever showing half a character."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

REPLACEMENT = "\ufffd"
"""What a tokenizer decodes an incomplete UTF-8 sequence to."""


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
