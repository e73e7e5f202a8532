"""The retrieval harness against a real milvus-lite server: what it measures, writes, and leaves behind (nothing)."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from pymilvus import MilvusClient

from cluster.config import Config, StoreConfig
from evaluation.beir import JudgedCollection, read_beir
from evaluation.retrieval import evaluate
from metier.__main__ import main
from retrieval.embed import Vectors
from retrieval.embedded import serve
from retrieval.store import Store

SUBJECTS = {
    "ferry": "The ferry leaves the harbour at six and crosses to the island in forty minutes.",
    "dough": "Knead the dough until it is smooth and let it rise under a cloth for two hours.",
    "court": "An appeal against the sentence has to be filed with the court within thirty days.",
    "fever": "The patient had a high fever, and a test of the blood showed no infection.",
    "loan": "Interest on the loan is charged every month on what is still owed to the bank.",
    "pump": "Replace the filter of the pump when the red lamp is on, and let the motor cool.",
    "whale": "Whales come up to breathe and dive again; they find their way by sound.",
    "glass": "Glass is made by melting sand with soda and lime in a furnace.",
    "comet": "The comet passes close to the sun every seventy-six years.",
    "violin": "She learned to play the violin when she was four years old.",
}
QUESTIONS = {
    "ferry": "how long does the ferry take to the island",
    "dough": "for how many hours does dough rise",
    "court": "until when can an appeal be filed with a court",
    "loan": "when is interest charged on a loan",
    "whale": "how do whales find their way",
    "glass": "what is glass made of",
}
LONG = " ".join(f"It was noted in the log on page {number} of that year." for number in range(40))


class Words:
    """Hash-of-words vectors; blind ones are all alike."""

    def __init__(self, blind: bool = False) -> None:
        self.dimension = 128
        self.fingerprint = f"words-{blind}"
        self._blind = blind

    def count_tokens(self, text: str) -> int:
        return len(text.split())

    def embed(self, texts: Sequence[str], *, query: bool = False) -> Vectors:
        vectors = np.full((len(texts), self.dimension), 1e-3, dtype=np.float32)
        for row, text in enumerate(texts):
            for word in text.lower().split():
                key = zlib.crc32(text.encode()) if self._blind else zlib.crc32(word.strip(".,;").encode())
                vectors[row, key % self.dimension] += 1
        whole: Vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        return whole


@pytest.fixture(scope="module")
def beir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("beir") / "trade"
    (root / "qrels").mkdir(parents=True)
    corpus = [{"_id": key, "title": "", "text": f"{text} {LONG}"} for key, text in SUBJECTS.items()]
    questions = [{"_id": f"q-{key}", "text": text} for key, text in QUESTIONS.items()]
    qrels = "query-id\tcorpus-id\tscore\n" + "".join(f"q-{key}\t{key}\t1\n" for key in QUESTIONS)
    (root / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in corpus))
    (root / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    (root / "qrels" / "test.tsv").write_text(qrels)
    return root


@pytest.fixture(scope="module")
def collection(beir: Path) -> JudgedCollection:
    return read_beir(beir)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serve(StoreConfig(data_dir=str(tmp_path_factory.mktemp("milvus")))) as uri:
        yield uri


@pytest.fixture
def store(server: str) -> Iterator[Store]:
    store = Store(StoreConfig(), server)
    yield store
    store.close()


def left_behind(uri: str) -> list[str]:
    client = MilvusClient(uri)
    try:
        return [*client.list_collections()]
    finally:
        client.close()


def test_every_mode_is_measured_and_nothing_is_left(store: Store, server: str, collection: JudgedCollection) -> None:
    told: list[tuple[str, int, int]] = []
    made = evaluate(
        Config(),
        collection,
        ["dense", "bm25", "hybrid"],
        store=store,
        embedder=Words(),
        progress=lambda *step: told.append(step),
    )
    assert (made.documents, made.queries) == (10, 6)
    assert made.chunks > 2 * made.documents
    assert made.candidates == 100 * made.chunks // made.documents
    assert made.calibration is not None and made.calibration["sample"] > 0
    for mode, result in made.modes.items():
        assert len(result.seconds) == 6 and min(result.seconds) > 0
        assert result.means()["R@10"] == 1.0, mode
        assert (mode, 6, 6) in told
    assert made.modes["bm25"].means()["nDCG@10"] > 0.8
    assert ("index", 10, 10) in told
    assert left_behind(server) == []


def test_words_carry_an_embedder_that_sees_nothing(store: Store, collection: JudgedCollection) -> None:
    modes = ["dense", "bm25", "auto", "rrf"]
    made = evaluate(Config(), collection, modes, store=store, embedder=Words(blind=True))
    ndcg = {mode: result.means()["nDCG@10"] for mode, result in made.modes.items()}
    assert ndcg["dense"] < ndcg["bm25"]
    assert ndcg["auto"] >= ndcg["bm25"] - 1e-9
    assert ndcg["auto"] > ndcg["rrf"]


def test_the_floor_is_off_unless_asked_for(store: Store, collection: JudgedCollection) -> None:
    config = Config()
    strict = config.model_copy(update={"retrieval": config.retrieval.model_copy(update={"min_score": 0.99})})
    means = [
        evaluate(strict, collection, ["dense"], store=store, embedder=Words(), floor=floor).modes["dense"].means()
        for floor in (False, True)
    ]
    assert means[0]["R@10"] == 1.0
    assert means[1]["R@10"] == 0.0


@pytest.mark.parametrize("at", ["index", "dense"])
def test_an_interruption_leaves_nothing(store: Store, server: str, collection: JudgedCollection, at: str) -> None:
    def interrupt(doing: str, done: int, of: int) -> None:
        if doing == at and done > 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(Config(), collection, ["dense"], store=store, embedder=Words(), progress=interrupt)
    assert left_behind(server) == []


def run(monkeypatch: pytest.MonkeyPatch, *argv: object) -> int:
    """Exit code of ``metier ARGV``."""
    monkeypatch.setattr("sys.argv", ["metier", *map(str, argv)])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_the_verb_writes_json_details_and_plot(
    make_config: Callable[..., Config],
    beir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make_config()
    sets = [f"storage.url={tmp_path}/store", f"store.data_dir={tmp_path}/milvus"]
    options = [word for setting in sets for word in ("--set", setting)]
    files = {name: tmp_path / "out" / name for name in ("means.json", "details.json", "bars.png")}
    written = ("--json", files["means.json"], "--details", files["details.json"], "--plot", files["bars.png"])
    assert (
        run(monkeypatch, "eval", "retrieval", "--beir", beir, "--modes", "dense,bm25,hybrid", *written, *options) == 0
    )
    shown = capsys.readouterr().out
    assert "10 documents" in shown and "hybrid - bm25" in shown and "nDCG@10" in shown
    means = json.loads(files["means.json"].read_text())
    assert list(means) == ["dense", "bm25", "hybrid"]
    assert all(0.5 < of["nDCG@10"] <= 1 for of in means.values())
    assert means["hybrid"]["nDCG@10"] >= max(means["dense"]["nDCG@10"], means["bm25"]["nDCG@10"]) - 0.05
    details = json.loads(files["details.json"].read_text())
    of_question = details["folders"]["trade"]["modes"]["dense"]["values"]["nDCG@10"]
    assert sorted(of_question) == sorted(f"q-{key}" for key in QUESTIONS)
    assert sum(of_question.values()) / 6 == pytest.approx(means["dense"]["nDCG@10"])
    assert files["bars.png"].read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "store" / "knowledge").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--modes", "dense,both"), 2, "there is no mode 'both'"),
        (("--split", "dev"), 3, "dev.tsv is missing"),
    ],
)
def test_bad_input_is_one_sentence_before_anything_is_indexed(
    beir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    code: int,
    message: str,
) -> None:
    where = f"store.data_dir={tmp_path}/milvus"
    assert run(monkeypatch, "eval", "retrieval", "--beir", beir, *arguments, "--set", where) == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "milvus").exists()
