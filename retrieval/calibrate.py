"""How far an embedder is to be trusted on a collection, measured without questions or judgements.

A text that is asked for by a fragment of itself stands out from unrelated texts by some cosine: the *lift*. Embedders
differ in it (their cosines are spread wide or packed together), so it is measured twice: on :data:`PROBE`, plain
English that every text embedder knows, and on a sample of the collection. The larger is the embedder's scale, in which
:func:`retrieval.fuse.auto` reads its cosines. A lift far below that scale means that the embedder does not understand
these texts (an English one on Vietnamese), and the dense side loses weight.

About 90 texts and 260 fragments of some words are embedded: 2 to 5 seconds with all-MiniLM-L6-v2 on one core. Pure but
for the embedder; the same texts give the same numbers. Not covered: how good BM25 is (a side that finds little has
little to say in the fusion anyway), and questions in another language than the texts.
"""

from __future__ import annotations

import hashlib
import heapq
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from retrieval.embed import Embeds, embedding_text
from retrieval.filters import And, Compare, live

if TYPE_CHECKING:
    from retrieval.store import Store
    from retrieval.types import Snapshot

SAMPLE = 64
"""Texts of the collection that are looked at."""
FEWEST = 8
"""With fewer texts the lift on them says nothing, and that of the probe stands in for it."""
CHARACTERS = 600
"""Of each text; bounds the time with large chunks."""
DRAWS = 3
"""Fragments of each text."""
SEED = 17
UNKNOWN, UNDERSTOOD = 0.3, 0.65
"""Share of the embedder's scale that the lift reaches on texts it does not understand at all, and on texts it does.
all-MiniLM-L6-v2: English 0.7 (narrow subjects, where all texts are alike) to 1, German and Vietnamese 0.5, Thai 0.35."""

PROBE = (
    "The ferry leaves the harbour at six and crosses to the island in forty minutes. Cars must be on board a quarter of an hour earlier.",
    "Knead the dough until it is smooth, cover the bowl with a cloth and let it rise for two hours. Bake the loaf in a hot oven.",
    "A judge may order that the costs of both parties be paid by the one who lost the case. An appeal has to be filed within thirty days.",
    "The patient had a high fever and a dry cough for a week. Blood tests showed no infection, and the lungs were clear.",
    "Interest on the loan is charged every month on what is still owed. Paying back early is free of charge after the third year.",
    "The goalkeeper saved two penalties, and the home team won the cup for the first time in its history.",
    "Replace the filter of the pump when the red lamp is on. Switch the machine off and let it cool before the cover is opened.",
    "Whales come up to breathe and dive again for up to an hour. They find their way in the dark by sound.",
    "The treaty ended the war between the two kingdoms and drew a new border along the river.",
    "Plants turn sunlight, water and carbon dioxide into sugar. Oxygen is what they give back to the air.",
    "The painter mixed his own colours and worked at night by candle light. Most of his pictures hang in small churches.",
    "A function that calls itself needs a condition under which it stops. Otherwise the stack runs over and the program ends.",
    "Employees have twenty-five days of paid leave a year. Days that are not taken by March are lost.",
    "The comet passes close to the sun every seventy-six years and can be seen without a telescope.",
    "Water the tomatoes in the morning, not on the leaves but at the root, and tie them to a stick when they grow tall.",
    "The bridge was closed to lorries after engineers had found cracks in two of its pillars.",
    "Prices of houses fell in the north last year while rents in the capital went on rising.",
    "She learned to play the violin at the age of four and gave her first concert when she was nine.",
    "Glass is made by melting sand with soda and lime. Small amounts of metal give it a colour.",
    "The parcel was sent back because nobody was at home to sign for it. A second delivery can be booked on the web page.",
    "Volcanoes form where plates of the crust move apart or one slides under another.",
    "The school offers evening courses in three languages. A test on the first day decides who joins which group.",
    "Voters over eighteen choose the members of parliament every four years by secret ballot.",
    "A battery holds less charge in the cold. Keep the phone in an inner pocket when you go skiing.",
)


