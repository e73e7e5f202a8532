"""What a run logged, step by step, kept in storage while it goes on, so that a resumed run has one history."""

from __future__ import annotations

import json
from typing import Any

from cluster.storage import Storage

SAVE_EVERY = 10
"""Events between writes; the file is small and written whole, by rename."""


class History:
    """The events of one run, by step; a step that is trained again after a failure replaces its first try."""

    def __init__(self, storage: Storage, run: str) -> None:
        self.storage, self.path = storage, f"runs/{run}/metrics.jsonl"
        known = storage.read(self.path).decode().splitlines() if storage.exists(self.path) else []
        self.events: list[dict[str, Any]] = [json.loads(line) for line in known]
        self.before = 0.0
        """Seconds trained by earlier worker groups, up to the step that this one goes on from."""
        self.clock = float("inf")
        """``seconds`` of the last event as the workers count; a new group starts from 0 again."""

    def add(self, event: dict[str, Any]) -> None:
        """Take one logged step; ``seconds`` then counts over all worker groups of the run."""
        self.events = [known for known in self.events if known["step"] < event["step"]]
        if event["seconds"] < self.clock:
            self.before = self.events[-1]["seconds"] if self.events else 0.0
        self.clock = event["seconds"]
        self.events.append(event | {"seconds": round(self.before + event["seconds"], 3)})
        if len(self.events) % SAVE_EVERY == 0:
            self.save()

    def save(self) -> None:
        """Write all events."""
        self.storage.write(self.path, "".join(json.dumps(event) + "\n" for event in self.events).encode())
