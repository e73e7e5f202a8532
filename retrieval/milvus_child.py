"""The process that :mod:`retrieval.embedded` starts: a milvus-lite server that lives as long as it has users.

Run as ``python -P milvus_child.py DATA_DIR USERS_FILE PORT``, so it imports nothing of metier. Listens on that loopback
port, with 0 on a free one, and prints it when it is ready. Every user holds a shared lock on USERS_FILE, which the kernel takes back however
the user ends; once nobody holds it, the server closes its data and leaves. SIGTERM asks for the same at once.
"""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import threading
from pathlib import Path

from milvus_lite.adapter.grpc.server import start_server_in_thread
from milvus_lite.engine import compaction

POLL_S = 1.0

# milvus-lite weighs words by the statistics of each segment: a document of a small later one would score a tenth of
# what it does among the others. With these a flush merges what is below 100 MB (some 30,000 chunks) into one; questions
# wait for a merge, so larger segments are left as they are.
compaction.COMPACTION_MIN_FILES_PER_BUCKET = 2
compaction.COMPACTION_BUCKET_BOUNDARIES = [100_000_000]


def main(data_dir: str, users_file: str, port: str) -> None:
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    server, database, bound = start_server_in_thread(data_dir, port=int(port))
    sys.stdout.write(f"{bound}\n")
    sys.stdout.flush()
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # nobody reads the pipe any more; what else is printed is logged
    with Path(users_file).open("rb") as users:
        while not stop.wait(POLL_S) and _in_use(users.fileno()):
            pass
        # Still locked if nobody uses us: a newcomer waits until we are gone, and then starts a server of its own.
        server.stop(grace=2).wait()
        database.close()


def _in_use(users: int) -> bool:
    try:
        fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


if __name__ == "__main__":
    main(*sys.argv[1:])
