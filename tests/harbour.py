"""A knowledge small enough for a test, already in Milvus and in the registry; its embedder is the random one."""

from __future__ import annotations

from cluster.config import Config
from cluster.knowledge import EmbedderState
from cluster.models import resolve
from cluster.registry import Registry
from cluster.storage import Storage
from retrieval.embed import Embedder, embedding_text
from retrieval.store import ALIVE, Row, Store, physical
from retrieval.words import searchable

DOCUMENTS = {
    "fares": ["A dog costs 3 crowns on the ferry.", "A bicycle costs 5 crowns.", "A guide dog travels free of charge."],
    "rules": ["Dogs stay on a lead.", "The kennel of the ferry is on the car deck."],
    "charging": ["Trạm sạc ở bến phà mở cửa lúc sáu giờ sáng."],
    "crew": ["The watch changes at noon."],
}
"""Document -> its chunks. The third one of a document is of the second version; those of the crew are for the crew."""


def fill(config: Config, store: Store) -> None:
    """Write the knowledge ``harbour`` in two versions."""
    embedder = Embedder(resolve(config.embedder, config.models_cache), config.embedder)
    collection = physical("harbour", 1)
    store.create(collection, embedder=embedder.fingerprint, dimension=embedder.dimension)
    rows: list[Row] = []
    for doc_id, texts in DOCUMENTS.items():
        for position, text in enumerate(texts):
            title = doc_id.capitalize()
            shown = embedding_text(title, "", text)
            rows.append({
                "row_id": f"{doc_id}-{position}", "chunk_id": f"{doc_id}-{position}", "doc_id": doc_id, "title": title,
                "heading": "", "text": text, "search_text": searchable(shown, True), "source": f"{doc_id}.md",
                "position": position, "page": 2, "start": 0, "end": len(text), "digest": "x", "vector_key": "x",
                "tenant": "default", "groups": ["crew" if doc_id == "crew" else "everyone"],
                "born": 2 if position == 2 else 1, "died": ALIVE, "metadata": {"year": 2020 + position},
                "dense": embedder.embed([shown])[0].tolist(),
            })  # fmt: skip
    store.upsert(collection, rows)
    registry = Registry(Storage.of(config.storage))
    state = EmbedderState(
        source="tiny:bert", max_tokens=256, fingerprint=embedder.fingerprint, dimension=embedder.dimension
    )
    for version in (1, 2):
        fields = {"collection": collection, "embedder": state.model_dump(), "chunk_tokens": 96, "overlap_tokens": 0}
        registry.knowledge_append("harbour", fields | {"reads": version})
