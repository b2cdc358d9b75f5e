# SPDX-License-Identifier: Apache-2.0
"""Block pool: random walks beside a naive model, orders of reuse written out, keys, misuse, planted corruption."""

import copy
import random
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from jaxserve.engine.schedule.block_pool import BlockPool

Chain = tuple[int, str, tuple[tuple[int, ...], ...]]  # the generation and extra of its root, the tokens of its blocks


class Model:
    """The same rules with none of the bookkeeping: one queue of who is reused, the next one first."""

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
        """What a sequence does: shares what is cached, allocates the rest, publishes all."""
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
        """Any owned block under any chain, so also under one that is taken; refused where it has another."""
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
        """Refused whole, whatever good there is in the list before it or after it."""
        blocks = self.draw_owned(data)
        call: Callable[[list[int]], None] = data.draw(st.sampled_from([self.pool.share, self.pool.release]))
        bad = [block for block in self.model.queue if call == self.pool.release or block not in self.model.chain_of]
        blocks.insert(data.draw(st.integers(0, len(blocks))), data.draw(st.sampled_from([*bad, -1, 9])))
        with pytest.raises(RuntimeError, match=r"cannot (share|release) block"):
            call(blocks)

    @invariant()
    def agrees(self) -> None:
        pool, model = self.pool, self.model
        pool.check_integrity(model.owners)
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


# --- orders of reuse ------------------------------------------------------------------------------------------------


def filled(pool: BlockPool, count: int, *, extra: str = "") -> tuple[list[int], list[bytes]]:
    """A sequence's `count` published blocks, and their keys."""
    blocks = pool.allocate(count)
    assert blocks is not None
    key = pool.root(extra)
    keys = [key := pool.chain(key, range(index, index + 4)) for index in range(count)]
    for block, key in zip(blocks, keys, strict=True):
        pool.publish(block, key)
    return blocks, keys


def test_free_blocks_are_reused_last_in_first_out() -> None:
    pool = BlockPool(8, 4)
    assert pool.allocate(5) == [1, 2, 3, 4, 5]
    pool.release([2, 3])
    pool.release([5])
    assert [pool.allocate(1), pool.allocate(3)] == [[5], [2, 3, 6]]
    assert pool.allocate(2) is None, "all or nothing"
    assert pool.allocate(1) == [7]


def test_cached_blocks_are_reused_after_free_ones_least_recently_used_and_tails_first() -> None:
    pool = BlockPool(8, 4)
    old, old_keys = filled(pool, 2, extra="old")
    new, new_keys = filled(pool, 3, extra="new")
    assert (old, new) == ([1, 2], [3, 4, 5])
    pool.release(new)
    pool.release(old)
    assert pool.counts() == (2, 5, 0)
    assert pool.allocate(3) == [6, 7, 5]
    assert pool.find(new_keys) == [3, 4], "lost its tail, kept its head"
    pool.share(pool.find(new_keys))
    pool.release(new[:2])  # now used more recently than `old`
    assert pool.allocate(2) == [2, 1]
    assert pool.find(old_keys) == []
    assert pool.allocate(2) == [4, 3]
    assert pool.counts() == (0, 0, 7)


def test_a_cached_block_stays_when_its_owner_goes_and_a_duplicate_does_not() -> None:
    pool = BlockPool(8, 4)
    first, keys = filled(pool, 2)
    second, _ = filled(pool, 2)
    assert pool.find(keys) == first
    pool.release(first)
    pool.release(second)
    assert pool.counts() == (5, 2, 0)
    assert pool.find(keys) == first
    assert pool.allocate(2) == second


def test_forgotten_blocks_are_the_next_ones_reused_and_owned_ones_stay_owned() -> None:
    pool = BlockPool(8, 4)
    blocks, keys = filled(pool, 3)
    pool.release(blocks[1:])
    pool.forget([0, *blocks])
    assert pool.find(keys) == []
    pool.check_integrity({blocks[0]: 1})
    assert pool.counts() == (6, 0, 1)
    assert pool.allocate(2) == blocks[1:]


