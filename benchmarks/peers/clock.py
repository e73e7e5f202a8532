"""When a peer's steps end, one JSON object a line. Imported by scripts that run in other environments: no import of ours."""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback


class Clock(TrainerCallback):
    """Writes what a worker of ours reports, taken at the same places: seconds since training began, step, loss."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.started = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.started = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if not logs or "loss" not in logs:
            return
        line = {
            "step": state.global_step,
            "loss": float(logs["loss"]),
            "seconds": time.monotonic() - self.started,
            "memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "tokens_seen": int(state.num_input_tokens_seen),
        }
        with self.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
