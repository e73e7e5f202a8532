"""A cross-encoder of our own: random, then taught in seconds what is relevant, so that reranking moves the order."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, BertTokenizerFast

from cluster.config import RerankerConfig
from cluster.errors import BadInput
from retrieval.rerank import Reranker, rerank
from retrieval.types import Passage

SUBJECTS = ("ferry", "dog", "bicycle", "ladder", "lamp", "watch", "ticket", "engine")
FILL = ("the", "of", "and", "a", "costs", "crowns", "is", "on", "deck", "open")
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *SUBJECTS, *FILL]


def save(directory: Path, train: Callable[[Any, Any], None] | None = None, **shape: Any) -> Path:
    """A BERT cross-encoder over whole words, random or after `train(model, tokenizer)`."""
    directory.mkdir()
    (directory / "vocab.txt").write_text("\n".join(VOCABULARY))
    tokenizer = BertTokenizerFast(vocab=str(directory / "vocab.txt"), model_max_length=64)
    settings = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "num_labels": 1,
        "initializer_range": 0.2,
        "hidden_dropout_prob": 0,
        "attention_probs_dropout_prob": 0,
    }
    config = AutoConfig.for_model("bert", vocab_size=len(VOCABULARY), max_position_embeddings=64, **settings | shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
        if train:
            train(model, tokenizer)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def teach(model: Any, tokenizer: Any) -> None:
    """A text is relevant if it names the subject of the question."""
    chance = random.Random(5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0)
    for _ in range(600):
        asked = [chance.choice(SUBJECTS) for _ in range(32)]
        named = [subject if chance.random() < 0.5 else chance.choice(SUBJECTS) for subject in asked]
        texts = [sentence(chance, subject) for subject in named]
        batch = tokenizer([f"the {subject}" for subject in asked], texts, padding=True, return_tensors="pt")
        labels = torch.tensor([float(a == b) for a, b in zip(asked, named, strict=True)])
        loss = torch.nn.functional.binary_cross_entropy_with_logits(model(**batch).logits[:, 0], labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def sentence(chance: random.Random, subject: str) -> str:
    around = chance.choices(FILL, k=chance.randint(1, 8))
    around.insert(chance.randrange(len(around) + 1), subject)
    return " ".join(around)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("plain") / "model")


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield save(tmp_path_factory.mktemp("taught") / "model", teach)
    torch.set_num_threads(threads)


def config(directory: Path, **changes: Any) -> RerankerConfig:
    return RerankerConfig(source=str(directory), **changes)


def passage(text: str, score: float, title: str = "") -> Passage:
    return Passage(text, "d", title, "", text, "d.md", 0, score, {"dense": score})


def test_what_was_learned_orders_the_passages(taught: Path) -> None:
    found = [passage(f"the {subject} is open on a deck", 1 - number / 10) for number, subject in enumerate(SUBJECTS)]
    reranker = Reranker(taught, config(taught))
    for subject in SUBJECTS:
        best, second, *_ = rerank(f"the {subject}", found, reranker)
        assert subject in best.text
        assert best.score == best.scores["rerank"] > 0.9 > second.score
        assert "dense" in best.scores


def test_titles_are_read_too(taught: Path) -> None:
    found = [passage("is open", 0.9, "lamp"), passage("is open on", 0.8, "dog")]
    assert rerank("the dog", found, Reranker(taught, config(taught)))[0].title == "dog"


def test_scores_do_not_depend_on_the_batch_or_the_order(taught: Path) -> None:
    chance = random.Random(1)
    texts = [sentence(chance, chance.choice(SUBJECTS)) for _ in range(30)]
    together = Reranker(taught, config(taught)).scores("the dog", texts)
    assert together.shape == (30,) and together.dtype == np.float32
    assert together.min() >= 0 and together.max() <= 1 and together.std() > 0.1
    small = Reranker(taught, config(taught, batch_tokens=64))
    assert np.allclose(small.scores("the dog", texts), together, atol=1e-5)
    assert np.allclose(small.scores("the dog", texts[::-1])[::-1], together, atol=1e-5)
    assert small.scores("the dog", []).shape == (0,)
    assert rerank("the dog", [], small) == []


def test_long_pairs_are_cut_and_endless_ones_before_they_are_tokenized(taught: Path) -> None:
    reranker = Reranker(taught, config(taught, max_tokens=16))
    long = "a " * 40 + "dog"
    assert reranker.scores("the dog", [long])[0] < 0.5 < reranker.scores("the dog", ["a dog"])[0]
    assert 0 <= reranker.scores("dog " * 25_000, ["a dog " * 20_000])[0] <= 1


def test_a_random_model_gives_scores_too(plain: Path) -> None:
    scores = Reranker(plain, config(plain)).scores("the dog", ["a dog", "a lamp on the deck"])
    assert len(set(scores.tolist())) == 2


def test_models_that_score_no_pairs_are_refused(tmp_path: Path, plain: Path) -> None:
    classes = save(tmp_path / "classes", num_labels=3)
    with pytest.raises(BadInput, match="3 scores"):
        Reranker(classes, config(classes))
    for name, files in {
        "embedder": {"modules.json": [{"type": "sentence_transformers.models.Transformer"}, {"type": "x.Pooling"}]},
        "encoder": {"config.json": {"architectures": ["BertModel"]}},
        "unnamed": {"config.json": {}},
    }.items():
        (tmp_path / name).mkdir()
        for file, value in files.items():
            (tmp_path / name / file).write_text(json.dumps(value))
        with pytest.raises(BadInput, match=r"not a cross-encoder"):
            Reranker(tmp_path / name, config(tmp_path / name))
