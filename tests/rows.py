"""Rows of a collection for tests of the store, and vectors that need no model."""

from __future__ import annotations

import re
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt

from retrieval.filters import And, Condition
from retrieval.store import ALIVE, Row, Store

DIMENSION = 64
EMBEDDER = "words"
ALL = And(())


def vector(text: str) -> npt.NDArray[np.float32]:
    """Hash-of-words, of length 1: texts that share words are near."""
    made = np.full(DIMENSION, 1e-3, dtype=np.float32)
    for word in re.findall(r"\w+", text.lower()):
        made[zlib.crc32(word.encode()) % DIMENSION] += 1
    return made / np.float32(np.linalg.norm(made))


def row(number: int, **values: Any) -> Row:
    """A live row of the tenant ``default`` for everyone, all of it told by `number` but what `values` say."""
    text = values.get("text", f"word{number}")
    return {
        "row_id": f"c{number}-1", "chunk_id": f"c{number}", "doc_id": "doc", "title": "", "heading": "", "text": text,
        "search_text": text, "source": "doc.md", "position": number, "page": 0, "start": 0, "end": len(text),
        "digest": text, "vector_key": text, "tenant": "default", "groups": ["everyone"], "born": 1, "died": ALIVE,
        "metadata": {}, "dense": vector(text).tolist(),
    } | values  # fmt: skip


def ids(store: Store, collection: str, condition: Condition) -> set[str]:
    """Chunks under `condition`."""
    return {found["chunk_id"] for found in store.rows(collection, condition, ["chunk_id"])}
