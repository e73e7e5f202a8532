"""``/v1/embeddings`` and ``/v1/rerank``: the embedder and the reranker of the configuration, for anybody's texts.

Not covered: other models than these two, and rights: no stored text is read here.
"""

from __future__ import annotations

import uuid
from typing import Any

from cluster.config import Config
from cluster.errors import BadInput, ContextTooLong, ModelNotFound, NotFound
from serving.knowledge.backend import Backend
from serving.knowledge.shapes import Embeddings, Rerank, embedding


class Models:
    """The two models of one configuration."""

    def __init__(self, config: Config, backend: Backend) -> None:
        self._config, self._backend = config, backend

    async def embed(self, body: Embeddings) -> dict[str, Any]:
        """Vectors of texts; each text must fit the model, as nothing of it is cut in silence."""
        name = self._config.embedder.served_name
        _check_model(body.model, name, self._config.embedder.source)
        vectors, lengths = await self._backend.embed(body.texts, body.input_type == "query")
        longest = self._config.embedder.max_tokens
        if not vectors:
            index = max(range(len(lengths)), key=lambda index: lengths[index])
            raise ContextTooLong(
                f"input[{index}] has {lengths[index]} tokens and {name} reads {longest} with those around it; split it",
                param="input",
            )
        if body.dimensions is not None and body.dimensions != len(vectors[0]):
            raise BadInput(
                f"{name} has {len(vectors[0])} dimensions and cannot be cut; leave dimensions out", param="dimensions"
            )
        return {
            "object": "list",
            "model": name,
            "data": [embedding(index, vector, body.encoding_format) for index, vector in enumerate(vectors)],
            "usage": {"prompt_tokens": sum(lengths), "total_tokens": sum(lengths)},
        }

    async def rerank(self, body: Rerank) -> dict[str, Any]:
        """Texts by how well they answer a query, best first.

        Raises:
            NotFound: no reranker is configured.
        """
        reranker = self._config.reranker
        if reranker is None:
            raise NotFound("there is no reranker here; set reranker.source to a cross-encoder", param="model")
        name = reranker.served_name
        if body.model is not None:
            _check_model(body.model, name, reranker.source)
        scores = await self._backend.rerank(body.query, body.texts)
        best = sorted(range(len(scores)), key=lambda index: -scores[index])[: body.top_n]
        results: list[dict[str, Any]] = [{"index": index, "relevance_score": scores[index]} for index in best]
        if body.return_documents:
            for result in results:
                result["document"] = {"text": body.texts[result["index"]]}
        return {"id": f"rerank-{uuid.uuid4().hex}", "object": "list", "model": name, "results": results}


def _check_model(asked: str, name: str, source: str) -> None:
    if asked not in (name, source):
        raise ModelNotFound(f"model '{asked}' is not there; this server has {name}", param="model")
