"""Who computes what in the next step.

A row is one answer to be made: its tokens (prompt, then answer), of which `computed` have keys and values in its
pages. What is left over is its next work: one token for a row that decodes, a chunk for one that still reads its
prompt; a row that lost its pages is one that reads again. :meth:`Scheduler.schedule` plans a step: one token for every
decoding row, and up to `prefill_tokens` of prompts beside them.

Order: tenants take turns (:mod:`.turns`), first come first served inside one. A row whose adapter is loading, or finds
no slot, is passed by others; one that was passed :data:`PATIENCE` times for want of a slot gets the next one before
anybody else takes any. A row that lacks pages is not passed. A row whose next page another one is just computing waits
for it: questions over one text, or several answers to one prompt, that come together compute what they share once.

Pages are taken when they are needed. If there is none for a row that decodes, the row that is cheapest to lose by
fairness gives up its own: the one admitted last of the tenant that was given most. It waits at the head of its tenant's
queue and is computed again, from whatever of it is still in the prefix cache.

Pure Python; used by one thread. Not covered: moving pages out to host memory instead of computing them again.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Literal, Protocol

from serving.engine.native.pages import Pages
from serving.engine.native.turns import Turns

PATIENCE = 64
"""Admissions with an adapter that may pass a row which waits for a slot."""


class Slots(Protocol):
    """What is asked of :class:`serving.engine.native.residency.Residency`."""

    def state(self, digest: str | None) -> Literal["ready", "loading"]: ...
    def can_lease(self, digest: str | None) -> bool: ...
    def lease(self, digest: str | None) -> int | None: ...
    def release(self, digest: str | None) -> None: ...


@dataclass(eq=False)
class Row:
    """One answer on its way."""

    tokens: list[int]
    """The prompt, then what was answered so far."""
    max_tokens: int
    adapter: str | None = None
    tenant: str = ""
    computed: int = 0
    """Of `tokens`, those whose keys and values are in `pages`."""
    pages: list[int] = field(default_factory=list)
    chain: list[bytes] = field(default_factory=list)
    """Hashes of the full pages of `tokens`, as far as they were needed."""
    slot: int | None = None
    cached: int = 0
    """Prompt tokens that were in the prefix cache when it was first admitted."""
    paid: int = 0
    """Prompt tokens that its tenant was charged, or that were cached; what is computed again is free."""
    admissions: int = 0
    passed: int = 0
    """Admissions that passed it while it waited for a slot."""
    prompt: int = field(init=False)
    """How many of `tokens` are the prompt."""

    def __post_init__(self) -> None:
        self.prompt = len(self.tokens)

    @property
    def pending(self) -> int:
        """Tokens to be computed before the next one can be chosen; 1 for a row that decodes."""
        return len(self.tokens) - self.computed

    @property
    def made(self) -> int:
        """Tokens of the answer so far."""
        return len(self.tokens) - self.prompt

    @property
    def left(self) -> int:
        """Prompt tokens to be computed and, at most, answer tokens to be made."""
        return max(self.prompt - self.computed, 0) + self.max_tokens - self.made


@dataclass(frozen=True)
class Work:
    """Compute ``row.tokens[row.computed : row.computed + count]``."""

    row: Row
    count: int
    chooses: bool
    """Whether these are the last ones before the next token can be chosen."""


@dataclass(frozen=True)
class Step:
    """What :meth:`Scheduler.schedule` found."""

    work: list[Work]
    failed: list[tuple[Row, Exception]]
    """Rows whose adapter can not be used; they have left already."""


class Scheduler:
    """See the module's docstring. The pages hold at least one whole context: a row that is alone always finds room."""

    def __init__(self, pages: Pages, slots: Slots, *, batch: int, prefill_tokens: int) -> None:
        self.pages, self.slots = pages, slots
        self.batch, self.prefill_tokens = batch, prefill_tokens
        self.turns = Turns()
        self.queues: dict[str, deque[Row]] = {}
        """Tenant -> rows that wait; none is empty."""
        self.running: dict[Row, None] = {}
        """Rows with pages and a lease, in order of admission."""
        self.stalled: dict[Row, None] = {}
        """Waiting rows that found no slot, longest first."""
        self.coming: set[bytes] = set()
        """Hashes of the full pages that running rows are about to compute."""
        self.failed: list[tuple[Row, Exception]] = []
        self.preemptions = 0
        self.prompt_tokens = self.cached_tokens = self.answer_tokens = 0
        """Of all rows so far: prompts admitted, found in the prefix cache, chosen."""
        self.closed = False
        """Nobody is admitted in the rest of this step."""

    @property
    def waiting(self) -> int:
        """Rows that wait."""
        return sum(map(len, self.queues.values()))

    def add(self, row: Row) -> None:
        """Put a new row at the end of its tenant's queue."""
        self.turns.enter(row.tenant)
        self.queues.setdefault(row.tenant, deque()).append(row)

    def remove(self, row: Row) -> None:
        """A row ended or is wanted no more, wherever it is."""
        if row in self.running:
            self._stop(row)
        else:
            self._unqueue(row)
        self.turns.leave(row.tenant)

    def schedule(self) -> Step:
        """Plan a step. Rows are admitted, and preempted, as it goes; :meth:`computed` must follow."""
        self.closed = False
        work = self._decodes() + self._prefills()
        while self.running and not work:  # those who read their prompts have taken all pages, and none can go on
            self._preempt(self._cheapest())
            work = self._prefills()
        failed, self.failed = self.failed, []
        return Step(work, failed)

    def computed(self, work: list[Work]) -> None:
        """The step succeeded: keys and values are in their pages, and full ones may be found."""
        size = self.pages.page_tokens
        for each in work:
            row = each.row
            full = row.computed // size
            row.computed += each.count
            if self.pages.prefixes and row.computed // size > full:
                self.pages.extend(row.chain, row.tokens, row.adapter)
                for place in range(full, row.computed // size):
                    self.pages.publish(row.pages[place], row.chain[place])

    def spoil(self, row: Row) -> None:
        """The step of a running row failed: nobody may find what is in its pages."""
        self.pages.forget(row.pages)

    def take(self, row: Row, token: int) -> None:
        """`token` was chosen after all of ``row.tokens``."""
        row.tokens.append(token)
        self.turns.charge(row.tenant, answer=1)
        self.answer_tokens += 1

    # -- a step

    def _decodes(self) -> list[Work]:
        rows = [row for row in self.running if row.pending == 1]
        for row in rows:
            while row in self.running and not self._grow(row, row.computed + 1):
                self._preempt(self._cheapest())
        return [Work(row, 1, True) for row in rows if row in self.running]

    def _prefills(self) -> list[Work]:
        """Chunks of prompts, in fair order over those who have begun and those who wait."""
        work: list[Work] = []
        reading = [row for row in self.running if row.pending > 1]
        self.coming = {digest for row in reading for digest in self._unwritten(row)}
        budget = self.prefill_tokens
        while budget:
            row = min(reading, key=self._given, default=None)
            new = self._candidate()
            if new is not None and (row is None or self._given(new) < self._given(row)):
                if not self._admit(new):
                    continue
                row = new
            elif row is None:
                break
            else:
                reading.remove(row)
            if count := self._reach(row, min(row.pending, budget)):
                work.append(Work(row, count, count == row.pending))
                budget -= count
                self._charge(row, row.computed + count)
        return work

    def _charge(self, row: Row, reach: int) -> None:
        new = max(min(reach, row.prompt) - row.paid, 0)
        row.paid += new
        self.turns.charge(row.tenant, prompt=new)

    def _given(self, row: Row) -> int:
        return self.turns.given[row.tenant]

    def _candidate(self) -> Row | None:
        """The waiting row whose turn it is, of those whose adapter could decode now."""
        if self.closed or len(self.running) >= self.batch:
            return None
        first = next((row for row in self.stalled if row.passed >= PATIENCE), None)
        for tenant in sorted(self.queues, key=self.turns.given.__getitem__):
            for row in list(self.queues.get(tenant, ())):
                if self._ready(row, first):
                    return row
        return None

    def _ready(self, row: Row, first: Row | None) -> bool:
        if row.adapter is None:
            return not self._is_coming(row)
        try:
            state = self.slots.state(row.adapter)
        except Exception as error:  # whatever is wrong with an adapter is its own rows' trouble
            self._fail(row, error)
            return False
        if not self.slots.can_lease(row.adapter):
            self.stalled[row] = None
            return False
        return state == "ready" and (first is None or row is first) and not self._is_coming(row)

    def _is_coming(self, row: Row) -> bool:
        """Whether a running row is about to compute the first page that `row` does not find."""
        if not self.coming:
            return False
        chain = self._shareable(row)
        found = len(self.pages.match(chain))
        return found < len(chain) and chain[found] in self.coming

    def _shareable(self, row: Row) -> list[bytes]:
        """Hashes of the pages that `row` would take from others; one token is always computed, for its logits."""
        if not self.pages.prefixes:
            return []
        self.pages.extend(row.chain, row.tokens, row.adapter)
        return row.chain[: (len(row.tokens) - 1) // self.pages.page_tokens]

    def _unwritten(self, row: Row) -> list[bytes]:
        return row.chain[row.computed // self.pages.page_tokens :]

    def _admit(self, row: Row) -> bool:
        shared = self.pages.match(self._shareable(row))
        if not self._has_room(row, shared):
            self.closed = True
            return False
        try:
            row.slot = self.slots.lease(row.adapter)
        except Exception as error:
            self._fail(row, error)
            return False
        self._unqueue(row)
        self.running[row] = None
        self.pages.hold(shared)
        row.pages = shared
        row.computed = len(shared) * self.pages.page_tokens
        if not row.admissions:
            row.cached = row.paid = row.computed
            self.prompt_tokens += row.prompt
            self.cached_tokens += row.cached
        row.admissions += 1
        self.coming.update(self._unwritten(row))
        if row.adapter is not None:
            for other in self.stalled:
                other.passed += 1
        return True

    def _has_room(self, row: Row, shared: list[int]) -> bool:
        """Whether all of `row` could be computed now, and each running row could do so too and take one page more."""
        new = self.pages.needed(len(row.tokens)) - sum(1 for page in shared if self.pages.holders[page])
        promised = sum(self.pages.needed(len(other.tokens)) - len(other.pages) + 1 for other in self.running)
        return new + promised <= self.pages.free

    def _grow(self, row: Row, reach: int) -> bool:
        """Pages for positions up to `reach`; False if there are not enough, and nothing has changed then."""
        missing = self.pages.needed(reach) - len(row.pages)
        if missing > self.pages.free:
            return False
        row.pages.extend(self.pages.allocate() for _ in range(missing))
        return True

    def _reach(self, row: Row, count: int) -> int:
        """How many of `count` tokens find pages."""
        room = (len(row.pages) + self.pages.free) * self.pages.page_tokens - row.computed
        count = min(count, room)
        self._grow(row, row.computed + count)
        return count

    # -- coming and going

    def _cheapest(self) -> Row:
        """The row admitted last of the tenant that was given most."""
        return max(enumerate(self.running), key=lambda place: (self._given(place[1]), place[0]))[1]

    def _preempt(self, row: Row) -> None:
        self._stop(row)
        self.queues.setdefault(row.tenant, deque()).appendleft(row)
        self.preemptions += 1
        self.closed = True

    def _stop(self, row: Row) -> None:
        del self.running[row]
        self.pages.release(row.pages)
        self.slots.release(row.adapter)
        row.pages, row.computed, row.slot = [], 0, None

    def _unqueue(self, row: Row) -> None:
        queue = self.queues[row.tenant]
        queue.remove(row)
        if not queue:
            del self.queues[row.tenant]
        self.stalled.pop(row, None)

    def _fail(self, row: Row, error: Exception) -> None:
        self.remove(row)
        self.failed.append((row, error))
