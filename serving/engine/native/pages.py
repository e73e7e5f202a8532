"""Which pages of the key-value cache are whose, and what the full ones hold: equal beginnings are computed once.

A full page is known by a hash chained over everything before it, from the adapter it was computed with (or the base) to
its own last token: equal hashes mean equal keys and values (the scheme of vLLM's automatic prefix caching; Kwon et al.,
2023, for the pages). A page that nobody holds any more keeps its hash, and can be found again, until its place is
needed: least recently used first. The hash is a cryptographic one, as whoever could make two prompts collide would read
another's cache.

Only numbers are kept here; the tensors are the executor's. Not covered: sharing of pages that are not full, other
tiers.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b


class Pages:
    """An allocator of pages with references; used by one thread."""

    def __init__(self, count: int, page_tokens: int, *, prefixes: bool = True) -> None:
        self.count, self.page_tokens, self.prefixes = count, page_tokens, prefixes
        self.holders = [0] * count
        self.blank = list(range(count))[::-1]
        """Free pages that hold nothing of use."""
        self.reusable: OrderedDict[int, None] = OrderedDict()
        """Free pages with a hash, least recently used first."""
        self.hashes: dict[int, bytes] = {}
        self.found: dict[bytes, int] = {}
        """Hash -> page; the other way round than `hashes`."""

    @property
    def free(self) -> int:
        """Pages that nobody holds."""
        return len(self.blank) + len(self.reusable)

    def needed(self, tokens: int) -> int:
        """Pages for so many positions."""
        return -(-tokens // self.page_tokens)

    def extend(self, chain: list[bytes], tokens: Sequence[int], adapter: str | None) -> None:
        """Add to `chain` what is missing of the hashes of the full pages of `tokens`."""
        size = self.page_tokens
        for start in range(len(chain) * size, len(tokens) - size + 1, size):
            parent = chain[-1] if chain else _digest((adapter or "base").encode())
            chain.append(_digest(parent + array("q", tokens[start : start + size]).tobytes()))

    def match(self, chain: Sequence[bytes]) -> list[int]:
        """Pages that hold the longest known run of `chain` from its beginning; nobody holds them for it yet."""
        run = []
        for digest in chain:
            page = self.found.get(digest)
            if page is None:
                break
            run.append(page)
        return run

    def hold(self, pages: Iterable[int]) -> None:
        """One more holder for each of `pages`, which :meth:`match` found."""
        for page in pages:
            self.holders[page] += 1
            self.reusable.pop(page, None)

    def allocate(self) -> int:
        """A page with one holder; what was reusable in it is forgotten. There must be a free one."""
        if self.blank:
            page = self.blank.pop()
        else:
            page, _ = self.reusable.popitem(last=False)
            self._unname(page)
        self.holders[page] = 1
        return page

    def release(self, pages: Sequence[int]) -> None:
        """One holder less for each page of a table.

        The last page is let go first: without those before it it can not be found, so it shall leave first.
        """
        for page in reversed(pages):
            self.holders[page] -= 1
            if self.holders[page]:
                continue
            if page in self.hashes:
                self.reusable[page] = None
            else:
                self.blank.append(page)

    def publish(self, page: int, digest: bytes) -> None:
        """A held page is full and computed: it may be found from now on. Of two equal ones the first stays known."""
        if self.prefixes and digest not in self.found and page not in self.hashes:
            self.found[digest] = page
            self.hashes[page] = digest

    def forget(self, pages: Iterable[int]) -> None:
        """What held pages hold can not be relied on: nobody finds them any more."""
        for page in pages:
            self._unname(page)

    def _unname(self, page: int) -> None:
        digest = self.hashes.pop(page, None)
        if digest is not None:
            del self.found[digest]


def _digest(what: bytes) -> bytes:
    return blake2b(what, digest_size=32).digest()
