"""The same documents through LlamaIndex: SentenceSplitter, HuggingFaceEmbedding, MilvusVectorStore, IngestionPipeline.

``llamaindex_script.py DIRECTORY MODEL URI COLLECTION CHUNK_TOKENS``, in an environment of its own (``llamaindex.txt``).
Prints one JSON line as ``ingest_script.py`` does.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from llama_index.core import Document
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.node_parser import SentenceSplitter
from llama_index.embeddings.huggingface import HuggingFaceEmbedding
from llama_index.vector_stores.milvus import MilvusVectorStore
from transformers import AutoTokenizer


def main() -> None:
    directory, model_path, uri, collection, chunk_tokens = sys.argv[1:]
    tokenizer = AutoTokenizer.from_pretrained(model_path)

    def tokens(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False, verbose=False)

    embedding = HuggingFaceEmbedding(model_name=model_path, embed_batch_size=32, device="cpu")
    size = len(embedding.get_text_embedding("warm"))
    store = MilvusVectorStore(uri=uri, dim=size, collection_name=collection, overwrite=True)
    splitter = SentenceSplitter(chunk_size=int(chunk_tokens), chunk_overlap=0, tokenizer=tokens)
    pipeline = IngestionPipeline(transformations=[splitter, embedding], vector_store=store, disable_cache=True)
    started, computed = time.perf_counter(), time.process_time()
    documents = [
        Document(text=file.read_text(encoding="utf-8"), id_=file.stem) for file in sorted(Path(directory).iterdir())
    ]
    nodes = pipeline.run(documents=documents)
    figures = {"seconds": time.perf_counter() - started, "cpu_s": time.process_time() - computed}
    store.client.drop_collection(collection)
    total = sum(len(tokens(node.get_content())) for node in nodes)
    print(json.dumps(figures | {"chunks": len(nodes), "tokens": total}))


if __name__ == "__main__":
    main()
