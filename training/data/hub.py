"""Rows of a data set on a model hub, by the name ``hub:org/name[@revision][#split]``.

`datasets` fetches the files once and keeps them in its own cache (under ``HF_HOME``); code that ships with a data set
is never run. A hub out of reach is no harm where the cache holds the revision; `datasets` alone would take the newest
cached one for it. Not covered: data sets of several configurations without a default one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from cluster.config import HUB
from cluster.errors import BadInput, MetierError, NotFound, Unavailable

NAME = re.compile(rf"{HUB}(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>[^#]+))?(#(?P<split>[\w.-]+))?")
BATCH = 256
"""Rows held at once."""


def rows_of(source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(``hub:org/name#split row N``, fields) of every row of `source`, in order; the split is ``train`` by default.

    Raises:
        BadInput: the name is not of the form above, or the data set is not one of rows.
        NotFound: the hub knows no such data set, revision or split.
        Unavailable: the hub does not answer and the cache does not hold it.
    """
    parts = NAME.fullmatch(source)
    if parts is None:
        raise BadInput(f"{source}: not the name of a data set; write hub:org/name@revision#split", param=source)
    split = parts["split"] or "train"
    dataset = _load(source, parts["repository"], parts["revision"], split)
    number = 0
    for batch in dataset.iter(batch_size=BATCH):
        for values in zip(*batch.values(), strict=True):
            number += 1
            yield f"{HUB}{parts['repository']}#{split} row {number}", dict(zip(batch, values, strict=True))


def _load(source: str, repository: str, revision: str | None, split: str) -> Any:
    from datasets import load_dataset_builder
    from datasets.packaged_modules.cache.cache import Cache

    try:
        # The hf:// form is never taken for a directory of that name.
        builder = load_dataset_builder(f"hf://datasets/{repository}", revision=revision)
        if revision and isinstance(builder, Cache) and builder.hash != revision:
            raise Unavailable(
                f"{source}: the hub did not give this revision, and the newest in the cache is {builder.hash}; check the "
                "name and the network",
                param=source,
            )
        builder.download_and_prepare()
        return builder.as_dataset(split=split)
    except MetierError:
        raise
    except Exception as error:
        raise _sentence(source, error) from error


def _sentence(source: str, error: Exception) -> MetierError:
    """`error` of `datasets`, which raises built-in exceptions besides its own, as one of ours."""
    from datasets.exceptions import DatasetNotFoundError

    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    if isinstance(error, DatasetNotFoundError):
        return NotFound(
            f"{source}: {reason.rstrip('.')}; check name and revision, and set HF_TOKEN for a private or gated one",
            param=source,
        )
    if isinstance(error, ValueError) and reason.startswith("Unknown split"):
        return NotFound(f"{source}: {reason.rstrip('.')}; write another one behind the #", param=source)
    if isinstance(error, ConnectionError):
        return Unavailable(
            f"{source}: {reason.rstrip('.')}; check the network, or name a copy of its files as a local directory",
            param=source,
        )
    return BadInput(f"{source}: cannot be read as rows ({reason}); name a copy of its files instead", param=source)
