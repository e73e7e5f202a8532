import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer

from cluster.config import Config, EmbedderConfig
from cluster.models import resolve
from retrieval.embed import Embedder, Vectors, batches, embedding_text, token_counter


@given(st.lists(st.integers(1, 50)), st.integers(1, 200))
def test_batches_cover_every_index_once_within_the_budget(lengths: list[int], budget: int) -> None:
    found = list(batches(lengths, budget))
    assert sorted(index for batch in found for index in batch) == list(range(len(lengths)))
    assert all(len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget for batch in found)


def test_short_texts_share_a_batch() -> None:
    assert list(batches([1, 100, 2, 3], 100)) == [[1], [3, 2, 0]]


def test_a_chunk_is_embedded_with_title_and_heading() -> None:
    assert (
        embedding_text("Fares", "Fees > Trailers", "A trailer costs 3.") == "Fares\nFees > Trailers\nA trailer costs 3."
    )


@pytest.fixture(scope="module")
def directory() -> Path:
    return resolve(EmbedderConfig(), Path(Config().models_cache).expanduser())


@pytest.fixture(scope="module")
def mixed() -> list[str]:
    """Texts of 1 to 400 words, more than one batch of them, in no order of length."""
    words = ["ferry", "dog", "ticket", "storm", "trailer", "Đồng", "Tháp", "1,250", "e-mail"]
    random = Random(3)
    return [" ".join(random.choices(words, k=1 + number * 37 % 113)) for number in range(40)] + ["ferry " * 400, " "]


@pytest.fixture(scope="module")
def expected(directory: Path, mixed: list[str]) -> Vectors:
    """What sentence-transformers itself says, in float32."""
    model = SentenceTransformer(str(directory), local_files_only=True, device="cpu")
    model.max_seq_length = 256
    return model.encode_document(mixed, normalize_embeddings=True)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("budget", [64, 1024])
def test_vectors_are_those_of_sentence_transformers(
    directory: Path, mixed: list[str], expected: Vectors, budget: int, threads: int
) -> None:
    config = EmbedderConfig(dtype="float32", device="cpu", batch_tokens=budget)
    found = Embedder(directory, config, threads=threads).embed(mixed)
    assert np.abs(found - expected).max() < 1e-5


@pytest.mark.parametrize(("dtype", "closest"), [("auto", 0.999), ("bfloat16", 0.99)])
def test_half_precision_stays_close_and_questions_are_whole(
    directory: Path, mixed: list[str], expected: Vectors, dtype: Literal["auto", "bfloat16"], closest: float
) -> None:
    embedder = Embedder(directory, EmbedderConfig(dtype=dtype, device="cpu"))
    assert (embedder.embed(mixed) * expected).sum(axis=1).min() > closest
    assert embedder.fingerprint == Embedder(directory, EmbedderConfig(dtype="float32", device="cpu")).fingerprint
    if dtype == "auto":
        assert np.abs(embedder.embed(mixed, query=True) - expected).max() < 1e-5


def test_a_model_says_how_it_is_asked(directory: Path, tmp_path: Path) -> None:
    """By the prompts of its own configuration."""
    copy = tmp_path / "model"
    shutil.copytree(directory, copy)
    prompts = {"query": "question: ", "document": "passage: "}
    (copy / "config_sentence_transformers.json").write_text(json.dumps({"prompts": prompts}))
    embedder = Embedder(copy, EmbedderConfig(dtype="float32", device="cpu"))
    plain = Embedder(directory, EmbedderConfig(dtype="float32", device="cpu"))
    asked, told = embedder.embed(["Dogs?"], query=True), embedder.embed(["Dogs?"])
    assert np.abs(asked - plain.embed(["question: Dogs?"])).max() < 1e-5
    assert np.abs(told - plain.embed(["passage: Dogs?"])).max() < 1e-5
    assert np.abs(asked - told).max() > 0.01


def test_an_interrupted_call_leaves_the_embedder_usable(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    embedder = Embedder(directory, EmbedderConfig(batch_tokens=64, device="cpu"), threads=2)
    texts = [f"ferry number {number} " * 8 for number in range(24)]
    expected, forward, seen = embedder.embed(texts), embedder._forward, []

    def interrupted(*args: Any) -> Vectors:
        seen.append(1)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return forward(*args)

    monkeypatch.setattr(embedder, "_forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        embedder.embed(texts)
    assert len(seen) < 24
    monkeypatch.undo()
    assert np.allclose(embedder.embed(texts), expected, atol=1e-4)


@settings(max_examples=50, deadline=None)
@given(st.text())
def test_tokens_are_counted_alike_without_the_weights(counters: tuple[Any, Any], text: str) -> None:
    embedder, alone = counters
    assert alone(text) == embedder.count_tokens(text)


@pytest.fixture(scope="module")
def counters(directory: Path) -> tuple[Any, Any]:
    return Embedder(directory, EmbedderConfig()), token_counter(directory, EmbedderConfig())


def test_vectors_are_unit_in_order_and_independent_of_the_batch(directory: Path) -> None:
    texts = ["The ferry leaves at noon.", "Dogs stay on the car deck of the vessel. " * 4, "Refunds take 12 days."]
    embedder = Embedder(directory, EmbedderConfig(dtype="float32"))
    together = embedder.embed(texts)
    assert together.shape == (3, embedder.dimension) and together.dtype == np.float32
    assert np.allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    alone = Embedder(directory, EmbedderConfig(batch_tokens=64, dtype="float32")).embed(texts[::-1])[::-1]
    assert np.allclose(together, alone, atol=1e-4)
    question = embedder.embed(["When does the boat sail?"], query=True)[0]
    assert int(np.argmax(together @ question)) == 0
    assert embedder.embed([]).shape == (0, embedder.dimension)


def test_threads_do_not_disturb_each_other(directory: Path) -> None:
    embedder = Embedder(directory, EmbedderConfig(dtype="float32"))
    texts = ["ferry " * (1 + number * 7 % 60) + str(number) for number in range(32)]
    expected = embedder.embed(texts)
    with ThreadPoolExecutor(8) as pool:
        counts = pool.map(embedder.count_tokens, texts * 4)
        found = list(pool.map(lambda text: embedder.embed([text])[0], texts))
    assert np.allclose(found, expected, atol=1e-4)
    assert list(counts) == [embedder.count_tokens(text) for text in texts] * 4


def test_text_over_the_limit_is_cut_and_still_counted_in_full(directory: Path) -> None:
    embedder = Embedder(directory, EmbedderConfig(max_tokens=16, dtype="float32"))
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
