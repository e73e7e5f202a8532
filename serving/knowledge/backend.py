"""Where the models and Milvus are, as seen from the process that answers HTTP: coroutines that may cross a network."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from cluster.config import RetrievalConfig
from retrieval.filters import Condition
from retrieval.types import Principal, Retrieved, Snapshot
from serving.knowledge.library import Held, Indexed, IndexJob

Index = Callable[[IndexJob], Awaitable[Mapping[str, Indexed]]]


@dataclass(frozen=True)
class Backend:
    """The methods of :class:`serving.knowledge.library.Library` and ``Retriever.retrieve``, wherever they run."""

    embed: Callable[[Sequence[str], bool], Awaitable[tuple[list[list[float]], list[int]]]]
    rerank: Callable[[str, Sequence[str]], Awaitable[list[float]]]
    retrieve: Callable[[Sequence[str], Snapshot, Principal, RetrievalConfig, Condition | None], Awaitable[Retrieved]]
    documents: Callable[[Snapshot, Principal], Awaitable[list[Held]]]
    texts: Callable[[Snapshot, Principal, Condition], Awaitable[list[str]]]
    index: Index
