# SPDX-License-Identifier: Apache-2.0
"""The queue for rows, with its limits and the turns of beam searches; the deadlines of requests.

Both hold only what has not ended: entries are removed at once. Sorted lists do that; moving their tails by memmove
costs 20 us with 100,000 entries.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator

from jaxserve.engine.capacity import Limits
from jaxserve.engine.schedule.sequence import Sequence, order_of
from jaxserve.errors import OverloadedError


class Waiting:
    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._queue: list[Sequence] = []
        self._searches: list[Sequence] = []  # beam searches that have not begun
        self._begun = 0  # beams of those that have
        self.tokens = 0  # of their prompts

    def __len__(self) -> int:
        """How many may have a row at once."""
        return len(self._queue)

    @property
    def count(self) -> int:
        return len(self._queue) + len(self._searches)

    @property
    def first(self) -> Sequence:
        return self._queue[0]

    def check_room(self, tokens: int) -> None:
        """Raises an OverloadedError if one more request with so long a prompt may not wait."""
        count, most = self.count, self._limits.max_num_queued_reqs
        if most is not None and count >= most:
            problem = f"{count} requests are waiting, at most {most} may (max_num_queued_reqs)"
            raise OverloadedError("prompt", problem, "try again later")
        most = self._limits.max_num_queued_tokens
        if most is not None and count and self.tokens + tokens > most:
            problem = f"{self.tokens} prompt tokens are waiting, with {tokens} more above max_num_queued_tokens {most}"
            raise OverloadedError("prompt", problem, "try again later")

    def put(self, sequence: Sequence) -> None:
        insort(self._queue, sequence, key=order_of)
        self.tokens += sequence.prompt_len

    def remove(self, sequence: Sequence) -> None:
        del self._queue[bisect_left(self._queue, sequence.order, key=order_of)]
        self.tokens -= sequence.prompt_len

    # Beams wait for each other's tokens. If the beams of more searches than there are rows for ran at once, they would
    # take the rows from each other and be recomputed in turn. So searches begin in order, while rows last for all.

    def put_search(self, leader: Sequence) -> None:
        insort(self._searches, leader, key=order_of)
        self.tokens += leader.prompt_len

    def next_searches(self) -> Iterator[Sequence]:
        """Those that may begin now."""
        while self._searches:
            leader = self._searches[0]
            if self._begun and self._begun + leader.held > self._limits.max_num_seqs:
                return
            del self._searches[0]
            self.tokens -= leader.prompt_len
            self._begun += leader.held
            yield leader

    def end_search(self, last: Sequence) -> None:
        """Its last beam has ended, or its only one before it began."""
        if last in self._searches:
            self._searches.remove(last)
            self.tokens -= last.prompt_len
        else:
            self._begun -= last.held


class Deadlines:
    def __init__(self) -> None:
        self._next: list[tuple[float, int, str]] = []  # deadline, number of the arrival, request id

    def __len__(self) -> int:
        return len(self._next)

    def put(self, deadline: float, arrival: int, request_id: str) -> None:
        insort(self._next, (deadline, arrival, request_id))

    def remove(self, deadline: float, arrival: int, request_id: str) -> None:
        del self._next[bisect_left(self._next, (deadline, arrival, request_id))]

    def passed(self, now: float) -> list[str]:
        """The requests past their deadline; they stay until they are removed."""
        count = bisect_left(self._next, (now, float("inf"), ""))
        return [request_id for _, _, request_id in self._next[:count]]
