# SPDX-License-Identifier: Apache-2.0
"""An engine around a fake device, which checks itself after each turn, and what is asked of it."""

from collections import Counter, defaultdict, deque
from typing import Any

from jaxserve.engine.buckets import Available, Buckets
from jaxserve.engine.capacity import Limits
from jaxserve.engine.schedule import drafts, need, packing
from jaxserve.engine.schedule.drafts import Drafter
from jaxserve.engine.schedule.packing import Batcher, StepMessage
from jaxserve.engine.schedule.plan import StepPlan, StepResult
from jaxserve.engine.schedule.scheduler import Scheduler
from jaxserve.engine.schedule.sequence import Sequence, Status, order_of
from jaxserve.types.outputs import TokenLogprobs, Update
from jaxserve.types.request import Request
from jaxserve.types.sampling_params import SamplingParams
from tests.engine.fake_device import FakeDevice
from tests.engine.fake_oracle import Answer, ByLast, Oracle
from tests.engine.made_up_model import EOS, VOCAB
from tests.engine.schedule.integrity import check_integrity


class FakeEngine:
    """An engine that is checked after each turn."""

    def __init__(self, limits: Limits, *, score_rows: int = 8, depth: int = 2, staged: bool = False) -> None:
        """`staged`: only the largest programs are there at first, and one more after each turn."""
        self.limits, self.depth, self.staged = limits, depth, staged
        self.buckets = Buckets.of(limits.max_num_seqs, limits.max_num_batched_tokens, score_rows)
        self.scheduler = Scheduler(limits, score_rows=score_rows)
        self.device = FakeDevice(limits, self.buckets)
        *_, last = need.variants(limits.max_logprobs).values()
        sizes = packing.sizes(self.buckets, [last])
        largest = dict(sorted(sizes, key=lambda pair: pair[1]))
        self._others = sorted(packing.sizes(self.buckets, need.variants(limits.max_logprobs).values()), key=str)
        self.batcher = Batcher(limits, self.buckets, Available(largest.items()) if staged else None)
        self.in_flight: deque[tuple[StepPlan, tuple[StepMessage, StepResult]]] = deque()
        self.answers: dict[tuple[str, int], Answer] = {}
        self.prompt_logprobs: dict[str, list[TokenLogprobs]] = defaultdict(list)  # whichever sample reported them
        self.plans: list[StepPlan] = []
        self.now = 0.0
        self.drafted: set[str] = set()
        self.masked: set[str] = set()
        self.withdraws = False  # the next plan, as after a fault of nobody that does not come again
        self.rowed: dict[tuple[str, int], float] = {}  # when each sample first had a row

    def __repr__(self) -> str:
        sizes = f"score_rows={self.buckets.score_rows}, depth={self.depth}, staged={self.staged}"
        return f"FakeEngine({self.limits}, {sizes})"

    def add(self, request: Request, *, hold: int = 0, drafted_by: Drafter | None = None, masked: bool = False) -> None:
        self.scheduler.add(request, hold=hold, drafted_by=drafted_by, masked_by=ByLast() if masked else None)
        if masked:
            self.masked.add(request.id)
        if drafted_by is not None:
            self.drafted.add(request.id)
        for index in range(request.params.n):
            self.answers[request.id, index] = Answer()

    def turn(self) -> list[Update]:
        before = list(self.scheduler.running)
        plan = self.scheduler.schedule(self.now)
        self.check()
        for sequence in self.scheduler.running:
            self.rowed.setdefault((sequence.request.id, sequence.index), self.now)
        check_victims(before)
        updates: list[Update] | None = None
        if plan is not None and self.withdraws:
            self.withdraws = False
            self.scheduler.withdraw(plan, [], "")
            self.check()
            plan = None
        elif plan is not None:
            check_plan(plan, self.limits, self.buckets)
            self.plans.append(plan)
            message = self.batcher.pack(plan)
            if plan.masked:
                model = self.device.launch_model(message)
                updates = self.read() if self.in_flight else None
                launched = self.device.launch_head(model, self.scheduler.masks_of(plan))
            else:
                launched = self.device.launch(message)
            self.in_flight.append((plan, launched))
            self.device.poison([0, *self.scheduler.pool._free])  # pyright: ignore[reportPrivateUsage]
            if self.staged and self._others:
                self.batcher._available.add(*self._others.pop())  # pyright: ignore[reportPrivateUsage]
        if updates is None:
            ready = self.in_flight and (plan is None or len(self.in_flight) >= self.depth)
            updates = self.read() if ready else []
        updates += self.scheduler.take_ended()
        for update in updates:
            name = (update.request_id, update.index)
            answer = self.answers.setdefault(name, Answer())
            answer.take(update)
            assert answer.scheduled == self.rowed.get(name)
            self.prompt_logprobs[update.request_id] += update.prompt_logprobs or []
        return updates

    def read(self) -> list[Update]:
        done, handle = self.in_flight.popleft()
        updates = self.scheduler.commit(done, self.device.read(handle))
        self.check()
        return updates

    def drain(self, most: int = 3000) -> None:
        """Run until all requests have ended; one that waits forever fails."""
        for _ in range(most):
            if not (self.scheduler.unfinished or self.in_flight):
                return
            self.turn()
        raise AssertionError(f"not at an end after {most} turns")

    def sequences(self) -> list[Sequence]:
        return [sequence for group in self.scheduler.requests.values() for sequence in group]

    def check(self) -> None:
        """Check that the state of sequences, rows and blocks is consistent."""
        scheduler, alive = self.scheduler, self.sequences()
        owners = Counter(block for sequence in alive for table in sequence.blocks for block in table if block)
        check_integrity(scheduler.pool, owners)
        running = [sequence for sequence in alive if sequence.status == Status.RUNNING]
        assert scheduler.running == sorted(running, key=order_of)
        rows = [sequence.row for sequence in running]
        assert sorted(rows + scheduler._free_rows) == list(range(self.limits.max_num_seqs))  # pyright: ignore[reportPrivateUsage]
        waiting = sorted((sequence for sequence in alive if sequence.status == Status.WAITING), key=order_of)
        queue = scheduler._waiting  # pyright: ignore[reportPrivateUsage]
        assert queue._queue == waiting  # pyright: ignore[reportPrivateUsage]
        later = queue._searches  # pyright: ignore[reportPrivateUsage]
        assert scheduler.queued == len(waiting + later)
        assert queue.tokens == sum(sequence.prompt_len for sequence in waiting + later)
        tenants = Counter((sequence.order[0], sequence.request.tenant) for sequence in waiting + later)
        shares = {key: share.waiting for key, share in queue.turns._shares.items() if share.waiting}  # pyright: ignore[reportPrivateUsage]
        assert shares == tenants
        beside = [sibling for sequence in alive for sibling in sequence.siblings]
        parked = [sequence for sequence in alive if sequence.held and sequence.reported == len(sequence.tokens)]
        for sequence in alive:
            assert sequence.status != Status.FINISHED
            assert (sequence.status == Status.BESIDE) <= (sequence in beside or sequence in parked + later)
            if sequence.status != Status.RUNNING:
                assert not any(sequence.blocks) and not sequence.computed and not sequence.pending
                assert sequence.row == -1 and not sequence.forked
            size, longest = self.limits.block_size, self.limits.max_model_len
            slack = drafts.MOST if sequence.request.id in self.drafted else 0
            assert 0 <= sequence.unsure <= slack and sequence.computed <= max(sequence.goal, sequence.prompt_len)
            for window, first, table in zip(self.limits.windows, sequence.first_blocks, sequence.blocks, strict=True):
                assert 0 <= len(table) * size - sequence.computed < size + slack
                assert not any(table[:first]) and all(table[first:])
                assert len(table) - first <= self.limits.blocks_in(window, longest)
            assert sequence.scores_reported <= sequence.scored <= sequence.prompt_len

    def check_over(self) -> None:
        """Check that nothing is left after all requests have ended."""
        scheduler = self.scheduler
        free, cached, used = scheduler.pool.counts()
        assert used == 0 and free + cached == self.limits.num_blocks - 1
        assert len(scheduler._free_rows) == self.limits.max_num_seqs  # pyright: ignore[reportPrivateUsage]
        assert not scheduler.queued and not scheduler._waiting._begun  # pyright: ignore[reportPrivateUsage]
        left = {name: value for name, value in vars(scheduler).items() if hasattr(value, "__len__") and len(value)}
        assert left.keys() == {"_free_rows"}, left


