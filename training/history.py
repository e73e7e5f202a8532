"""What a run logged, step by step, kept in storage while it goes on, so that a resumed run has one history.

Two kinds of events pass: training steps (they have ``loss``) and evaluations at a step (``validation_loss``,
``general_loss``, …; they have none). Not covered: what else a run says of itself (:mod:`training.runs`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from cluster.storage import Storage

SAVE_EVERY = 10
"""Events between writes; the file is small and written whole, by rename."""
PLACE = {"step", "steps", "seconds", "resumed"}
"""Keys that say where an event belongs; the others are what was measured."""


class History:
    """The events of one run, by step; a step that is trained again after a failure replaces its first try."""

    def __init__(self, storage: Storage, run: str) -> None:
        self.storage, self.path = storage, f"runs/{run}/metrics.jsonl"
        known = storage.read(self.path).decode().splitlines() if storage.exists(self.path) else []
        self.events: list[dict[str, Any]] = [json.loads(line) for line in known]
        self.before = 0.0
        """Seconds trained by earlier worker groups, up to the step that this one goes on from."""
        self.clock = float("inf")
        """``seconds`` of the last training step as the workers count; a new group starts from 0 again."""

    @property
    def last_step(self) -> int:
        """The last step that was trained; 0 before the first."""
        return next((event["step"] for event in reversed(self.events) if "loss" in event), 0)

    def add(self, event: dict[str, Any]) -> None:
        """Take one event; its ``seconds`` then count over all worker groups of the run.

        A training step also replaces everything known of later steps, evaluations included: they are about to be
        trained again. The first one after that carries ``resumed``. An evaluation replaces only an evaluation of the
        same step that measured the same.
        """
        if "loss" in event:
            self._add_step(event)
        else:
            self._add_evaluation(event)

    def save(self) -> None:
        """Write all events."""
        self.storage.write(self.path, "".join(json.dumps(event) + "\n" for event in self.events).encode())

    def _add_step(self, event: dict[str, Any]) -> None:
        self.events = [known for known in self.events if known["step"] < event["step"]]
        if event["seconds"] < self.clock:
            self.before = self._seconds(event["step"])
            if any("loss" in known for known in self.events):
                event = event | {"resumed": True}
        self.clock = event["seconds"]
        self.events.append(event | {"seconds": round(self.before + event["seconds"], 3)})
        if len(self.events) % SAVE_EVERY == 0:
            self.save()

    def _add_evaluation(self, event: dict[str, Any]) -> None:
        if "seconds" in event:
            before = self._seconds(event["step"]) if event["seconds"] < self.clock else self.before
            event = event | {"seconds": round(before + event["seconds"], 3)}
        measured = event.keys() - PLACE
        self.events = [known for known in self.events if not _repeats(known, event["step"], measured)]
        later = next((i for i, known in enumerate(self.events) if known["step"] > event["step"]), len(self.events))
        self.events.insert(later, event)
        self.save()

    def _seconds(self, step: int) -> float:
        """Seconds trained up to `step`."""
        return max((known.get("seconds", 0.0) for known in self.events if known["step"] <= step), default=0.0)


def summary(events: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Where a run ended: what there is of ``steps``, ``seconds``, ``tokens_per_s``, and first, last and best losses.

    ``loss_last`` is the mean over the last tenth of the steps, because single batches jump.
    """
    steps = [event for event in events if "loss" in event]
    found: dict[str, float] = {}
    if steps:
        losses = [float(event["loss"]) for event in steps]
        tail = losses[-max(1, len(losses) // 10) :]
        found |= {"steps": steps[-1]["step"]}
        found |= {key: steps[-1][key] for key in ("seconds", "tokens_per_s") if key in steps[-1]}
        found |= {"loss_first": losses[0], "loss_last": sum(tail) / len(tail), "loss_best": min(losses)}
    for kind in ("validation", "general"):
        values = [float(event[f"{kind}_loss"]) for event in events if f"{kind}_loss" in event]
        if values:
            found |= {f"{kind}_first": values[0], f"{kind}_last": values[-1], f"{kind}_best": min(values)}
    return found


def gains(events: Sequence[dict[str, Any]]) -> dict[str, float]:
    """What the rows that were watched say of the weights that came out, beside the untrained base's.

    ``best_step``, and for ``validation`` and ``general`` rows ``<kind>_before`` and ``<kind>_after``; empty if nothing
    was watched.
    """
    seen = {
        kind: {event["step"]: float(event[f"{kind}_loss"]) for event in events if f"{kind}_loss" in event}
        for kind in ("validation", "general")
    }
    decides = seen["validation"] or seen["general"]
    trained = {step: loss for step, loss in decides.items() if step}
    if not trained:
        return {}
    best = min(trained, key=lambda step: trained[step]) if seen["validation"] else max(trained)
    found: dict[str, float] = {"best_step": best}
    for kind, losses in seen.items():
        found |= {f"{kind}_{when}": losses[step] for when, step in (("before", 0), ("after", best)) if step in losses}
    return found


def _repeats(known: dict[str, Any], step: int, measured: set[str]) -> bool:
    """Whether `known` is an evaluation of `step` that `measured` the same."""
    return "loss" not in known and known["step"] == step and bool(measured & known.keys())