def test_reset_keeps_owners_and_ignores_what_is_published_under_keys_of_before() -> None:
    pool = BlockPool(8, 4)
    blocks, keys = filled(pool, 3)
    pool.release(blocks[:1])
    pool.reset()
    assert pool.generation == 1
    assert pool.find(keys[:1]) == pool.find(keys[1:]) == []
    pool.publish(blocks[1], keys[1])
    pool.publish(blocks[2], pool.chain(keys[1], [9] * 4))  # a sequence that goes on with its old chain
    assert pool.find(keys[1:]) == []
    pool.check_integrity({blocks[1]: 1, blocks[2]: 1})
    fresh, fresh_keys = filled(pool, 3)
    assert pool.find(fresh_keys) == fresh
    assert not set(keys) & set(fresh_keys)


def test_find_takes_no_key_past_the_first_miss() -> None:
    pool = BlockPool(8, 4)
    blocks, keys = filled(pool, 2)
    pulled: list[bytes] = []

    def lazily() -> Iterator[bytes]:
        for key in [*keys, b"unknown", keys[0]]:
            pulled.append(key)
            yield key

    assert pool.find(lazily()) == blocks
    assert pulled == [*keys, b"unknown"]


def test_without_caching_nothing_is_published() -> None:
    pool = BlockPool(8, 4, caching=False)
    blocks, keys = filled(pool, 3)
    assert pool.find(keys) == []
    pool.release(blocks)
    pool.check_integrity({})
    assert pool.counts() == (7, 0, 0)


# --- keys -----------------------------------------------------------------------------------------------------------


EXTRA_LISTS = st.lists(st.one_of(st.text(max_size=3), st.binary(max_size=3), st.integers()), max_size=3)


@given(left=EXTRA_LISTS, right=EXTRA_LISTS)
def test_roots_are_equal_only_for_equal_extras(left: list[bytes | str | int], right: list[bytes | str | int]) -> None:
    pool = BlockPool(2, 4)
    assert (pool.root(*left) == pool.root(*right)) == (left == right)


def test_extras_that_look_alike_have_different_roots() -> None:
    pool = BlockPool(2, 4)
    alike = [("ab",), ("a", "b"), ("b", "a"), ("a", "", "b"), ("",), (), ("", ""), (b"ab",), ("1",), (1,), (b"1",)]
    alike += [(-1,), ("0x1",), (b"",), (0,), ("\ud800",), (1 << 20000,)]
    alike += [(f"a{chr(between)}b",) for between in range(128)]
    assert len({pool.root(*extras) for extras in alike}) == len(alike)
    assert pool.root("a", 1) == pool.root("a", 1)


def test_keys_tell_parents_tokens_and_their_order_apart() -> None:
    pool = BlockPool(2, 4)
    root, salted = pool.root(), pool.root("salt")
    keys = [pool.chain(parent, [1, 2, 3, 4]) for parent in (root, salted, pool.chain(root, [1, 2, 3, 4]))]
    keys += [pool.chain(root, tokens) for tokens in ([1, 2, 4, 3], [1, 2, 3, 5], [0x0201, 3, 4, 0], [2**32 - 1] * 4)]
    assert len({root, salted, *keys}) == 2 + len(keys)
    assert pool.chain(root, (1, 2, 3, 4)) == keys[0]
    assert min(map(len, keys)) >= 16 and len({key[:16] for key in keys}) == len(keys), "128 bits that differ"


def test_another_pool_has_other_keys() -> None:
    """Nobody outside of the process can make prompts whose keys collide."""
    here, there = BlockPool(2, 4), BlockPool(2, 4)
    assert here.root("a") != there.root("a")
    parent = here.root("a")
    assert here.chain(parent, [1, 2, 3, 4]) != there.chain(parent, [1, 2, 3, 4])