@dataclass(frozen=True)
class Calibration:
    """What :func:`calibrate` measured. Cosines, between -1 and 1."""

    lift: float
    """How far a text of the collection stands out when it is asked for by a fragment of itself."""
    probe_lift: float
    """The lift on :data:`PROBE`: what this embedder reaches where it understands."""
    sample: int
    """Texts of the collection that were looked at; 0 if it was not measured."""

    @property
    def scale(self) -> float:
        """The cosine difference that tells found from not found with this embedder."""
        return max(self.lift, self.probe_lift, 0.01)

    @property
    def trust(self) -> float:
        """Of the dense side, in [0, 1]."""
        return min(1.0, max(0.0, (self.lift / self.scale - UNKNOWN) / (UNDERSTOOD - UNKNOWN)))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Calibration:
        """Read back what :meth:`to_dict` wrote."""
        return cls(**data)


UNCALIBRATED = Calibration(lift=0.36, probe_lift=0.36, sample=0)
"""For collections that were not measured: all-MiniLM-L6-v2 on English."""


def stored(snapshot: Snapshot) -> Calibration:
    """The calibration that a version was made with, or the neutral one."""
    return Calibration.from_dict(snapshot.calibration) if snapshot.calibration else UNCALIBRATED


def calibrate(embedder: Embeds, texts: Iterable[str]) -> Calibration:
    """Measure `embedder` on a collection.

    Args:
        texts: what was embedded for its chunks, in any order; :data:`SAMPLE` of them are chosen by their hash, so that
            a collection that changes a little is judged by nearly the same texts.
    """
    sample = heapq.nsmallest(SAMPLE, {text[:CHARACTERS] for text in texts if text.strip()}, key=_hash)
    probe_lift = _lift(embedder, PROBE)
    if len(sample) < FEWEST:
        return Calibration(probe_lift, probe_lift, 0)
    return Calibration(_lift(embedder, sample), probe_lift, len(sample))


def measured(store: Store, embedder: Embeds, snapshot: Snapshot) -> dict[str, Any]:
    """The calibration of `snapshot` as a detail of its version; reads some hundred rows, however many there are.

    They are those with the lowest chunk ids, which are hashes.
    """
    visible = live(snapshot.reads)
    share = min(1.0, 4 * SAMPLE / max(1, store.count(snapshot.collection, visible)))
    low = Compare("chunk_id", "<=", f"{int(share * 0xFFFFFFFF):08x}" + "f" * 24)
    rows = store.rows(snapshot.collection, And((visible, low)), ("title", "heading", "text"))
    texts = (embedding_text(row["title"], row["heading"], row["text"]) for row in rows)
    return {"calibration": calibrate(embedder, texts).to_dict()}


def fragment(text: str, random: random.Random) -> str:
    """An eighth of `text` from anywhere in it, at least 24 characters but at most half; whole words, where it has spaces."""
    length = min(max(len(text) // 8, 24), max(len(text) // 2, 1))
    start = random.randrange(len(text) - length + 1)
    piece = text[start : start + length]
    words = piece.split()
    if len(words) > 2:
        cut_left = start > 0 and not text[start - 1].isspace() and not piece[0].isspace()
        after = text[start + length : start + length + 1]
        cut_right = bool(after) and not after.isspace() and not piece[-1].isspace()
        piece = " ".join(words[cut_left : len(words) - cut_right])
    return piece.strip() or text


def _lift(embedder: Embeds, texts: Sequence[str]) -> float:
    """Mean cosine of fragment and text above that of fragment and other texts."""
    draw = random.Random(SEED)
    asked = embedder.embed([fragment(text, draw) for _ in range(DRAWS) for text in texts], query=True)
    cosines = (asked @ embedder.embed(texts).T).astype(np.float64).reshape(DRAWS, len(texts), len(texts)).mean(axis=0)
    own = float(np.trace(cosines)) / len(texts)
    background = float(cosines.sum() - np.trace(cosines)) / (len(texts) * (len(texts) - 1))
    return round(own - background, 4)


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest()