def check_victims(before: list[Sequence]) -> None:
    """Of the rows that ran before, only the last ones may have been preempted."""
    alive = [sequence for sequence in before if sequence.status != Status.FINISHED]
    still = [sequence.status == Status.RUNNING for sequence in alive]
    assert still == sorted(still, reverse=True)


def check_plan(plan: StepPlan, limits: Limits, buckets: Buckets) -> None:
    """Check that a step has a compiled shape and has each sequence once."""
    assert plan.tokens == sum(slice.count for slice in plan.slices) <= limits.max_num_batched_tokens
    assert plan.entries == sum(slice.entries for slice in plan.slices) <= buckets.entries
    assert len({id(slice.sequence) for slice in plan.slices}) == len(plan.slices) <= limits.max_num_seqs
    places = [0 if slice.count == 1 else 1 if slice.count else 2 for slice in plan.slices]
    assert places == sorted(places) and plan.slices[0].count
    for slice in plan.slices:
        assert slice.epoch == slice.sequence.epoch and slice.sequence.status == Status.RUNNING
        assert (slice.count == 0) == (slice.parent is not None)
        wanted = slice.sequence.need if slice.samples else 0
        assert not wanted & ~plan.need
    assert all(sequence.status == Status.RUNNING for sequence in plan.arrivals)