@pytest.mark.parametrize("tokens", [[], [1, 2, 3], [1, 2, 3, 4, 5], [1, 2, 3, -1], [1, 2, 3, 2**32]])
def test_a_key_takes_a_full_block_of_known_tokens(tokens: list[int]) -> None:
    pool = BlockPool(2, 4)
    with pytest.raises(RuntimeError, match=f"4 token ids from 0 to .* got {len(tokens)}"):
        pool.chain(pool.root(), tokens)


def test_what_is_no_key_is_refused() -> None:
    pool = BlockPool(4, 4)
    pool.allocate(1)
    with pytest.raises(RuntimeError, match="parent"):
        pool.chain(b"", [1, 2, 3, 4])
    with pytest.raises(RuntimeError, match=r"block 1 .* 3 bytes"):
        pool.publish(1, b"key")


# --- misuse and corruption ------------------------------------------------------------------------------------------


def busy_pool() -> BlockPool:
    """Blocks 1 and 2 used, 1 by two owners and under a key; 3 and 4 cached; 5 and 6 free."""
    pool = BlockPool(7, 4)
    blocks, _ = filled(pool, 4)
    pool.share([blocks[0]])
    pool.forget([blocks[1]])
    pool.release(blocks[2:])
    return pool


def state(pool: BlockPool) -> object:
    kept = (pool._owners, pool._key_of, pool._block_of, pool._free, list(pool._cached), pool.generation)
    return copy.deepcopy(kept)


MISUSES: dict[str, tuple[Callable[[BlockPool], object], str]] = {
    "release a free block": (lambda pool: pool.release([1, 5, 2]), "release block 5: it is free"),
    "release a cached block": (lambda pool: pool.release([3]), "release block 3: it is cached and has no owner"),
    "release once too often": (lambda pool: pool.release([2, 1, 2]), "release block 2"),
    "release past the end": (lambda pool: pool.release([1, 7]), "release block 7: .* 0 to 6"),
    "release a negative id": (lambda pool: pool.release([-5, 1]), "release block -5: .* 0 to 6"),
    "share a free block": (lambda pool: pool.share([3, 1, 6]), "share block 6: it is free"),
    "share the null block": (lambda pool: pool.share([3, 0]), "share block 0: it is the null block"),
    "share past the end": (lambda pool: pool.share([3, 7]), "share block 7"),
    "share a negative id": (lambda pool: pool.share([3, -6]), "share block -6"),
    "publish a free block": (lambda pool: pool.publish(5, pool.root()), "publish block 5: it is free"),
    "publish a cached block": (lambda pool: pool.publish(3, pool.root()), "publish block 3: it is cached"),
    "publish the null block": (lambda pool: pool.publish(0, pool.root()), "publish block 0: it is the null block"),
    "publish past the end": (lambda pool: pool.publish(7, pool.root()), "publish block 7"),
    "publish a negative id": (lambda pool: pool.publish(-5, pool.root()), "publish block -5"),
    "publish as something else": (lambda pool: pool.publish(1, pool.root()), "publish block 1: .* another key"),
    "forget past the end": (lambda pool: pool.forget([1, 7]), "forget block 7"),
    "forget a negative id": (lambda pool: pool.forget([-1, 1]), "forget block -1"),
    "ask past the end": (lambda pool: pool.shared(7), "block 7"),
    "ask for a negative id": (lambda pool: pool.shared(-6), "block -6"),
    "allocate less than nothing": (lambda pool: pool.allocate(-1), "-1"),
    "a pool of the null block alone": (lambda pool: BlockPool(1, 16), "num_blocks is 1"),
    "a pool of empty blocks": (lambda pool: BlockPool(8, 0), "block_size 0"),
}


@pytest.mark.parametrize("name", MISUSES)
def test_misuse_names_block_and_state_and_changes_nothing(name: str) -> None:
    call, message = MISUSES[name]
    pool = busy_pool()
    before = state(pool)
    with pytest.raises(RuntimeError, match=message):
        call(pool)
    assert state(pool) == before
    pool.check_integrity({1: 2, 2: 1})


