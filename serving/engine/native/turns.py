"""Whose turn it is: tenants are served by what they were given so far.

The virtual token counter of Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024): a tenant is charged
for each prompt token that is computed and twice for each answer token, and the least charged one comes next. One that
comes back from idle is lifted to the least charged of those who are there, so that nobody saves up turns. When nobody
is left, all start again from nothing.
"""

from __future__ import annotations

from collections import Counter

ANSWER_WEIGHT = 2
"""A token that is decoded costs so many that are prefilled; the paper's choice."""


class Turns:
    """Counters of the tenants that have requests, and of those still ahead of them."""

    def __init__(self) -> None:
        self.given: dict[str, int] = {}
        """Tenant -> what it was charged."""
        self.rows: Counter[str] = Counter()
        """Tenant -> rows that wait or run."""

    def enter(self, tenant: str) -> None:
        """A row of `tenant` arrived."""
        if not self.rows[tenant]:
            least = min((self.given[other] for other, rows in self.rows.items() if rows), default=0)
            self.given = {other: given for other, given in self.given.items() if self.rows[other] or given > least}
            self.given.setdefault(tenant, least)
        self.rows[tenant] += 1

    def leave(self, tenant: str) -> None:
        """A row of `tenant` ended."""
        self.rows[tenant] -= 1
        if not self.rows[tenant]:
            del self.rows[tenant]
        if not self.rows:
            self.given.clear()

    def charge(self, tenant: str, prompt: int = 0, answer: int = 0) -> None:
        """`tenant` was given so many tokens."""
        self.given[tenant] += prompt + ANSWER_WEIGHT * answer
