"""Free memory is what the container may still take, not what the machine has."""

from pathlib import Path

import psutil
import pytest

from cluster import machine


def test_a_containers_limit_counts_and_cached_files_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 300\ninactive_file 250\nactive_file 50\n")
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    assert machine.free_memory() == 1000 - (700 - 250 - 50)


@pytest.mark.parametrize("limit", ["max\n", None])
def test_without_a_limit_the_machine_counts(limit: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if limit is not None:
        (tmp_path / "memory.max").write_text(limit)
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    assert 0 < machine.free_memory() <= psutil.virtual_memory().total
