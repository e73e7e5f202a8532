from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.config import Config, EmbedderConfig
from cluster.models import resolve
from retrieval.embed import Embedder, batches, embedding_text
from retrieval.types import Chunk


@given(st.lists(st.integers(1, 50)), st.integers(1, 200))
def test_batches_cover_every_index_once_within_the_budget(lengths: list[int], budget: int) -> None:
    found = list(batches(lengths, budget))
    assert sorted(index for batch in found for index in batch) == list(range(len(lengths)))
    assert all(len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget for batch in found)


def test_short_texts_share_a_batch() -> None:
    assert list(batches([1, 100, 2, 3], 100)) == [[1], [3, 2, 0]]


def test_a_chunk_is_embedded_with_title_and_heading() -> None:
    chunk = Chunk("id", "fares", "Fares", "Fees > Trailers", "A trailer costs 3.", 0, "fares.md")
    assert embedding_text(chunk) == "Fares\nFees > Trailers\nA trailer costs 3."


@pytest.fixture(scope="module")
def directory() -> Path:
    return resolve(EmbedderConfig(), Path(Config().models_cache).expanduser())


def test_vectors_are_unit_in_order_and_independent_of_the_batch(directory: Path) -> None:
    texts = ["The ferry leaves at noon.", "Dogs stay on the car deck of the vessel. " * 4, "Refunds take 12 days."]
    embedder = Embedder(directory, EmbedderConfig())
    together = embedder.embed(texts)
    assert together.shape == (3, embedder.dimension) and together.dtype == np.float32
    assert np.allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    alone = Embedder(directory, EmbedderConfig(batch_tokens=64)).embed(texts[::-1])[::-1]
    assert np.allclose(together, alone, atol=1e-4)
    question = embedder.embed(["When does the boat sail?"], query=True)[0]
    assert int(np.argmax(together @ question)) == 0
    assert embedder.embed([]).shape == (0, embedder.dimension)


def test_threads_do_not_disturb_each_other(directory: Path) -> None:
    embedder = Embedder(directory, EmbedderConfig())
    texts = ["ferry " * (1 + number * 7 % 60) + str(number) for number in range(32)]
    expected = embedder.embed(texts)
    with ThreadPoolExecutor(8) as pool:
        counts = pool.map(embedder.count_tokens, texts * 4)
        found = list(pool.map(lambda text: embedder.embed([text])[0], texts))
    assert np.allclose(found, expected, atol=1e-4)
    assert list(counts) == [embedder.count_tokens(text) for text in texts] * 4


def test_text_over_the_limit_is_cut_and_still_counted_in_full(directory: Path) -> None:
    embedder = Embedder(directory, EmbedderConfig(max_tokens=16))
    long = "ferry " * 600
    assert embedder.count_tokens(long) == 600
    assert embedder.count_tokens("") == 0
    assert np.allclose(embedder.embed([long])[0], embedder.embed(["ferry " * 14])[0], atol=1e-5)


def test_the_fingerprint_follows_the_content(directory: Path, tmp_path: Path) -> None:
    for path in directory.rglob("*"):
        if path.is_file():
            copy = tmp_path / path.relative_to(directory)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    original = Embedder(directory, EmbedderConfig()).fingerprint
    assert Embedder(tmp_path, EmbedderConfig(source="./here")).fingerprint == original
    config = tmp_path / "1_Pooling" / "config.json"
    config.write_text(config.read_text() + "\n")
    assert Embedder(tmp_path, EmbedderConfig()).fingerprint != original