CORRUPTIONS = [
    "pool._owners[5] = 1",
    "pool._owners[2] = 0",
    "pool._owners[2] = -1",
    "pool._owners[0] = 1",
    "pool._owners.pop()",
    "pool._free.append(5)",
    "pool._free.append(1)",
    "pool._free.append(0)",
    "pool._free.append(7)",
    "pool._free.remove(5)",
    "pool._free.append(3); del pool._cached[3]",
    "pool._cached[2] = None",
    "pool._cached[-1] = None",
    "pool._free.remove(5); pool._cached[5] = None",
    "del pool._cached[4]",
    "pool._key_of[3] = None",
    "pool._key_of[3] = pool._key_of[4]",
    "pool._key_of[2] = pool._key_of[1]",
    "pool._key_of[2] = pool.root()",
    "pool._key_of[0] = pool.root(); pool._block_of[pool.root()] = 0",
    "pool._block_of[pool.root()] = 2",
    "pool._block_of[pool.root()] = 70",
    "del pool._block_of[pool._key_of[3]]",
    "pool._block_of.clear()",
    "pool.generation += 1; pool._generation_mark = (1).to_bytes(8)",
    "pool._caching = False",
]


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_integrity_check_finds_planted_corruption(corruption: str) -> None:
    pool = busy_pool()
    pool.check_integrity()
    exec(corruption, {"pool": pool})
    with pytest.raises(RuntimeError, match="is inconsistent: "):
        pool.check_integrity()


@pytest.mark.parametrize("owners", [{}, {1: 2}, {1: 1, 2: 1}, {1: 2, 2: 2}, {1: 2, 2: 1, 3: 1}, {1: 2, 2: 1, 99: 1}])
def test_integrity_check_finds_owners_that_were_counted_otherwise(owners: dict[int, int]) -> None:
    pool = busy_pool()
    pool.check_integrity({0: 5, 1: 2, 2: 1, 3: 0})
    with pytest.raises(RuntimeError, match="by the caller's count"):
        pool.check_integrity(owners)


def test_checks_hold_without_assertions() -> None:
    script = """
from jaxserve.engine.schedule.block_pool import BlockPool
pool = BlockPool(4, 4)
for call in (lambda: pool.release([1]), lambda: pool._free.append(1) or pool.check_integrity()):
    try:
        call()
    except RuntimeError as error:
        print(error)
"""
    ran = subprocess.run([sys.executable, "-O", "-c", script], capture_output=True, text=True, check=True)
    assert [line.split(":")[0] for line in ran.stdout.splitlines()] == [
        "cannot release block 1",
        "the block pool is inconsistent",
    ]


def test_nothing_grows_with_the_number_of_operations() -> None:
    pool, rng = BlockPool(64, 2), random.Random(0)
    running: list[list[int]] = []
    largest = {"early": 0, "late": 0}
    operations = 0
    while operations < 200_000:
        if len(running) == 6:
            pool.release(running.pop(rng.randrange(6)))
        key = pool.root("salt", rng.randrange(4))
        keys = [key := pool.chain(key, [token, rng.randrange(3)]) for token in range(8)]
        found = pool.find(keys)
        pool.share(found)
        fresh = pool.allocate(len(keys) - len(found)) or []
        for block, key in zip(fresh, keys[len(found) :], strict=False):
            pool.publish(block, key)
        running.append([*found, *fresh])
        if rng.randrange(500) == 0:
            pool.reset()
        operations += 13 + len(fresh)
        containers = [value for value in vars(pool).values() if isinstance(value, list | dict | set | deque)]
        assert len(containers) >= 5 and sum(map(len, containers)) <= 64 * 4
        phase = "early" if operations < 50_000 else "late"
        largest[phase] = max(largest[phase], sum(map(sys.getsizeof, containers)))
    assert largest["late"] < 1.5 * largest["early"], "a dict may be half full of what was deleted, no more"
