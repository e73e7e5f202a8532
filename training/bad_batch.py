"""A loss that is not a number: the batch it came from is kept, and the run ends with a sentence."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from cluster.config import Config
from cluster.errors import Diverged
from cluster.storage import Storage
from training.data.encode import Encoding


def stop(
    loss: float,
    inputs: dict[str, Any],
    storage: Storage,
    run: str,
    step: int,
    rank: int,
    encoding: Encoding,
    config: Config,
) -> NoReturn:
    """Write the batch to ``runs/<run>/bad-batch-<step>.json`` and raise :class:`Diverged`."""
    rows = [[token for token in row if token >= 0] for row in inputs["input_ids"].tolist()]
    names = _names(rows, encoding)
    path = f"runs/{run}/bad-batch-{step}.json"
    batch = {"step": step, "rank": rank, "loss": str(loss), "rows": names, "input_ids": rows}
    storage.write(path, json.dumps(batch).encode())
    raise Diverged(
        f"the loss of step {step} is {loss}; the batch (rows {', '.join(names) or 'unknown'}) is in {storage.url}/{path}. "
        f"Lower training.learning_rate ({config.training.learning_rate:g}), look at these rows, or with "
        "base.dtype=float16 use bfloat16",
        param="training.learning_rate",
    )


def _names(rows: list[list[int]], encoding: Encoding) -> list[str]:
    """The examples whose sequence stands in one of `rows`, which may be padded or packed."""
    written = ["," + ",".join(map(str, row)) + "," for row in rows]
    found = []
    for name, sequence in zip(encoding.ids, encoding.sequences, strict=True):
        wanted = "," + ",".join(map(str, sequence["input_ids"])) + ","
        if any(wanted in row for row in written):
            found.append(name)
    return sorted(set(found))
