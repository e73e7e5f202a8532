"""How many replicas the generator has, and how many of them should hold each adapter.

Pure Python without imports of ours: Ray Serve's controller, which need not have this package, unpickles the policy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

FULL = 0.7
"""Share of a replica's speed that one adapter may ask for before it gets a further replica."""
WAITING_TOKENS = "waiting_tokens"
"""Name of the figure in what a replica records for autoscaling."""


def homes_wanted(
    demand: Mapping[str, float], minimum: Mapping[str, int], tokens_per_s: float, replicas: int
) -> dict[str, int]:
    """Adapter -> number of replicas that should hold it, for those with a minimum or a demand for more than one.

    Args:
        demand: adapter -> tokens/s asked of all replicas together.
        minimum: adapter -> least number, from ``adapter_replicas``.
        tokens_per_s: what one replica can compute.
        replicas: how many there are; nobody wants more.
    """
    wanted = {adapter: min(least, replicas) for adapter, least in minimum.items()}
    for adapter, asked in demand.items():
        count = min(math.ceil(asked / (FULL * tokens_per_s)), replicas)
        if count > 1:
            wanted[adapter] = max(count, wanted.get(adapter, 0))
    return wanted


class WaitingTokens:
    """Autoscaling policy of Ray Serve: as many replicas as keep `target_waiting_tokens` waiting on each.

    Serve bounds the answer by ``min_replicas`` and ``max_replicas`` and waits for its up- and downscale delays. Requests
    that wait before the replicas, where nobody has counted their tokens, count as those on the replicas do on average.
    """

    def __init__(self, target_waiting_tokens: int) -> None:
        self.target = target_waiting_tokens

    def __call__(self, context: Any) -> tuple[float, dict[str, Any]]:
        """Replicas wanted (``ray.serve.config.AutoscalingContext`` -> number, state to keep)."""
        recorded = (context.aggregated_metrics or {}).get(WAITING_TOKENS, {})
        total, queued = context.total_num_requests, context.total_queued_requests or 0
        if not recorded:  # no replica has said anything yet
            return context.target_num_replicas, {}
        waiting = sum(recorded.values())
        if 0 < queued < total:
            waiting *= total / (total - queued)
        return max(math.ceil(waiting / self.target), 1 if total > 0 else 0), {}
