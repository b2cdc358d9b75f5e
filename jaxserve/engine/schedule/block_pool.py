# SPDX-License-Identifier: Apache-2.0
"""Owns the bookkeeping of KV blocks: reference counts, the prefix cache's keys, and the order of reuse.

It handles only block ids and keys, not requests, devices or block contents. A block is

    free    no owner and no key; a stack, so that the last one freed is the first one reused
    cached  no owner but a key: `share` revives it, and `allocate` evicts it when no free block is left, the least
            recently used first
    used    has owners, with or without a key

Block 0 is the null block, in none of these states. A key identifies a block's tokens and all tokens before them: `root`
starts a chain, `chain` adds one full block; each cache group has its own block for a key. Keys belong to one process
and one generation: `reset` starts the next, and blocks published under a key of an earlier generation are never found.
So a sequence that ran across a weight update cannot leave blocks that mix old and new weights.

Misuse, a bug in the caller, raises a RuntimeError that names the block and its state. A call that raises changes
nothing.
"""

import os
import struct
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

NULL_BLOCK = 0

_DIGEST_BYTES = 16
_GENERATION_BYTES = 8
_KEY_BYTES = _DIGEST_BYTES + _GENERATION_BYTES  # a key ends with the generation of its root


class BlockPool:
    """All blocks except the null block start free. Every operation takes constant time per block or key."""

    def __init__(
        self, num_blocks: int, block_size: int, *, caching: bool = True, seed: str = "", groups: int = 1
    ) -> None:
        """`seed`: pools of equal seeds give equal chains equal keys, in any process; without one, keys are secret."""
        if num_blocks < 2 or block_size < 1:
            problem = f"num_blocks is {num_blocks}, block_size {block_size}"
            raise RuntimeError(f"{problem}: needs at least 2 blocks, of which block 0 is the null block, of 1 token")
        self.num_blocks = num_blocks
        self.generation = 0
        self._caching = caching
        self._owners = [0] * num_blocks
        self._key_of: list[bytes | None] = [None] * num_blocks
        self._group_of = [0] * num_blocks  # of blocks with a key
        self._block_of: tuple[dict[bytes, int], ...] = tuple({} for _ in range(groups))
        self._free = list(range(num_blocks - 1, NULL_BLOCK, -1))  # the last item is reused next
        self._cached: OrderedDict[int, None] = OrderedDict()  # the first item is evicted next
        self._generation_mark = self.generation.to_bytes(_GENERATION_BYTES)
        self._secret = (
            blake2b(seed.encode("utf-8", "surrogatepass"), digest_size=32).digest() if seed else os.urandom(32)
        )
        # Copying a keyed hash is 0.4 us faster than creating one.
        self._chain_hash = blake2b(digest_size=_DIGEST_BYTES, key=self._secret, person=b"chain")
        self._tokens = struct.Struct(f"<{block_size}I")

    # --- ownership --------------------------------------------------------------------------------------------------

    @property
    def available(self) -> int:
        """The number of blocks that `allocate` could return now: free and cached."""
        return len(self._free) + len(self._cached)

    def allocate(self, count: int) -> list[int] | None:
        """Allocate `count` blocks with one owner each and no key; None if fewer are available.

        It may evict blocks that `find` has just returned: share those first.
        """
        if count < 0:
            raise RuntimeError(f"cannot allocate {count} blocks")
        if count > self.available:
            return None
        free = self._free
        taken = free[: -count - 1 : -1]
        del free[len(free) - len(taken) :]
        while len(taken) < count:
            block, _ = self._cached.popitem(last=False)
            self._drop_key(block)
            taken.append(block)
        for block in taken:
            self._owners[block] = 1
        return taken

    def share(self, blocks: Sequence[int]) -> None:
        """Add an owner to each. Cached blocks become used; free ones cannot be shared."""
        owners = self._owners
        for block in blocks:
            if not (0 < block < self.num_blocks and (owners[block] or self._key_of[block] is not None)):
                raise self._misuse("share", block)
        for block in blocks:
            if not owners[block]:
                del self._cached[block]
            owners[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Remove an owner from each; null blocks are skipped.

        Goes from last to first, so that a sequence's tail is evicted before its head, without which the tail could not
        be found.
        """
        owners, known = self._owners, self.num_blocks
        held = [block for block in reversed(blocks) if block != NULL_BLOCK]
        unowned: list[int] = []
        for done, block in enumerate(held):
            if not (0 < block < known and owners[block]):
                for other in held[:done]:
                    owners[other] += 1
                raise self._misuse("release", block)
            owners[block] -= 1
            if not owners[block]:
                unowned.append(block)
        for block in unowned:
            if self._key_of[block] is None:
                self._free.append(block)
            else:
                self._cached[block] = None

    def unowned(self, blocks: Sequence[int]) -> int:
        """How many of these have no owner."""
        return sum(not self._owners[block] for block in blocks)

    def shared(self, block: int) -> bool:
        """Whether the block has more than one owner, so that a writer must copy it first."""
        if not 0 <= block < self.num_blocks:
            raise self._misuse("look up", block)
        return self._owners[block] > 1

    # --- prefix cache -----------------------------------------------------------------------------------------------

    def root(self, *extras: bytes | str | int) -> bytes:
        """The start of a key chain. Chains with different extras (adapter, salt, ...) share no keys."""
        hashed = blake2b(digest_size=_DIGEST_BYTES, key=self._secret, person=b"root")
        hashed.update(_packed(extras))
        return hashed.digest() + self._generation_mark

    def chain(self, parent: bytes, tokens: Sequence[int], *extras: bytes | str | int) -> bytes:
        """The key of a full block with these tokens after `parent`, a root or the previous block's key. `extras`: what
        else its content depends on, such as an image that some of the tokens stand for."""
        if len(parent) != _KEY_BYTES:
            raise RuntimeError(f"the parent of a chain has {len(parent)} bytes, a key has {_KEY_BYTES}")
        try:
            packed = self._tokens.pack(*tokens)
        except struct.error as error:  # also raised for placeholders of unknown tokens, which are negative
            problem = f"a key takes {self._tokens.size // 4} token ids from 0 to 2**32 - 1, got {len(tokens)}"
            raise RuntimeError(f"{problem}, from {min(tokens, default=0)} to {max(tokens, default=0)}") from error
        hashed = self._chain_hash.copy()
        hashed.update(parent + packed + _packed(extras) if extras else parent + packed)
        return hashed.digest() + parent[_DIGEST_BYTES:]

    def publish(self, block: int, key: bytes, group: int = 0) -> None:
        """Cache an owned block of this group under the key of its content, which is written, in device order, before
        any later read.

        No-op if another block has the key, or if the key is of an earlier generation.
        """
        if not self._caching:
            return
        if not (0 < block < self.num_blocks and self._owners[block]):
            raise self._misuse("publish", block)
        if len(key) != _KEY_BYTES:
            raise RuntimeError(f"block {block} is published under {len(key)} bytes, a key has {_KEY_BYTES}")
        if key[_DIGEST_BYTES:] != self._generation_mark:
            return
        had = self._key_of[block]
        if had is not None and (had != key or self._group_of[block] != group):
            raise RuntimeError(f"cannot publish block {block}: it is cached under another key, so its content is fixed")
        if self._block_of[group].setdefault(key, block) == block:
            self._key_of[block], self._group_of[block] = key, group

    def find(self, keys: Iterable[bytes], group: int = 0) -> list[int]:
        """The blocks of the longest prefix of `keys` that is cached in this group. Does not add owners.

        Stops at the first miss, so that a generator computes no unneeded keys.
        """
        found: list[int] = []
        if not self._caching:
            return found
        blocks = self._block_of[group]
        for key in keys:
            block = blocks.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def cached(self, key: bytes, group: int = 0) -> int | None:
        """The block of this group that is cached under the key."""
        return self._block_of[group].get(key)

    def last_cached(self, keys: Sequence[bytes], count: int, group: int) -> int:
        """Of the first `count` keys, how many there are up to the last that is cached in this group."""
        blocks = self._block_of[group]
        while count and keys[count - 1] not in blocks:
            count -= 1
        return count

    def forget(self, blocks: Sequence[int]) -> None:
        """Drop the keys of blocks whose content is invalid; cached ones become free. Skips null blocks."""
        for block in blocks:
            if not 0 <= block < self.num_blocks:
                raise self._misuse("forget", block)
        for block in reversed(blocks):
            if self._key_of[block] is not None:
                self._drop_key(block)
                if not self._owners[block]:
                    del self._cached[block]
                    self._free.append(block)

    def reset(self) -> None:
        """Start the next generation: drop all keys, free all cached blocks. Owned blocks stay owned."""
        self.generation += 1
        self._generation_mark = self.generation.to_bytes(_GENERATION_BYTES)
        self._free[:0] = reversed(self._cached)  # keeps the order of reuse
        self._cached.clear()
        for blocks in self._block_of:
            blocks.clear()
        self._key_of = [None] * self.num_blocks

    def _drop_key(self, block: int) -> None:
        key = self._key_of[block]
        if key is not None:
            del self._block_of[self._group_of[block]][key]
            self._key_of[block] = None

    # --- inspection -------------------------------------------------------------------------------------------------

    def counts(self) -> tuple[int, int, int]:
        """The numbers of free, cached and used blocks."""
        return len(self._free), len(self._cached), self.num_blocks - 1 - self.available

    def _misuse(self, verb: str, block: int) -> RuntimeError:
        return RuntimeError(f"cannot {verb} block {block}: it {self._state(block)}")

    def _state(self, block: int) -> str:
        if not 0 <= block < self.num_blocks:
            return f"is not one of the blocks 0 to {self.num_blocks - 1}"
        if block == NULL_BLOCK:
            return "is the null block"
        if self._owners[block]:
            return f"has owners: {self._owners[block]}"
        return "is free" if self._key_of[block] is None else "is cached and has no owner"


def _packed(extras: Iterable[bytes | str | int]) -> bytes:
    """Different extras give different bytes."""
    parts: list[bytes] = []
    for extra in extras:
        if isinstance(extra, str):
            # A salt from JSON may contain a lone surrogate, which strict UTF-8 rejects.
            kind, body = b"s", extra.encode("utf-8", "surrogatepass")
        elif isinstance(extra, int):
            kind, body = b"i", hex(extra).encode()
        else:
            kind, body = b"b", bytes(memoryview(extra))
        parts.append(kind + struct.pack("<Q", len(body)) + body)
    return b"".join(parts)
