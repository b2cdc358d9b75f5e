# SPDX-License-Identifier: Apache-2.0
"""Divides rows fairly between tenants: waiting requests of several take turns, those of one run in order of arrival.

This is start-time fair queueing. A request's turn is the tenant's last turn plus the rows that its request took, but
not earlier than the turn that is running. So a tenant that has nothing waiting comes next, however much the others have
waiting, and gains nothing from the time in which it had nothing. A new request's turn is never before that of a running
one: the order of running sequences does not change, and no request is overtaken for ever.
"""

from collections import Counter
from dataclasses import dataclass

from jaxserve.engine.schedule.sequence import Sequence

FEW = 1024  # shares that are kept without a look at whether they matter


@dataclass(slots=True)
class _Share:
    """One tenant's, within one priority."""

    next: int = 0  # the turn of its next request, unless a later one is running
    served: int = 0  # the same if nothing that waits is counted
    waiting: int = 0  # sequences


class Turns:
    def __init__(self) -> None:
        self._now = 0  # the latest turn of a sequence that has got a row
        self._shares: dict[tuple[int, str], _Share] = {}
        self._most = FEW
        self._waiting: Counter[str] = Counter()  # sequences of each tenant, of any priority

    def waits(self, tenant: str) -> bool:
        """Whether a sequence of this tenant is waiting."""
        return tenant in self._waiting

    def take(self, tenant: str, priority: int, rows: int) -> int:
        """The turn of a new request that will take so many rows."""
        self._forget()
        share = self._shares.setdefault((priority, tenant), _Share())
        turn = max(self._now, share.next)
        share.next = turn + rows
        return turn

    def join(self, sequence: Sequence) -> None:
        """The sequence waits from now on."""
        self._share(sequence).waiting += 1
        self._waiting[sequence.request.tenant] += 1

    def leave(self, sequence: Sequence) -> None:
        """The sequence waits no longer. Turns of requests that ended while they were waiting are given back."""
        share = self._share(sequence)
        share.waiting -= 1
        if not share.waiting:
            share.next = share.served
        self._waiting[sequence.request.tenant] -= 1
        if not self._waiting[sequence.request.tenant]:
            del self._waiting[sequence.request.tenant]

    def begin(self, sequence: Sequence) -> None:
        """The sequence gets its first row."""
        share, turn = self._share(sequence), sequence.order[1]
        self._now = max(self._now, turn)
        share.served = max(share.served, turn + (sequence.held or sequence.request.params.n))
        share.next = max(share.next, share.served)

    def _share(self, sequence: Sequence) -> _Share:
        return self._shares.setdefault((sequence.order[0], sequence.request.tenant), _Share())

    def _forget(self) -> None:
        """Priorities are the clients' choice, so shares of those that do not wait are dropped when there are many."""
        if len(self._shares) >= self._most:
            self._shares = {key: share for key, share in self._shares.items() if share.waiting}
            self._most = max(FEW, 2 * len(self._shares))