# --- what is asked of it ----------------------------------------------------------------------------------------------


def limits(**changes: Any) -> Limits:
    base: dict[str, Any] = dict(
        vocab_size=VOCAB,
        max_model_len=40,
        max_num_seqs=4,
        max_num_batched_tokens=16,
        block_size=4,
        num_blocks=41,
        max_logprobs=2,
        eos_token_ids=frozenset([EOS]),
    )
    return Limits(**base | changes)


def request(
    name: str, prompt: list[int], *, seed: int = 1, request: dict[str, Any] | None = None, **params: Any
) -> Request:
    given: dict[str, Any] = dict(temperature=1.0, seed=seed, max_tokens=8) | params
    return Request(id=name, prompt_token_ids=prompt, params=SamplingParams(**given), **request or {})


def check_answers(engine: FakeEngine, made: Request, aborted: set[tuple[str, int | None]]) -> None:
    whole = False
    for index in range(made.params.n):
        right, given = Oracle(engine.limits, engine.masked).answer(made, index), engine.answers[made.id, index]
        if given.reason == "abort":
            late = made.deadline is not None and made.deadline <= engine.now
            assert late if given.error else {(made.id, None), (made.id, index)} & aborted
            assert given.error in (None, "the deadline has passed")
            count = len(given.tokens)
            assert given.tokens == right.tokens[:count] and given.logprobs == right.logprobs[:count]
        else:
            assert (given.tokens, given.logprobs) == (right.tokens, right.logprobs)
            assert given.embedding == right.embedding
            assert (given.reason, given.stop_reason, given.error) == (right.reason, right.stop_reason, None)
            whole = True
    right, scored = Oracle(engine.limits).prompt_logprobs(made), engine.prompt_logprobs[made.id]
    assert scored == (right if whole else right[: len(scored)])
