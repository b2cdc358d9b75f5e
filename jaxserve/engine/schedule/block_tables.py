# SPDX-License-Identifier: Apache-2.0
"""The block table of each sequence with a row, and the changes to send to the devices with the next step.

It allocates, shares and frees blocks through the pool; the scheduler decides when a sequence runs.

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
        self.pool = BlockPool(limits.num_blocks, limits.block_size, caching=caching, seed=hash_seed)
        self._limits = limits
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
        changed for it: more blocks are available, or its next block is cached.
        """
        pool = self.pool
        room = pool.available - reserve
        if room <= 0:
            return False  # it needs at least one block: its last token is always computed, for its logits
        if sequence.generation != pool.generation:
            sequence.generation, sequence.keys, sequence.refused = pool.generation, [], None
        if sequence.refused is not None:
            had, missing = sequence.refused
            if room <= had and not (missing and pool.find([missing])):
                return False
        hits = self._hits(sequence)
        unseen = self._unseen(len(hits) * self._limits.block_size)
        shared = hits[unseen:]
        sequence.blocks, sequence.first_block = [NULL_BLOCK] * unseen + shared, unseen
        # Cached hits no longer count as available once they are shared. They are not shared, and so keep their place in
        # the order of reuse, unless the sequence begins.
        if self.wanted(sequence) > room - pool.unowned(shared):
            sequence.blocks, sequence.first_block = [], 0
            sequence.refused = room, sequence.keys[len(hits)] if len(hits) < len(sequence.keys) else b""
            return False
        sequence.refused = None
        pool.share(shared)
        sequence.published = len(hits)
        sequence.computed = len(hits) * self._limits.block_size
        return True

    def begin_as(self, twin: Sequence, leader: Sequence) -> None:
        """Share the leader's blocks with the fork, including a partial last block, which the first writer copies."""
        self.pool.share(leader.blocks[leader.first_block :])
        twin.blocks, twin.first_block = list(leader.blocks), leader.first_block
        twin.computed, twin.cached = leader.computed, leader.cached
        twin.keys, twin.generation, twin.published = list(leader.keys), leader.generation, leader.published

    def end(self, sequence: Sequence) -> None:
        self.pool.release(sequence.blocks)
        sequence.blocks, sequence.first_block = [], 0
        sequence.computed = sequence.published = 0

    def distrust(self, sequence: Sequence) -> None:
        """Remove its blocks from the prefix cache."""
        self.pool.forget(sequence.blocks[sequence.first_block :])

    def tell(self, sequence: Sequence, first: int = 0) -> None:
        """Send its block table to the devices, from this block on."""
        at, blocks, edits = sequence.row * self._limits.width, sequence.blocks, self._edits
        for i in range(first, len(blocks)):
            edits[at + i] = blocks[i]

    # --- progress of a sequence -------------------------------------------------------------------------------------

    def wanted(self, sequence: Sequence) -> int:
        """The number of additional blocks that its tokens need."""
        needed = -(-sequence.length // self._limits.block_size)
        if self._limits.window is not None:
            needed = min(needed, sequence.first_block + self._limits.blocks_for(sequence.length))
        return max(0, needed - len(sequence.blocks))

    def grow(self, sequence: Sequence, count: int) -> bool:
        """Allocate exclusively owned slots for its next tokens. Changes nothing if blocks are short."""
        blocks, at = sequence.blocks, sequence.computed // self._limits.block_size
        needed = (sequence.computed + count - 1) // self._limits.block_size + 1 - len(blocks)
        copies = at < len(blocks) and self.pool.shared(blocks[at])
        if needed <= 0 and not copies:
            return True
        new = self.pool.allocate(max(needed, 0) + copies)
        if new is None:
            return False
        had = len(blocks)
        if copies:
            mine = new.pop()
            self._copies.append((blocks[at], mine))
            self.pool.release([blocks[at]])
            blocks[at] = mine
            self._edits[sequence.row * self._limits.width + at] = mine
        blocks += new
        self.tell(sequence, had)
        return True

    def leave_window(self, sequence: Sequence) -> None:
        """Free the blocks outside the sliding window of all tokens still to be computed."""
        seen = self._unseen(sequence.computed)
        if seen > sequence.first_block:
            blocks, at = sequence.blocks, sequence.row * self._limits.width
            self.pool.release(blocks[sequence.first_block : seen])
            for i in range(sequence.first_block, seen):
                blocks[i] = self._edits[at + i] = NULL_BLOCK
            sequence.first_block = seen

    def _unseen(self, position: int) -> int:
        """The number of leading blocks outside the sliding window of the token at `position`."""
        window = self._limits.window
        return 0 if window is None else max(0, position - window + 1) // self._limits.block_size

    # --- prefix cache -----------------------------------------------------------------------------------------------

    def publish(self, sequence: Sequence) -> None:
        """Publish its full, computed blocks whose tokens are known to the prefix cache."""
        full = min(sequence.computed, len(sequence.tokens)) // self._limits.block_size
        if full <= sequence.published:
            return
        if self._limits.enable_prefix_caching and sequence.generation == self.pool.generation:
            for i in range(sequence.published, full):
                if sequence.blocks[i] != NULL_BLOCK:
                    self.pool.publish(sequence.blocks[i], self._key(sequence, i))
        sequence.published = full

    def _hits(self, sequence: Sequence) -> list[int]:
        """Its cached prefix, up to the first token whose logits are needed."""
        if sequence.request.params.skip_reading_prefix_cache:
            return []
        last = min(sequence.length, sequence.scored) - 1 if sequence.scores else sequence.length - 1
        return self.pool.find(self._key(sequence, i) for i in range(last // self._limits.block_size))

    def _key(self, sequence: Sequence, i: int) -> bytes:
        """The key of its block, computed on demand."""
        size, keys = self._limits.block_size, sequence.keys
        while len(keys) <= i:
            parent = keys[-1] if keys else self.pool.root(sequence.request.cache_salt or "")
            start, stop = len(keys) * size, (len(keys) + 1) * size
            extras = [extra for span in sequence.request.spans for extra in span.within(start, stop)]
            keys.append(self.pool.chain(parent, sequence.tokens[start:stop], *extras))
        return keys[i]
