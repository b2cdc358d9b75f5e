# SPDX-License-Identifier: Apache-2.0
"""Block pool: orders of reuse, keys, misuse, planted corruption. Random walks are in test_block_pool_walks.py."""

import copy
import random
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.engine.schedule.block_pool import BlockPool
from tests.engine.schedule.integrity import check_integrity

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


def test_a_released_block_stays_cached_unless_it_is_a_duplicate() -> None:
    pool = BlockPool(8, 4)
    first, keys = filled(pool, 2)
    second, _ = filled(pool, 2)
    assert pool.find(keys) == first
    pool.release(first)
    pool.release(second)
    assert pool.counts() == (5, 2, 0)
    assert pool.find(keys) == first
    assert pool.allocate(2) == second


def test_forgotten_blocks_are_reused_next_and_owned_ones_stay_owned() -> None:
    pool = BlockPool(8, 4)
    blocks, keys = filled(pool, 3)
    pool.release(blocks[1:])
    pool.forget([0, *blocks])
    assert pool.find(keys) == []
    check_integrity(pool, {blocks[0]: 1})
    assert pool.counts() == (6, 0, 1)
    assert pool.allocate(2) == blocks[1:]


def test_reset_keeps_owners_and_ignores_blocks_published_under_old_keys() -> None:
    pool = BlockPool(8, 4)
    blocks, keys = filled(pool, 3)
    pool.release(blocks[:1])
    pool.reset()
    assert pool.generation == 1
    assert pool.find(keys[:1]) == pool.find(keys[1:]) == []
    pool.publish(blocks[1], keys[1])
    pool.publish(blocks[2], pool.chain(keys[1], [9] * 4))  # a sequence that goes on with its old chain
    assert pool.find(keys[1:]) == []
    check_integrity(pool, {blocks[1]: 1, blocks[2]: 1})
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
    check_integrity(pool, {})
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


def test_keys_depend_on_parents_tokens_and_their_order() -> None:
    pool = BlockPool(2, 4)
    root, salted = pool.root(), pool.root("salt")
    keys = [pool.chain(parent, [1, 2, 3, 4]) for parent in (root, salted, pool.chain(root, [1, 2, 3, 4]))]
    keys += [pool.chain(root, tokens) for tokens in ([1, 2, 4, 3], [1, 2, 3, 5], [0x0201, 3, 4, 0], [2**32 - 1] * 4)]
    assert len({root, salted, *keys}) == 2 + len(keys)
    assert pool.chain(root, (1, 2, 3, 4)) == keys[0]
    assert min(map(len, keys)) >= 16 and len({key[:16] for key in keys}) == len(keys), "128 bits that differ"


def test_another_pool_has_other_keys() -> None:
    """Keys cannot be predicted outside of the process, so nobody can construct prompts whose keys collide."""
    here, there = BlockPool(2, 4), BlockPool(2, 4)
    assert here.root("a") != there.root("a")
    parent = here.root("a")
    assert here.chain(parent, [1, 2, 3, 4]) != there.chain(parent, [1, 2, 3, 4])


def test_pools_of_equal_seeds_have_equal_keys() -> None:
    """For routers and stores outside of the process."""
    keys = [
        pool.chain(pool.root("a"), [1, 2, 3, 4], 5)
        for seed in ("x", "x", "y", "\ud800", "")
        for pool in [BlockPool(2, 4, seed=seed)]
    ]
    assert keys[0] == keys[1] and len(set(keys)) == 4


@given(left=EXTRA_LISTS, right=EXTRA_LISTS)
def test_blocks_of_equal_tokens_differ_by_their_extras(
    left: list[bytes | str | int], right: list[bytes | str | int]
) -> None:
    pool = BlockPool(2, 4)
    keys = [pool.chain(pool.root(), [1, 2, 3, 4], *extras) for extras in (left, right)]
    assert (keys[0] == keys[1]) == (left == right)


@pytest.mark.parametrize("tokens", [[], [1, 2, 3], [1, 2, 3, 4, 5], [1, 2, 3, -1], [1, 2, 3, 2**32]])
def test_a_key_needs_a_full_block_of_valid_tokens(tokens: list[int]) -> None:
    pool = BlockPool(2, 4)
    with pytest.raises(RuntimeError, match=f"4 token ids from 0 to .* got {len(tokens)}"):
        pool.chain(pool.root(), tokens)


def test_invalid_keys_are_rejected() -> None:
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
    "query past the end": (lambda pool: pool.shared(7), "block 7"),
    "query a negative id": (lambda pool: pool.shared(-6), "block -6"),
    "allocate a negative number": (lambda pool: pool.allocate(-1), "-1"),
    "a pool with only the null block": (lambda pool: BlockPool(1, 16), "num_blocks is 1"),
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
    check_integrity(pool, {1: 2, 2: 1})


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
    "pool._key_of[0] = pool.root(); pool._block_of[0][pool.root()] = 0",
    "pool._block_of[0][pool.root()] = 2",
    "pool._block_of[0][pool.root()] = 70",
    "del pool._block_of[0][pool._key_of[3]]",
    "pool._block_of[0].clear()",
    "pool.generation += 1; pool._generation_mark = (1).to_bytes(8)",
    "pool._caching = False",
]


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_integrity_check_finds_planted_corruption(corruption: str) -> None:
    pool = busy_pool()
    check_integrity(pool)
    exec(corruption, {"pool": pool})
    with pytest.raises(AssertionError, match="is inconsistent: "):
        check_integrity(pool)


@pytest.mark.parametrize("owners", [{}, {1: 2}, {1: 1, 2: 1}, {1: 2, 2: 2}, {1: 2, 2: 1, 3: 1}, {1: 2, 2: 1, 99: 1}])
def test_integrity_check_finds_wrong_owner_counts(owners: dict[int, int]) -> None:
    pool = busy_pool()
    check_integrity(pool, {0: 5, 1: 2, 2: 1, 3: 0})
    with pytest.raises(AssertionError, match="by the user's count"):
        check_integrity(pool, owners)


def test_misuse_is_found_without_assertions() -> None:
    script = """
from jaxserve.engine.schedule.block_pool import BlockPool
try:
    BlockPool(4, 4).release([1])
except RuntimeError as error:
    print(error)
"""
    ran = subprocess.run([sys.executable, "-O", "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout.startswith("cannot release block 1:")


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
