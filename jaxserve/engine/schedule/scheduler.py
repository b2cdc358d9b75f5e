# SPDX-License-Identifier: Apache-2.0
"""Decides what the next step computes. Owns all sequences and rows; block bookkeeping is in block_tables.py. No jax.

    add(request)              queues a request, or rejects it
    schedule(now) -> StepPlan one token for each decoding row plus prompt chunks, within one token budget
    commit(plan, result)      applies a step's result: appends tokens, ends sequences, frees rows and blocks

A plan is a promise: `schedule` counts its work as done (`computed`, `pending`), so that the next plan can be made
before the result arrives. A sequence's epoch tells whether it has left its row since; then the result is dropped. With
drafts the promise is an upper bound: the devices know how many were right, and `commit` corrects the count.

Running sequences are kept and planned in order of priority, turns between tenants (turns.py), and arrival. When blocks
run out, the last sequence is preempted and recomputed later. So the first always makes progress, none starves, and a
planned sequence stays planned.
"""

import random
import traceback
from bisect import bisect_left, insort

from jaxserve.engine.capacity import Limits
from jaxserve.engine.schedule import admission, commit, guessing, masks
from jaxserve.engine.schedule.block_pool import BlockPool
from jaxserve.engine.schedule.block_tables import BlockTables
from jaxserve.engine.schedule.drafts import Drafter
from jaxserve.engine.schedule.masks import Masks, Words
from jaxserve.engine.schedule.plan import PlanBuilder, Slice, StepPlan, StepResult
from jaxserve.engine.schedule.sequence import Sequence, Status, order_of, samples_of, twin_of
from jaxserve.engine.schedule.waiting import Deadlines, Waiting
from jaxserve.errors import RequestError
from jaxserve.types.outputs import FinishReason, Update
from jaxserve.types.request import Request

_NOT_FINITE = "the model returned logits that are not finite, or masks left no token to sample"


