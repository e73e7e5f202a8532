"""Ray Serve's request router for the generator: :mod:`serving.routing` decides, here is only what Serve needs for it.

Serve makes one in every process with a handle of the deployment. The adapter is read from the
:class:`~serving.engine.base.GenerateRequest` itself, never from a header a client could send.
"""

from __future__ import annotations

import asyncio
import uuid
from functools import partial
from typing import Any

from ray.serve._private.common import RequestMetadata
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from serving.engine.base import GenerateRequest
from serving.routing import Book


class AdapterRouter(RequestRouter):
    """Sends a request where its adapter is, or will be soonest; asks homes to keep what they should hold."""

    def initialize_state(self, batch: int) -> None:
        """Called by Serve before anything else, with ``request_router_kwargs``."""
        self.book = Book(batch)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Each replica a rank of its own, best first: Serve takes the first one that is not full."""
        if pending_request is None:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True  # all are full if none is taken: ask again, but later
        request = pending_request.args[0] if pending_request.args else None
        if not isinstance(request, GenerateRequest):
            return [candidate_replicas]
        replicas = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        tokens = len(request.token_ids) + request.sampling.max_tokens * request.sampling.n
        id = pending_request.metadata.internal_request_id
        pending_request.future.add_done_callback(partial(self._chosen, id, request.adapter, tokens))
        return [[replicas[each]] for each in self.book.rank(replicas, request.adapter, tokens, id)]

    def _chosen(self, id: str, adapter: str | None, tokens: int, future: asyncio.Future[RunningReplica]) -> None:
        """Booked at once: the next request must not see this replica as idle while this one is on its way."""
        if not future.cancelled():
            self.book.sent(id, future.result().replica_id.unique_id, adapter, tokens, self._event_loop.time())

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        self.book.accepted(pending_request.metadata.internal_request_id)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        self.book.ended(internal_request_id, replica_id.unique_id)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Called for every change of the replicas and for every new report."""
        super().update_replicas(replicas)
        now = self._event_loop.time()
        self.book.hear({replica.replica_id.unique_id: replica.routing_stats for replica in replicas}, now)
        by_id = {replica.replica_id.unique_id: replica for replica in replicas}
        for id, adapters in self.book.to_keep(now).items():
            self._keep(by_id[id], adapters)

    def _keep(self, replica: RunningReplica, adapters: list[str]) -> None:
        """``replica.keep(adapters)``, whose answer is the replica's next report."""
        id = uuid.uuid4().hex
        metadata = RequestMetadata(request_id=id, internal_request_id=id, call_method="keep")
        replica.try_send_request(PendingRequest([adapters], {}, metadata), with_rejection=False)
