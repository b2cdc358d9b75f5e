# SPDX-License-Identifier: Apache-2.0
"""The queue of waiting sequences with its limits, the queue of beam searches, and the deadlines of requests.

Both are sorted lists with only live entries: a removed entry leaves at once. The memmove costs 20 us with 100,000
entries.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator

from jaxserve.engine.capacity import Limits
from jaxserve.engine.schedule.sequence import Sequence, order_of
from jaxserve.engine.schedule.turns import Turns
from jaxserve.errors import OverloadedError
from jaxserve.types.request import Request


class Waiting:
    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._queue: list[Sequence] = []
        self._searches: list[Sequence] = []  # beam searches that have not started
        self._begun = 0  # the beams of all searches that have started
        self.tokens = 0  # prompt tokens of all waiting sequences
        self.turns = Turns()

    def __len__(self) -> int:
        """The number of sequences that can take a row now; searches that have not started are not counted."""
        return len(self._queue)

    @property
    def count(self) -> int:
        return len(self._queue) + len(self._searches)

    @property
    def first(self) -> Sequence:
        return self._queue[0]

    def beyond(self, rows: int) -> int:
        """The number of waiting sequences that do not get one of so many free rows."""
        count = self.count
        for sequence in self._queue:
            rows -= 1 + len(sequence.siblings)
            if rows < 0:
                break
            count -= 1
        return count

    def check_room(self, request: Request, *, rows: int) -> None:
        """Raise OverloadedError unless the queue has room for a request; what gets one of the free rows does not count.
        A full queue has room for one request of each tenant that has none in it, so that nobody can shut others out."""
        tokens, first = len(request.prompt_token_ids), not self.turns.waits(request.tenant)
        count, most = self.beyond(rows), self._limits.max_num_queued_reqs
        if most is not None and count >= most and not (first and count):
            problem = f"queue full ({count} of {most} waiting)"
            raise OverloadedError("prompt", problem, "retry later, or raise max_num_queued_reqs")
        most = self._limits.max_num_queued_tokens
        if most is not None and self.count and self.tokens + tokens > most and not first:
            problem = f"queue full ({self.tokens} of {most} prompt tokens waiting, {tokens} more do not fit)"
            raise OverloadedError("prompt", problem, "retry later, or raise max_num_queued_tokens")

    def put(self, sequence: Sequence) -> None:
        insort(self._queue, sequence, key=order_of)
        self._joined(sequence)

    def remove(self, sequence: Sequence) -> None:
        del self._queue[bisect_left(self._queue, sequence.order, key=order_of)]
        self._left(sequence)

    def _joined(self, sequence: Sequence) -> None:
        self.tokens += sequence.prompt_len
        self.turns.join(sequence)

    def _left(self, sequence: Sequence) -> None:
        self.tokens -= sequence.prompt_len
        self.turns.leave(sequence)

    # Beams of a search wait for each other's tokens. With more beams than rows, searches would keep preempting and
    # recomputing each other. So searches start in order, and only while there are rows for all their beams.

    def put_search(self, leader: Sequence) -> None:
        insort(self._searches, leader, key=order_of)
        self._joined(leader)

    def next_searches(self) -> Iterator[Sequence]:
        """The searches that can start now."""
        while self._searches:
            leader = self._searches[0]
            if self._begun and self._begun + leader.held > self._limits.max_num_seqs:
                return
            del self._searches[0]
            self._left(leader)
            self._begun += leader.held
            yield leader

    def end_search(self, last: Sequence) -> None:
        """Called when a search's last beam has ended, or when the search ends before it started."""
        if last in self._searches:
            self._searches.remove(last)
            self._left(last)
        else:
            self._begun -= last.held


class Deadlines:
    def __init__(self) -> None:
        self._next: list[tuple[float, int, str]] = []  # deadline, arrival number, request id

    def __len__(self) -> int:
        return len(self._next)

    def put(self, deadline: float, arrival: int, request_id: str) -> None:
        insort(self._next, (deadline, arrival, request_id))

    def remove(self, deadline: float, arrival: int, request_id: str) -> None:
        del self._next[bisect_left(self._next, (deadline, arrival, request_id))]

    def passed(self, now: float) -> list[str]:
        """The requests whose deadline has passed. They stay until they are removed."""
        count = bisect_left(self._next, (now, float("inf"), ""))
        return [request_id for _, _, request_id in self._next[:count]]
