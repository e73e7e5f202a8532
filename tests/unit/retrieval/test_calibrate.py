"""What calibration says of embedders that understand, that do not, and that pack their cosines."""

import json
import random
import re
import zlib
from collections.abc import Sequence

import numpy as np
import pytest

from retrieval.calibrate import DRAWS, FEWEST, PROBE, SAMPLE, UNCALIBRATED, Calibration, calibrate, fragment
from retrieval.embed import Vectors

_draw = random.Random(5)
TEXTS = [" ".join(f"word{_draw.randrange(3000)}" for _ in range(30)) + "." for _ in range(200)]
PLAIN = re.compile(r"[a-z0-9]+")


class Words:
    """Hash-of-words vectors; of words with a letter that is not ASCII it knows nothing."""

    dimension = 256
    fingerprint = "words"

    def __init__(self, packed: float = 0.0) -> None:
        self._packed = packed
        self.asked: list[int] = []

    def count_tokens(self, text: str) -> int:
        return len(text.split())

    def embed(self, texts: Sequence[str], *, query: bool = False) -> Vectors:
        self.asked.append(len(texts))
        vectors = np.full((len(texts), self.dimension + 1), 1e-3, dtype=np.float32)
        for row, text in enumerate(texts):
            for word in text.lower().split():
                word = word.strip(".,")
                if PLAIN.fullmatch(word):
                    vectors[row, zlib.crc32(word.encode()) % self.dimension] += 1
        vectors[:, :-1] /= np.linalg.norm(vectors[:, :-1], axis=1, keepdims=True)
        # Cosines of the whole are (packed + cosine) / (packed + 1).
        vectors[:, -1] = np.sqrt(self._packed)
        whole: Vectors = vectors / np.sqrt(self._packed + 1)
        return whole


def foreign(text: str) -> str:
    return " ".join(f"{word}ữ" for word in text.split())


def test_texts_that_are_understood_are_trusted() -> None:
    made = calibrate(Words(), TEXTS)
    assert made.sample == SAMPLE
    assert made.lift > 0.2
    assert made.trust == 1


def test_texts_in_an_unknown_language_are_not() -> None:
    made = calibrate(Words(), map(foreign, TEXTS))
    assert made.probe_lift == calibrate(Words(), TEXTS).probe_lift
    assert made.lift < 0.05
    assert made.trust < 0.2


def test_half_a_language_is_trusted_in_part() -> None:
    mixed = [" ".join(w if i % 7 == 0 else w + "ữ" for i, w in enumerate(text.split())) for text in TEXTS]
    known, half, none = (calibrate(Words(), each).lift for each in (TEXTS, mixed, map(foreign, TEXTS)))
    assert known > half > none


def test_packed_cosines_change_the_scale_and_not_the_trust() -> None:
    wide, packed = calibrate(Words(), TEXTS), calibrate(Words(packed=4.0), TEXTS)
    assert packed.lift == pytest.approx(wide.lift / 5, abs=1e-3)
    assert packed.scale == pytest.approx(wide.scale / 5, abs=1e-3)
    assert packed.trust == pytest.approx(wide.trust, abs=0.02)


def test_texts_that_are_all_alike_are_trusted_less() -> None:
    """Vectors of a form that is filled in again and again differ little; the words that were filled in tell them apart."""
    form = "On every day of the week the keeper of the station on the hill reads the meter of post {0} and writes {0} down."
    made = calibrate(Words(), [form.format(f"x{number}") for number in range(100)])
    assert made.trust < calibrate(Words(), TEXTS).trust


def test_order_and_repeats_do_not_matter() -> None:
    shuffled = random.Random(1).sample(TEXTS, len(TEXTS))
    assert calibrate(Words(), [*shuffled, *TEXTS[:50], " "]) == calibrate(Words(), TEXTS)
    assert calibrate(Words(), TEXTS[:100]) != calibrate(Words(), TEXTS[100:])


def test_work_is_bounded() -> None:
    embedder = Words()
    calibrate(embedder, (f"{text} and again {number}" for number in range(20) for text in TEXTS))
    assert embedder.asked == [DRAWS * len(PROBE), len(PROBE), DRAWS * SAMPLE, SAMPLE]


def test_too_few_texts_are_not_judged() -> None:
    made = calibrate(Words(), TEXTS[: FEWEST - 1])
    assert (made.sample, made.lift, made.trust) == (0, made.probe_lift, 1.0)
    assert calibrate(Words(), []) == made


def test_it_travels_as_json() -> None:
    made = calibrate(Words(), TEXTS)
    assert Calibration.from_dict(json.loads(json.dumps(made.to_dict()))) == made
    assert UNCALIBRATED.trust == 1


def test_a_fragment_is_whole_words_of_the_text() -> None:
    draw = random.Random(3)
    for text in TEXTS[:50]:
        piece = fragment(text, draw)
        assert piece in text
        assert len(piece) <= len(text) / 2
        assert set(piece.split()) <= set(text.split())
    assert len(fragment("東京都は日本の首都である。人口は約千四百万人で、" * 3, draw)) >= 24
    assert fragment("x", draw) == "x"
