# SPDX-License-Identifier: Apache-2.0
"""Checks that the state of a block pool is consistent, also with the owner counts of its user."""

from collections import Counter
from collections.abc import Iterator, Mapping

from jaxserve.engine.schedule.block_pool import NULL_BLOCK, BlockPool

_GENERATION_BYTES = 8  # at the end of a key


def check_integrity(pool: BlockPool, owners: Mapping[int, int] | None = None) -> None:
    """Raise an AssertionError that lists the faults. `owners`: the user's owner counts by block."""
    faults = [*_state_faults(pool), *_key_faults(pool)]
    if owners is not None and not faults:
        here = {block: count for block, count in enumerate(pool._owners) if count}
        claimed = {block: count for block, count in owners.items() if block != NULL_BLOCK}
        faults += [
            f"block {block} has owners: {here.get(block, 0)}, by the user's count {claimed.get(block, 0)}"
            for block in sorted(here.keys() | claimed.keys())
            if here.get(block, 0) != claimed.get(block, 0)
        ]
    if faults:
        raise AssertionError(f"the block pool is inconsistent: {'; '.join(faults[:8])}")


def _state_faults(pool: BlockPool) -> Iterator[str]:
    """Check that every block except the null block is in exactly one state."""
    if not len(pool._owners) == len(pool._key_of) == pool.num_blocks:
        yield f"{pool.num_blocks} blocks, {len(pool._owners)} owner counts, {len(pool._key_of)} keys"
        return
    free = Counter(pool._free)
    for block in [*free, *pool._cached]:
        if not 0 < block < pool.num_blocks:
            yield f"block {block} waits for reuse and {pool._state(block)}"
    if pool._owners[NULL_BLOCK]:
        yield f"the null block has owners: {pool._owners[NULL_BLOCK]}"
    for block in range(1, pool.num_blocks):
        places = free.get(block, 0) + (block in pool._cached) + (pool._owners[block] != 0)
        if places != 1 or pool._owners[block] < 0:
            yield f"block {block} is in {places} of the states free, cached, used with {pool._owners[block]} owners"
        elif block in pool._cached and pool._key_of[block] is None:
            yield f"block {block} is cached without a key"
        elif free.get(block, 0) and pool._key_of[block] is not None:
            yield f"block {block} is free with a key"


def _key_faults(pool: BlockPool) -> Iterator[str]:
    """Check that keys and blocks map one to one, and that all keys are of this generation."""
    for group, blocks in enumerate(pool._block_of):
        for key, block in blocks.items():
            known = 0 < block < len(pool._key_of)
            if not (known and pool._key_of[block] == key and pool._group_of[block] == group):
                yield f"key {key.hex()} of group {group} leads to block {block}, which does not have it"
            if key[-_GENERATION_BYTES:] != pool._generation_mark:
                yield f"key {key.hex()} of block {block} is not of generation {pool.generation}"
        if blocks and not pool._caching:
            yield f"{len(blocks)} keys without caching"
    for block, key in enumerate(pool._key_of):
        if key is not None and pool._block_of[pool._group_of[block]].get(key) != block:
            yield f"block {block} has key {key.hex()}, which does not lead to it"
