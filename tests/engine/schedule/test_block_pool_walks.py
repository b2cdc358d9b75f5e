# SPDX-License-Identifier: Apache-2.0
"""Block pool: random walks, each operation compared with a naive model of the same rules."""

from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from jaxserve.engine.schedule.block_pool import BlockPool
from tests.engine.schedule.integrity import check_integrity

Chain = tuple[int, str, tuple[tuple[int, ...], ...]]  # the generation and extra of its root, the tokens of its blocks


class Model:
    """The same rules without the bookkeeping: one queue of the blocks to reuse, the next one first."""

    def __init__(self, num_blocks: int) -> None:
        self.queue = list(range(1, num_blocks))
        self.owners: dict[int, int] = {}
        self.chain_of: dict[int, Chain] = {}

    def allocate(self, count: int) -> list[int] | None:
        if count > len(self.queue):
            return None
        taken, self.queue = self.queue[:count], self.queue[count:]
        for block in taken:
            self.owners[block] = 1
            self.chain_of.pop(block, None)
        return taken

    def share(self, blocks: list[int]) -> None:
        for block in blocks:
            self.owners[block] = self.owners.get(block, 0) + 1
        self.queue = [block for block in self.queue if block not in self.owners]

    def release(self, blocks: list[int]) -> None:
        for block in filter(None, blocks):
            self.owners[block] -= 1
        for block in reversed(list(dict.fromkeys(blocks))):
            if block and not self.owners[block]:
                del self.owners[block]
                self.queue.insert(len(self.queue) if block in self.chain_of else 0, block)

    def publish(self, block: int, chain: Chain) -> None:
        if chain not in self.chain_of.values():
            self.chain_of[block] = chain

    def find(self, chains: list[Chain]) -> list[int]:
        block_of = {chain: block for block, chain in self.chain_of.items()}
        hits = [block_of.get(chain, 0) for chain in chains]
        return hits[: hits.index(0)] if 0 in hits else hits

    def forget(self, blocks: list[int]) -> None:
        for block in reversed(blocks):
            if self.chain_of.pop(block, None) and block in self.queue:
                self.queue.remove(block)
                self.queue.insert(0, block)


class PoolMachine(RuleBasedStateMachine):
    @initialize(num_blocks=st.integers(2, 9))
    def start(self, num_blocks: int) -> None:
        self.pool, self.model = BlockPool(num_blocks, 2), Model(num_blocks)

    def keys(self, chain: Chain) -> list[bytes]:
        """The keys of all blocks of the chain; those of earlier generations from a root as it was then."""
        generation, extra, blocks = chain
        key = self.pool.root(extra)[:-8] + generation.to_bytes(8)
        return [key := self.pool.chain(key, tokens) for tokens in blocks]

    def draw_chain(self, data: st.DataObject) -> Chain:
        blocks = data.draw(st.lists(st.sampled_from([(0, 0), (0, 1)]), min_size=1, max_size=3), "blocks")
        age = data.draw(st.sampled_from([0, 0, 0, 1]), "age")
        return max(self.pool.generation - age, 0), data.draw(st.sampled_from(["", "salt"])), tuple(blocks)

    def draw_owned(self, data: st.DataObject) -> list[int]:
        """Owned blocks, none more often than it has owners, and null blocks."""
        owned = [block for block, count in self.model.owners.items() for _ in range(count)]
        drawn = data.draw(st.lists(st.sampled_from(range(len(owned))), unique=True) if owned else st.just([]))
        return data.draw(st.permutations([*(owned[index] for index in drawn), 0]), "owned")

    @rule(count=st.integers(0, 9))
    def allocate(self, count: int) -> None:
        assert self.pool.allocate(count) == self.model.allocate(count)

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        blocks = self.draw_owned(data)
        self.pool.release(blocks)
        self.model.release(blocks)

    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        blocks = [block for block in self.draw_owned(data) if block]
        self.pool.share(blocks)
        self.model.share(blocks)

    @rule(data=st.data())
    def compute(self, data: st.DataObject) -> None:
        """Do what a sequence does: share cached blocks, allocate the rest, publish all."""
        chain = self.draw_chain(data)
        keys = self.keys(chain)
        chains = [(*chain[:2], chain[2][:end]) for end in range(1, len(keys) + 1)]
        blocks = self.pool.find(iter(keys))
        assert blocks == self.model.find(chains)
        self.pool.share(blocks)
        self.model.share(blocks)
        fresh = self.pool.allocate(len(keys) - len(blocks))
        assert fresh == self.model.allocate(len(keys) - len(blocks))
        for block, key, prefix in zip(blocks + (fresh or []), keys, chains, strict=False):
            self.pool.publish(block, key)
            if prefix[0] == self.pool.generation:
                self.model.publish(block, prefix)

    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        """Publish any owned block under any chain, also a taken one; an error if the block has another chain."""
        if not self.model.owners:
            return
        block: int = data.draw(st.sampled_from(list(self.model.owners)))
        chain = self.draw_chain(data)
        key = self.keys(chain)[-1]
        if chain[0] != self.pool.generation:
            self.pool.publish(block, key)
        elif self.model.chain_of.get(block, chain) != chain:
            with pytest.raises(RuntimeError, match=f"publish block {block}"):
                self.pool.publish(block, key)
        else:
            self.pool.publish(block, key)
            self.model.publish(block, chain)

    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        blocks = data.draw(st.lists(st.integers(0, self.pool.num_blocks - 1)))
        self.pool.forget(blocks)
        self.model.forget(blocks)

    @rule(rarely=st.integers(0, 3))
    def reset(self, rarely: int) -> None:
        if rarely == 0:
            self.pool.reset()
            self.model.chain_of.clear()

    @rule(data=st.data())
    def misuse(self, data: st.DataObject) -> None:
        """One bad block in a list makes the whole call fail."""
        blocks = self.draw_owned(data)
        call: Callable[[list[int]], None] = data.draw(st.sampled_from([self.pool.share, self.pool.release]))
        bad = [block for block in self.model.queue if call == self.pool.release or block not in self.model.chain_of]
        blocks.insert(data.draw(st.integers(0, len(blocks))), data.draw(st.sampled_from([*bad, -1, 9])))
        with pytest.raises(RuntimeError, match=r"cannot (share|release) block"):
            call(blocks)

    @invariant()
    def agrees(self) -> None:
        pool, model = self.pool, self.model
        check_integrity(pool, model.owners)
        cached = sum(block in model.chain_of for block in model.queue)
        assert pool.counts() == (len(model.queue) - cached, cached, len(model.owners))
        assert sum(pool.counts()) == pool.num_blocks - 1
        assert pool.available == len(model.queue)
        for block in range(pool.num_blocks):
            assert pool.shared(block) == (model.owners.get(block, 0) > 1)
        for block, chain in model.chain_of.items():
            assert pool.find([self.keys(chain)[-1]]) == [block]

    def teardown(self) -> None:
        if hasattr(self, "pool"):
            assert self.pool.allocate(self.pool.available) == self.model.queue


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=150, stateful_step_count=40)
