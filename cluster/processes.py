"""Whether a process that was noted in a file is still there: what `metier up` and the embedded Milvus ask of theirs."""

from __future__ import annotations

import psutil


def runs(pid: int, created: float) -> bool:
    """Whether process `pid`, started at `created` (seconds since the epoch), is there and may still hold its files.

    A pid alone may have been given to another process since.
    """
    try:
        process = psutil.Process(pid)
        if process.create_time() != created:
            return False
        # A zombie whose other threads are still dying has not let go of its files yet.
        return bool(process.status() != psutil.STATUS_ZOMBIE or process.num_threads() > 1)
    except psutil.NoSuchProcess:
        return False
