"""A generator replica whose answers wait for a test: which process answers, when it may go on, what it says waits.

Everything around the engine is ours as it is served: registry, files, reports, routing. Answers are two tokens, the pid
of the replica and the end, which comes when the gate is open. The test talks to it through files in one directory.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

from cluster.errors import Unavailable
from serving.app import Generator
from serving.engine.base import Delta, EngineStats, GenerateRequest


class Gate:
    """The test's side."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory

    def open(self) -> None:
        """Let every answer end, those to come as well."""
        (self.directory / "open").touch()

    def close(self) -> None:
        (self.directory / "open").unlink(missing_ok=True)

    def is_open(self) -> bool:
        return (self.directory / "open").exists()

    def fall_ill(self, pid: int) -> None:
        """From now on the replica with that pid says it is not well, and its answers never end."""
        (self.directory / f"{pid}.ill").touch()

    def is_ill(self, pid: int) -> bool:
        return (self.directory / f"{pid}.ill").exists()

    def waits(self, tokens: int) -> None:
        """What each replica says waits on it, from now on."""
        part = self.directory / "tokens.part"
        part.write_text(str(tokens))
        part.rename(self.directory / "tokens")

    def loaded(self) -> dict[int, set[str]]:
        """Replica's pid -> adapters it has loaded."""
        found: dict[int, set[str]] = {}
        for file in self.directory.glob("*.loaded"):
            found.setdefault(int(file.name.split("-")[0]), set()).add(file.stem.split("-")[1])
        return found


class GatedEngine:
    """The replica's side."""

    def __init__(self, directory: Path) -> None:
        self.gate = Gate(directory)
        self.running = 0
        self.resident: dict[str, None] = {}

    def start(self) -> None:
        """Nothing to load."""

    def add_adapter(self, digest: str, directory: Path) -> None:
        assert (directory / "adapter_model.safetensors").exists()

    def preload(self, digest: str, pin: bool = False) -> None:
        self.resident[digest] = None
        (self.gate.directory / f"{os.getpid()}-{digest}.loaded").touch()

    def drop_adapter(self, digest: str) -> None:
        self.resident.pop(digest, None)

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Delta]:
        if request.adapter is not None:
            self.preload(request.adapter)
        self.running += 1
        try:
            yield Delta((os.getpid(),))
            while self.gate.is_ill(os.getpid()) or not self.gate.is_open():
                await asyncio.sleep(0.02)
            yield Delta((), "stop")
        finally:
            self.running -= 1

    def stats(self) -> EngineStats:
        told = self.gate.directory / "tokens"
        waiting = int(told.read_text()) if told.exists() else 100 * self.running
        return EngineStats(running=self.running, waiting_tokens=waiting, resident=tuple(self.resident))

    def check_health(self) -> None:
        if self.gate.is_ill(os.getpid()):
            raise Unavailable("the engine has been in one step for over 3 s")

    def stop(self) -> None:
        """Nothing to free."""


class GatedGenerator(Generator):
    """What Serve deploys, with that engine in it."""

    def __init__(self, config_json: str, directory: str) -> None:
        super().__init__(config_json)
        self.engine = GatedEngine(Path(directory))
