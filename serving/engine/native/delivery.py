"""From the engine's thread to its callers' event loops: one message a step and loop, whatever the number of rows.

A caller that stops reading costs a bounded number of deltas: what piles up is merged, answer by answer.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable
from dataclasses import replace

from serving.engine.base import Delta

BEHIND = 256
"""Deltas that may wait for a caller before they are merged."""
Item = Delta | Exception


class Inbox:
    """What waits for one caller; used on its event loop only."""

    def __init__(self) -> None:
        self.items: deque[Item] = deque()
        self.filled = asyncio.Event()
        self.closed = False
        self.lost = False
        """The event loop is closed: nobody will read."""

    def put(self, item: Item) -> None:
        """Add an item; nothing follows an exception."""
        if self.closed:
            return
        self.closed = isinstance(item, Exception)
        self.items.append(item)
        if len(self.items) > BEHIND:
            self.items = deque(merge(self.items))
        self.filled.set()

    async def get(self) -> Delta:
        """The next delta; raises the exception that came instead."""
        while not self.items:
            self.filled.clear()
            await self.filled.wait()
        item = self.items.popleft()
        if isinstance(item, Exception):
            raise item
        return item


class Post:
    """Collects what a step has for callers, and sends it; used on the engine's thread."""

    def __init__(self) -> None:
        self.bags: dict[asyncio.AbstractEventLoop, list[tuple[Inbox, Item]]] = {}

    def add(self, loop: asyncio.AbstractEventLoop, inbox: Inbox, item: Item) -> None:
        """Send `item` with the others of this step."""
        self.bags.setdefault(loop, []).append((inbox, item))

    def send(self) -> None:
        """The step is over."""
        bags, self.bags = self.bags, {}
        for loop, bag in bags.items():
            try:
                loop.call_soon_threadsafe(_deliver, bag)
            except RuntimeError:  # it is closed
                for inbox, _ in bag:
                    inbox.lost = True


def merge(items: Iterable[Item]) -> list[Item]:
    """One delta for each answer, in the order in which they began, then an exception if there is one."""
    pieces: dict[int, list[Delta]] = {}
    last: list[Item] = []
    for item in items:
        if isinstance(item, Delta):
            pieces.setdefault(item.index, []).append(item)
        else:
            last.append(item)
    whole = [
        replace(
            deltas[0],
            token_ids=tuple(token for delta in deltas for token in delta.token_ids),
            finish_reason=deltas[-1].finish_reason,
            logprobs=tuple(logprob for delta in deltas for logprob in delta.logprobs),
        )
        for deltas in pieces.values()
    ]
    return [*whole, *last]


def _deliver(bag: list[tuple[Inbox, Item]]) -> None:
    for inbox, item in bag:
        inbox.put(item)
