"""The plain script that ingestion is measured against: sentence-transformers, its own batches of 32, MilvusClient.

``ingest_script.py DIRECTORY MODEL URI COLLECTION CHUNK_TOKENS``. Cuts at paragraphs up to CHUNK_TOKENS tokens of the model's
tokenizer, embeds each hundred chunks and inserts them. Prints one JSON line; seconds are from the first file to the last row, imports and the
loading of the model not counted.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from pymilvus import DataType, MilvusClient
from sentence_transformers import SentenceTransformer


def cut(text: str, tokens: int, count: object) -> list[str]:
    """Paragraphs of `text` packed up to `tokens`; a longer one is cut at sentences."""
    chunks: list[str] = []
    room = 0
    for paragraph in text.split("\n\n"):
        pieces = [paragraph] if count(paragraph) <= tokens else paragraph.replace(". ", ".\0").split("\0")  # type: ignore[operator]
        for piece in pieces:
            length = count(piece)  # type: ignore[operator]
            if not chunks or length > room:
                chunks.append(piece)
                room = tokens - length
            else:
                chunks[-1] += " " + piece
                room -= length
    return chunks


def main() -> None:
    directory, model_path, uri, collection, chunk_tokens = sys.argv[1:]
    model = SentenceTransformer(model_path, local_files_only=True)
    client = MilvusClient(uri)
    schema = MilvusClient.create_schema(auto_id=True)
    schema.add_field("id", DataType.INT64, is_primary=True)
    schema.add_field("source", DataType.VARCHAR, max_length=512)
    schema.add_field("text", DataType.VARCHAR, max_length=65_535)
    schema.add_field("dense", DataType.FLOAT_VECTOR, dim=model.get_embedding_dimension())
    indexes = MilvusClient.prepare_index_params()
    indexes.add_index("dense", index_type="HNSW", metric_type="COSINE", params={"M": 16, "efConstruction": 200})
    client.create_collection(collection, schema=schema, index_params=indexes)

    def count(text: str) -> int:
        return len(model.tokenizer.encode(text, add_special_tokens=False, verbose=False))

    started, computed = time.perf_counter(), time.process_time()
    rows = [
        {"source": file.name, "text": piece}
        for file in sorted(Path(directory).iterdir())
        for piece in cut(file.read_text(encoding="utf-8"), int(chunk_tokens), count)
    ]
    for first in range(0, len(rows), 100):
        page = rows[first : first + 100]
        vectors = model.encode([row["text"] for row in page], batch_size=32, normalize_embeddings=True)
        client.insert(collection, [row | {"dense": vector} for row, vector in zip(page, vectors, strict=True)])
    figures = {"seconds": time.perf_counter() - started, "cpu_s": time.process_time() - computed}
    client.drop_collection(collection)
    print(json.dumps(figures | {"chunks": len(rows), "tokens": sum(count(row["text"]) for row in rows)}))


if __name__ == "__main__":
    main()