class Scheduler:
    def __init__(self, limits: Limits, *, score_rows: int, seed: int = 0, hash_seed: str = "") -> None:
        self.limits, self._hash_seed = limits, hash_seed
        self.requests: dict[str, list[Sequence]] = {}  # all samples of a request until the last has ended
        self.preemptions = 0
        self.prefix_queries = self.prefix_hits = 0  # prompt tokens looked up in the prefix cache, and found
        self.policy_version = 0
        self._score_rows = score_rows
        self._random = random.Random(seed)
        self._arrivals, self._now = 0, 0.0
        self._ended: list[Update] = []  # by abort or deadline; reported with the next commit
        self._start_empty()

    def _start_empty(self) -> None:
        self.running: list[Sequence] = []
        self._free_rows = list(range(self.limits.max_num_seqs - 1, -1, -1))
        self._waiting, self._deadlines = Waiting(self.limits), Deadlines()
        self._tables = BlockTables(self.limits, hash_seed=self._hash_seed)
        self._arrived: list[Sequence] = []  # sequences that took a row since the last plan
        self._short_of_blocks = False  # whether the last plan had no blocks for the first in the queue
        self._drafters = 0  # the number of running sequences with a drafter
        self._states: dict[int, int] = {}  # rows to give the state of another row before the next step

    @property
    def pool(self) -> BlockPool:
        return self._tables.pool

    @property
    def queued(self) -> int:
        """The number of sequences that wait for a row."""
        return self._waiting.count

    @property
    def unfinished(self) -> bool:
        return bool(self.requests) or bool(self._ended)

    # --- arrivals and departures ------------------------------------------------------------------------------------

    def add(
        self, request: Request, *, hold: int = 0, masked_by: Masks | None = None, drafted_by: Drafter | None = None
    ) -> None:
        """Queue a request; a beam search of `hold` beams if that is not 0, which gets no drafts. Raises RequestError if
        it cannot be served as sent."""
        limits, params = self.limits, request.params
        admission.check(request, limits)
        if request.id in self.requests:
            raise RequestError("request_id", f"request {request.id!r} is already in flight", "use another id")
        priority = request.priority if limits.priority else 0
        self._waiting.check_room(request, rows=self._rows_to_come())
        self._arrivals += 1
        turn = self._waiting.turns.take(request.tenant, priority, hold or params.n)
        seed = self._random.getrandbits(32) if params.seed is None else params.seed
        group = self.requests[request.id] = samples_of(
            request,
            order=(priority, turn, self._arrivals),
            limits=limits,
            seed=seed ^ (seed >> 32) & 0xFFFF_FFFF,
            masks=masked_by,
            drafter=None if hold or limits.states else drafted_by,  # wrong drafts would change the states
        )
        leader, *leader.siblings = group
        if hold:
            leader.held = hold
            self._waiting.put_search(leader)
            self._start_searches()
        else:
            self._enqueue(leader)
        if request.deadline is not None:
            self._deadlines.put(request.deadline, self._arrivals, request.id)

    def _rows_to_come(self) -> int:
        """The number of free rows that waiting sequences will get at once."""
        if self._waiting and self._short_of_blocks:  # the first waits for blocks, and the others for it
            return 0
        return len(self._free_rows) - sum(len(sequence.siblings) for sequence in self.running)

    def abort(self, request_id: str, *, index: int | None = None, reason: FinishReason = "abort") -> None:
        """End a request, or one of its samples, in any state. Unknown ids are ignored: they have ended already."""
        for sequence in list(self.requests.get(request_id, ())):
            if index in (None, sequence.index):
                self._end(sequence, reason, all_of_it=index is None)

    def abort_all(self, error: str) -> list[Update]:
        """End everything after a fault, and reset all state: none of it is trusted."""
        for sequence in (sequence for group in self.requests.values() for sequence in group):
            update = Update(request_id=sequence.request.id, index=sequence.index, finish_reason="error", error=error)
            update.num_cached_tokens, update.policy_version = sequence.cached, self.policy_version
            self._ended.append(update)
            sequence.status, sequence.epoch = Status.FINISHED, sequence.epoch + 1
        self.requests.clear()
        self._start_empty()
        return self.take_ended()

    def take_ended(self) -> list[Update]:
        """The updates of sequences that ended outside a step."""
        ended, self._ended = self._ended, []
        return ended

    def _expire(self, now: float) -> None:
        for request_id in self._deadlines.passed(now):
            for sequence in list(self.requests[request_id]):
                self._end(sequence, "abort", error="the deadline has passed", all_of_it=True)

    def _end(
        self, sequence: Sequence, reason: FinishReason, *, error: str | None = None, all_of_it: bool = False
    ) -> None:
        """End a sequence outside a step, by abort or deadline. A whole search that ends gives one update."""
        if sequence.held and all_of_it and len(self.requests[sequence.request.id]) > 1:
            return self.drop(sequence)
        update = Update(request_id=sequence.request.id, index=sequence.index)
        update.error, update.policy_version = error, self.policy_version
        self._ended.append(self._finish(sequence, update, reason))

    def drop(self, sequence: Sequence) -> None:
        """End a held sequence that is no longer needed, without an update."""
        self._finish(sequence, Update(request_id=sequence.request.id, index=sequence.index), "abort")

    def _finish(self, sequence: Sequence, update: Update, reason: FinishReason) -> Update:
        request = sequence.request
        group = self.requests[request.id]
        group.remove(sequence)
        if sequence.status == Status.RUNNING:
            self._leave_row(sequence)
        elif sequence.status == Status.WAITING:
            self._waiting.remove(sequence)
        for other in group:
            if sequence in other.siblings:
                other.siblings.remove(sequence)
        if group:
            self._hand_on(sequence, group)
        else:
            del self.requests[request.id]
            if request.deadline is not None:
                self._deadlines.remove(request.deadline, sequence.order[2], request.id)
            if sequence.held:
                self._waiting.end_search(sequence)
                self._start_searches()
        sequence.status = Status.FINISHED
        update.finish_reason = reason
        update.num_cached_tokens = sequence.cached
        update.scheduled, sequence.scheduled = sequence.scheduled, None
        return update

    def _hand_on(self, sequence: Sequence, group: list[Sequence]) -> None:
        """Pass its duties to another sample of its request: computing the shared prompt, and scoring it."""
        if sequence.siblings:
            leader, *leader.siblings = sequence.siblings
            sequence.siblings = []
            leader.scored = leader.scores_reported = sequence.scores_reported
            self._enqueue(leader)
        elif sequence.scores_reported < sequence.prompt_len:
            heir = group[0]
            if heir.status == Status.RUNNING:
                self._preempt(heir)  # so that it computes the prompt again
            heir.scored = heir.scores_reported = sequence.scores_reported

    def _start_searches(self) -> None:
        for leader in self._waiting.next_searches():
            self._enqueue(leader)

    def _enqueue(self, sequence: Sequence) -> None:
        sequence.status = Status.WAITING
        self._waiting.put(sequence)

    def _take_row(self, sequence: Sequence) -> None:
        sequence.row = self._free_rows.pop()
        sequence.status = Status.RUNNING
        if not sequence.epoch:
            sequence.scheduled = self._now
            self._waiting.turns.begin(sequence)
        insort(self.running, sequence, key=order_of)
        self._arrived.append(sequence)
        self._drafters += sequence.drafter is not None
        self._tables.send(sequence)

    def _leave_row(self, sequence: Sequence) -> None:
        del self.running[bisect_left(self.running, sequence.order, key=order_of)]
        self._free_rows.append(sequence.row)
        self._states.pop(sequence.row, None)
        self._tables.end(sequence)
        self._drafters -= sequence.drafter is not None
        sequence.row, sequence.pending, sequence.unsure = -1, 0, 0
        sequence.scored = sequence.scores_reported
        if sequence.mean is not None:
            sequence.mean.restart()
        sequence.epoch += 1

    def _preempt(self, sequence: Sequence) -> None:
        self._leave_row(sequence)
        self.preemptions += 1
        if sequence.reported < len(sequence.tokens):
            self._enqueue(sequence)
        else:
            sequence.status = Status.BESIDE

    # --- planning ---------------------------------------------------------------------------------------------------

    def schedule(self, now: float = 0.0) -> StepPlan | None:
        """Plan the next step; None if there is nothing to compute until a step in flight is committed."""
        self._now = now
        self._expire(now)
        plan = PlanBuilder()
        states, self._states = self._states, {}  # those of forks that this plan makes follow it
        self._admit(plan, self._go_on(plan))
        while not plan.tokens and self._waiting and self.running and all(sequence.idles for sequence in self.running):
            # Held beams wait for one that has no room: without a preemption no blocks would ever be freed.
            self._preempt(self.running[-1])
            self._admit(plan, [])
        if not plan.tokens:
            self._states = states
            return None
        copies, edits = self._tables.take_changes()
        arrivals = [sequence for sequence in self._arrived if sequence.status == Status.RUNNING]
        self._arrived = []
        step = plan.slices, plan.tokens, plan.entries, plan.need, plan.embeds, self.policy_version, plan.unsure
        return StepPlan(*step, copies, edits, states, arrivals)

    def _go_on(self, plan: PlanBuilder) -> list[Sequence]:
        """Plan the running sequences. Returns those with prompts in progress."""
        decoding = 0
        work: list[tuple[Sequence, int]] = []  # sequences and their tokens left to compute
        chunked: list[Sequence] = []
        for sequence in self.running:
            known = len(sequence.tokens)
            left = (known if sequence.held else known + sequence.pending) - sequence.computed
            if left == 1:
                if sequence.computed >= sequence.goal:
                    continue
                decoding += 1
            elif left <= 0:
                continue
            work.append((sequence, left))
        spare = self.limits.max_num_batched_tokens - decoding
        guesses = self._guesses(work, spare) if self._drafters else {}
        for sequence, left in work:
            if sequence.row < 0:
                break  # preempted for an earlier one, like all after it
            if guesses and sequence in guesses and self._compute_drafts(plan, sequence, guesses[sequence]):
                spare -= len(guesses[sequence])
                continue
            taken = self._compute(plan, sequence, min(left, spare) if left > 1 else 1)
            if left > 1:
                spare -= taken
                if sequence.row >= 0:
                    chunked.append(sequence)
        return chunked

    def _admit(self, plan: PlanBuilder, chunked: list[Sequence]) -> None:
        """Give rows to waiting sequences in order, while each whole prompt fits beside the running ones. Reserved for
        those: one more block each in each group, and all blocks for prompts in progress.
        """
        tables, waiting = self._tables, self._waiting
        self._short_of_blocks = False
        each = self.limits.groups
        reserve = each * len(self.running) + sum(map(tables.wanted, chunked))
        while waiting and plan.tokens < self.limits.max_num_batched_tokens and self._free_rows:
            sequence = waiting.first
            if not tables.begin(sequence, reserve=reserve):
                self._short_of_blocks = True
                break
            waiting.remove(sequence)
            self._take_row(sequence)
            if not sequence.epoch:  # after a preemption the hits would be its own blocks
                sequence.cached = sequence.computed
                self._count_prefix(sequence)
            left = sequence.length - sequence.computed
            self._compute(plan, sequence, min(left, self.limits.max_num_batched_tokens - plan.tokens))
            reserve += each + tables.wanted(sequence)

    def _count_prefix(self, sequence: Sequence) -> None:
        if self.limits.enable_prefix_caching and sequence.reads_cache:
            self.prefix_queries += sequence.prompt_len
            self.prefix_hits += sequence.cached

    def _compute(self, plan: PlanBuilder, sequence: Sequence, count: int) -> int:
        """Plan up to `count` of its next tokens; return how many."""
        if sequence.scores:
            free = max(0, sequence.scored - 1 - sequence.computed)  # already scored: these tokens need no row of logits
            count = min(count, free + self._score_rows - plan.extra)
        if sequence.mean is not None:
            count = min(count, 1 + self._score_rows - plan.extra)
        if count <= 0 or not self._make_room(sequence, count):
            return 0
        self._promise(plan, sequence, count)
        return count

    def _make_room(self, sequence: Sequence, count: int) -> bool:
        """Allocate slots for its next tokens. Preempts the last running sequences if needed, even itself."""
        if self._tables.windowed:
            self._tables.leave_window(sequence)
        while not self._tables.grow(sequence, count):
            victim = self.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _promise(self, plan: PlanBuilder, sequence: Sequence, count: int) -> None:
        """Add a slice to the plan, and count its work as done."""
        start = sequence.computed
        stop = sequence.computed = start + count
        length = len(sequence.tokens) + sequence.pending
        samples = stop == length < sequence.end
        slice = Slice(sequence, start, count, samples)
        if sequence.mean is not None:
            slice.embeds = count
        elif sequence.request.embed:
            slice.embeds = int(stop == length)
        if sequence.scores:
            slice.score_from = max(sequence.scored, start + 1)
            slice.score_to = max(slice.score_from, min(stop + 1, sequence.prompt_len))
            sequence.scored = slice.score_to
        plan.put(slice)
        if stop // self.limits.block_size > sequence.published:
            self._tables.publish(sequence)
        if samples:
            sequence.pending += 1
            if sequence.siblings:
                self._fork(plan, slice)

    def _guesses(self, work: list[tuple[Sequence, int]], spare: int) -> dict[Sequence, list[int]]:
        """Drafts for sequences that decode. They get the tokens, rows of logits and blocks that prompts and the other
        sequences leave. A sequence gets none while drafts of it are in flight: only the devices know its length."""
        if any(sequence.scores or sequence.mean is not None for sequence, _ in work):
            return {}
        chunked = [item for item in work if item[1] > 1]
        room = min(self._score_rows, spare - sum(left for _, left in chunked))
        if self._free_rows and self._waiting and self._waiting.first.refused is None:  # else it waits for blocks
            room -= self._waiting.tokens
        groups, wanted = self.limits.groups, sum(self._tables.wanted(sequence) for sequence, _ in chunked)
        blocks = (self.pool.available - wanted) // groups - len(self.running)  # in each group
        found, faulty = guessing.guesses(work, room=room, blocks=blocks, limits=self.limits)
        self._drafters -= faulty
        return found

    def _compute_drafts(self, plan: PlanBuilder, sequence: Sequence, guess: list[int]) -> bool:
        """Plan its next token and these drafts, as if all were right. False if there is no room for them."""
        if self._tables.windowed:
            self._tables.leave_window(sequence)
        count = 1 + len(guess)
        if not self._tables.grow(sequence, count):
            return False
        slice = Slice(sequence, sequence.computed, count, count)
        slice.drafts = guess
        sequence.computed += count
        sequence.pending += count
        sequence.unsure += len(guess)
        plan.put(slice)
        if sequence.settled // self.limits.block_size > sequence.published:
            self._tables.publish(sequence)
        return True

    def _fork(self, plan: PlanBuilder, slice: Slice) -> None:
        """Fork the other samples of a request whose prompt this slice completes: they sample from its logits."""
        leader = slice.sequence
        siblings, leader.siblings = leader.siblings, []
        for sibling in siblings:
            if not self._free_rows:
                self._enqueue(sibling)
                continue
            self._fork_row(sibling, leader)
            sibling.pending = 1
            fork = Slice(sibling, leader.computed, 0, samples=1)
            fork.parent = slice
            plan.put(fork)

    def _fork_row(self, twin: Sequence, sequence: Sequence) -> None:
        """Give a fork a row with all that the other has computed."""
        self._tables.begin_as(twin, sequence)
        self._take_row(twin)
        if self.limits.states:
            self._states[twin.row] = self._states.get(sequence.row, sequence.row)

    def masks_of(self, plan: StepPlan) -> list[Words]:
        """The masks of the rows that sample in this step, once the steps before it are committed."""
        found: list[tuple[int, Words]] = []
        for slice in plan.slices:
            sequence = slice.sequence
            if sequence.masks is None or not slice.samples or slice.epoch != sequence.epoch:
                continue
            try:
                found.append((sequence.row, sequence.masks.allowed(sequence.tokens[sequence.prompt_len :])))
            except Exception as error:
                traceback.print_exc()
                self._ended.append(self._broken(sequence, f"its mask failed: {type(error).__name__}: {error}"))
        return masks.pack(found, rows=self.limits.max_num_seqs, vocab_size=self.limits.vocab_size)

    # --- results ----------------------------------------------------------------------------------------------------

    def commit(self, plan: StepPlan, result: StepResult) -> list[Update]:
        """Apply a step's result. Returns its updates, and those of sequences that ended outside a step."""
        updates = self.take_ended()
        sound, ends = all(result.valid), self.limits.eos_token_ids
        places = [0, plan.logits]  # of the next row of logits, and of the next embedding
        for slice in plan.slices:
            first = places[slice.embeds > 0]
            places[slice.embeds > 0] = end = first + slice.entries
            sequence = slice.sequence
            if slice.epoch != sequence.epoch:
                continue
            if not sound and not all(result.valid[first : first + commit.counted(slice, result, first)]):
                updates.append(self._broken(sequence, _NOT_FINITE))
                continue
            update = Update(request_id=sequence.request.id, index=sequence.index)
            update.num_cached_tokens, update.policy_version = sequence.cached, plan.policy_version
            try:
                if slice.samples and not slice.drafts and slice.score_to == slice.score_from:
                    reason = commit.sampled(sequence, result, first, update, ends)
                else:
                    reason = commit.applied(slice, result, update, first=first, last=end - 1, ends_of_text=ends)
            except Exception as error:
                traceback.print_exc()
                updates.append(self._broken(sequence, f"its result cannot be used: {type(error).__name__}: {error}"))
                continue
            if reason:
                updates.append(self._finish(sequence, update, reason))
            elif update.token_ids or update.prompt_logprobs or update.logprobs:
                update.scheduled, sequence.scheduled = sequence.scheduled, None
                updates.append(update)
        return updates

    def _broken(self, sequence: Sequence, error: str) -> Update:
        """End a sequence after a fault. Its KV is never reused."""
        self._tables.distrust(sequence)
        update = Update(request_id=sequence.request.id, index=sequence.index, policy_version=self.policy_version)
        update.error = error
        return self._finish(sequence, update, "error")

    def withdraw(self, plan: StepPlan, at_fault: list[Sequence], error: str) -> None:
        """Undo a plan that cannot be run: end the sequences at fault, and let the others be computed again."""
        self._tables.put_back(plan.copies, plan.edits)
        self._states = plan.states | self._states
        for slice in plan.slices:
            self._tables.distrust(slice.sequence)  # blocks were published that this step would have filled
        for sequence in at_fault:
            self._ended.append(self._broken(sequence, error))
        for sequence in (slice.sequence for slice in plan.slices):
            if sequence.status == Status.RUNNING:
                self._preempt(sequence)
        self._arrived += [sequence for sequence in plan.arrivals if sequence.status == Status.RUNNING]

    # --- beams ------------------------------------------------------------------------------------------------------

    def sequence(self, request_id: str, index: int) -> Sequence:
        return next(sequence for sequence in self.requests[request_id] if sequence.index == index)

    def extend(self, sequence: Sequence, token: int) -> None:
        """Continue a held sequence with this token."""
        sequence.tokens.append(token)
        if sequence.status == Status.BESIDE:
            self._enqueue(sequence)

    def branch(self, sequence: Sequence, index: int) -> Sequence:
        """Fork a held sequence, to be extended with another token."""
        request_id = sequence.request.id
        group = self.requests[request_id]
        if any(other.index == index for other in group):
            raise RuntimeError(f"request {request_id!r} already has sample {index}")
        twin = twin_of(sequence, index=index, limits=self.limits)
        group.append(twin)
        if sequence.status == Status.RUNNING and self._free_rows:
            self._fork_row(twin, sequence)
        return twin
