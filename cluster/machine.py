"""What this machine has left, seen from inside a container."""

from __future__ import annotations

from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def free_memory() -> int:
    """Bytes that nobody holds, within the limit of this container (cgroup v2; older ones are not looked at)."""
    import psutil

    free = int(psutil.virtual_memory().available)
    limit = CGROUP / "memory.max"
    if limit.is_file() and (most := limit.read_text().strip()) != "max":
        held = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        # Files that were read lately count as held, and are dropped when memory is asked for.
        used = int((CGROUP / "memory.current").read_text()) - int(held["inactive_file"]) - int(held["active_file"])
        free = min(free, int(most) - used)
    return free
