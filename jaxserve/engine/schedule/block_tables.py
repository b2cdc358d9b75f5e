# SPDX-License-Identifier: Apache-2.0
"""The block tables of each sequence with a row, and the changes to send to the devices with the next step.

It allocates, shares and frees blocks through the pool; the scheduler decides when a sequence runs. A sequence has one
table for each cache group. All have the same length, since all layers write the KV of every token; in groups with a
sliding window the blocks before the window are freed, and null blocks take their places.

Changes on the devices (block copies, then block-table edits) are sent with the next step and applied before it. Steps
run in order, so a block freed now can be reused by the next step while a step in flight still reads it, and a block can
be shared as soon as the step that fills it is planned.
"""

from jaxserve.engine.capacity import Limits
from jaxserve.engine.schedule.block_pool import NULL_BLOCK, BlockPool
from jaxserve.engine.schedule.sequence import Sequence


class BlockTables:
    def __init__(self, limits: Limits, *, hash_seed: str = "") -> None:
        caching = limits.enable_prefix_caching
        self.pool = BlockPool(
            limits.num_blocks, limits.block_size, caching=caching, seed=hash_seed, groups=limits.groups
        )
        self._limits, self._size = limits, limits.block_size
        self._complete = [group for group, window in enumerate(limits.windows) if window is None]
        self._windowed = [(group, window) for group, window in enumerate(limits.windows) if window is not None]
        self.windowed = bool(self._windowed)  # whether a group frees blocks while its sequence runs
        self._copies: list[tuple[int, int]] = []
        self._edits: dict[int, int] = {}

    def take_changes(self) -> tuple[list[tuple[int, int]], dict[int, int]]:
        """Block copies and table edits since the last step."""
        copies, edits = self._copies, self._edits
        self._copies, self._edits = [], {}
        return copies, edits

    def put_back(self, copies: list[tuple[int, int]], edits: dict[int, int]) -> None:
        """Changes of a step that is not run: send them with the next, before its own."""
        self._copies = copies + self._copies
        self._edits = edits | self._edits

    # --- start and end of a sequence --------------------------------------------------------------------------------

    def begin(self, sequence: Sequence, *, reserve: int) -> bool:
        """Share its cached prefix if all other blocks it needs are available beside `reserve`; return whether.

        A sequence that finds no room is asked again at every step, but looks up its prefix only if something has
        changed for it: more blocks are available, or a block that it missed is cached.
        """
        pool = self.pool
        room = pool.available - reserve
        if room <= 0:
            return False  # it needs at least one block: its last token is always computed, for its logits
        if sequence.generation != pool.generation:
            sequence.generation, sequence.keys, sequence.refused = pool.generation, [], None
        if sequence.refused is not None:
            had, missed = sequence.refused
            if room <= had and not any(pool.cached(key, group) is not None for key, group in missed):
                return False
        count, shared, missed = self._hits(sequence)
        for group, hits in enumerate(shared):
            first = sequence.first_blocks[group] = count - len(hits)
            sequence.blocks[group] = [NULL_BLOCK] * first + hits
        # Cached hits no longer count as available once they are shared. They are not shared, and so keep their place in
        # the order of reuse, unless the sequence begins.
        if self.wanted(sequence) > room - sum(map(pool.unowned, shared)):
            sequence.clear_blocks()
            sequence.refused = room, missed
            return False
        sequence.refused = None
        for hits in shared:
            pool.share(hits)
        sequence.published = count
        sequence.computed = count * self._size
        return True

    def begin_as(self, twin: Sequence, leader: Sequence) -> None:
        """Share the leader's blocks with the fork, including a partial last block, which the first writer copies."""
        for blocks, first in zip(leader.blocks, leader.first_blocks, strict=True):
            self.pool.share(blocks[first:])
        twin.blocks, twin.first_blocks = list(map(list, leader.blocks)), list(leader.first_blocks)
        twin.forked = leader.forked = True
        twin.computed, twin.cached = leader.computed, leader.cached
        twin.keys, twin.generation, twin.published = list(leader.keys), leader.generation, leader.published

    def end(self, sequence: Sequence) -> None:
        for blocks in sequence.blocks:
            self.pool.release(blocks)
        sequence.clear_blocks()
        sequence.computed = sequence.published = 0

    def distrust(self, sequence: Sequence) -> None:
        """Remove its blocks from the prefix cache."""
        for blocks in sequence.blocks:
            self.pool.forget(blocks)

    def send(self, sequence: Sequence, first: int = 0) -> None:
        """Send its block tables to the devices, from this block on."""
        edits = self._edits
        for group, blocks in enumerate(sequence.blocks):
            at = self._cell(group, sequence.row)
            for i in range(first, len(blocks)):
                edits[at + i] = blocks[i]

    def _cell(self, group: int, row: int) -> int:
        """Where a row's table begins in the array [groups, rows, width]."""
        return (group * self._limits.max_num_seqs + row) * self._limits.width

    # --- progress of a sequence -------------------------------------------------------------------------------------

    def wanted(self, sequence: Sequence) -> int:
        """The number of additional blocks that its tokens need."""
        needed, had = -(-sequence.length // self._size), sequence.num_blocks
        wanted = len(self._complete) * max(0, needed - had)
        for group, window in self._windowed:
            most = sequence.first_blocks[group] + self._limits.blocks_in(window, sequence.length)
            wanted += max(0, min(needed, most) - had)
        return wanted

    def grow(self, sequence: Sequence, count: int) -> bool:
        """Allocate exclusively owned slots for its next tokens. Changes nothing if blocks are short."""
        tables = sequence.blocks
        had = len(tables[0])
        needed = (sequence.computed + count - 1) // self._size + 1 - had
        if needed <= 0:
            if not sequence.forked:
                return True
            needed = 0
        at = sequence.computed // self._size
        copied = [group for group, blocks in enumerate(tables) if at < had and self.pool.shared(blocks[at])]
        new = self.pool.allocate(needed * len(tables) + len(copied))
        if new is None:
            return False
        for group in copied:
            mine, blocks = new.pop(), tables[group]
            self._copies.append((blocks[at], mine))
            self.pool.release([blocks[at]])
            blocks[at] = mine
            self._edits[self._cell(group, sequence.row) + at] = mine
        for group, blocks in enumerate(tables):
            blocks += new[group * needed : (group + 1) * needed]
        self.send(sequence, had)
        return True

    def leave_window(self, sequence: Sequence) -> None:
        """Free the blocks outside the sliding windows of all tokens still to be computed."""
        for group, window in self._windowed:
            first, seen = sequence.first_blocks[group], self._unseen(sequence.settled, window)
            if seen > first:
                blocks, at = sequence.blocks[group], self._cell(group, sequence.row)
                self.pool.release(blocks[first:seen])
                for i in range(first, seen):
                    blocks[i] = self._edits[at + i] = NULL_BLOCK
                sequence.first_blocks[group] = seen

    def _unseen(self, position: int, window: int | None) -> int:
        """The number of leading blocks outside the sliding window of the token at `position`."""
        return 0 if window is None else max(0, position - window + 1) // self._size

    # --- prefix cache -----------------------------------------------------------------------------------------------

    def publish(self, sequence: Sequence) -> None:
        """Publish its full blocks whose tokens are known and whose KV is final to the prefix cache."""
        full = min(sequence.settled, len(sequence.tokens)) // self._size
        if full <= sequence.published:
            return
        if self._limits.enable_prefix_caching and sequence.generation == self.pool.generation:
            for group, blocks in enumerate(sequence.blocks):
                for i in range(sequence.published, full):
                    if blocks[i] != NULL_BLOCK:
                        self.pool.publish(blocks[i], self._key(sequence, i), group)
        sequence.published = full

    def _hits(self, sequence: Sequence) -> tuple[int, list[list[int]], list[tuple[bytes, int]]]:
        """The number of blocks in its longest usable prefix, up to the first token whose logits are needed; the last of
        them that each group needs; and keys with their groups that prevent a longer one.

        Groups that keep all tokens need every block of it, the others those in the window of the token after it.
        """
        found: list[list[int]] = [[] for _ in self._limits.windows]
        if not sequence.reads_cache or not self._limits.enable_prefix_caching:
            return 0, found, []
        last = min(sequence.length, sequence.scored) - 1 if sequence.scores else sequence.length - 1
        count = last // self._size
        missed: list[tuple[bytes, int]] = []
        for group in self._complete:
            found[group] = self.pool.find((self._key(sequence, i) for i in range(count)), group)
            if len(found[group]) < count:
                count = len(found[group])
                missed.append((self._key(sequence, count), group))
        checked = 0  # groups in a row that have all that a prefix of this length needs
        while count and checked < len(self._windowed):
            for group, window in self._windowed:
                gap = self._gap(sequence, count, group, window)
                checked += 1
                if gap is not None:  # which every longer prefix up to here needs too
                    if all(group != other for _, other in missed):
                        missed.append((self._key(sequence, gap), group))
                    count, checked = self.pool.last_cached(sequence.keys, gap, group), 0
        for group in self._complete:
            del found[group][count:]
        for group, window in self._windowed:
            first = self._unseen(count * self._size, window)
            found[group] = self.pool.find((self._key(sequence, i) for i in range(first, count)), group)
        return count, found, missed

    def _gap(self, sequence: Sequence, count: int, group: int, window: int) -> int | None:
        """The last block that a prefix of `count` blocks needs and that this group has not cached."""
        needed = reversed(range(self._unseen(count * self._size, window), count))
        return next((i for i in needed if self.pool.cached(self._key(sequence, i), group) is None), None)

    def _key(self, sequence: Sequence, i: int) -> bytes:
        """The key of its block, computed on demand."""
        size, keys = self._size, sequence.keys
        while len(keys) <= i:
            parent = keys[-1] if keys else self.pool.root(sequence.request.cache_salt or "")
            start, stop = len(keys) * size, (len(keys) + 1) * size
            extras = [extra for span in sequence.request.spans for extra in span.within(start, stop)]
            keys.append(self.pool.chain(parent, sequence.tokens[start:stop], *extras))
        return keys[i]
