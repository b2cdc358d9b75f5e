# SPDX-License-Identifier: Apache-2.0
"""Owns the bookkeeping of KV blocks: who holds which, which are cached under which key, which is reused next.

It deals in block ids and keys. It knows nothing of requests, of devices, or of what lies in a block. A block is

    free    nobody owns it and it has no key; a stack, so that the last one freed is the first one reused
    cached  nobody owns it but it has a key: `share` revives it, and `allocate` takes it once no free one is left,
            the least recently used first
    used    it has owners, and a key or not

Block 0 is the null block, in none of these states. A key stands for a block's tokens and for all before them: `root`
says what a chain starts from, `chain` adds one full block. Keys are of one process and of one generation: `reset`
starts the next, and what is published under a key of an earlier one is never found, so that a sequence that ran across
a change of weights cannot leave blocks behind that are part old, part new.

Misuse is a RuntimeError naming the block and its state: a bug of the caller. A call that raises has changed nothing.
"""

import os
import struct
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b

NULL_BLOCK = 0

_DIGEST_BYTES = 16
_GENERATION_BYTES = 8
_KEY_BYTES = _DIGEST_BYTES + _GENERATION_BYTES  # a key ends with the generation of its root


class BlockPool:
    """All blocks but the null block start free. Every operation takes constant time per block or key."""

    def __init__(self, num_blocks: int, block_size: int, *, caching: bool = True) -> None:
        if num_blocks < 2 or block_size < 1:
            problem = f"num_blocks is {num_blocks}, block_size {block_size}"
            raise RuntimeError(f"{problem}: needs at least 2 blocks, of which block 0 is the null block, of 1 token")
        self.num_blocks = num_blocks
        self.generation = 0
        self._caching = caching
        self._owners = [0] * num_blocks
        self._key_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._free = list(range(num_blocks - 1, NULL_BLOCK, -1))  # the next one to be reused is last
        self._cached: OrderedDict[int, None] = OrderedDict()  # the next one to be evicted is first
        self._generation_mark = self.generation.to_bytes(_GENERATION_BYTES)
        self._secret = os.urandom(32)
        # Copying a hash that has the secret in it is 0.4 us quicker than making one with keywords.
        self._chain_hash = blake2b(digest_size=_DIGEST_BYTES, key=self._secret, person=b"chain")
        self._tokens = struct.Struct(f"<{block_size}I")

    # --- who owns which block ---------------------------------------------------------------------------------------

    @property
    def available(self) -> int:
        """How many blocks `allocate` could hand out now: the free and the cached ones."""
        return len(self._free) + len(self._cached)

    def allocate(self, count: int) -> list[int] | None:
        """`count` blocks with one owner each and no key, or None where not as many are available.

        It may evict what `find` has just found: share that first.
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
        """One more owner for each. Cached blocks come back into use; free ones have nothing to share."""
        owners = self._owners
        for block in blocks:
            if not (0 < block < self.num_blocks and (owners[block] or self._key_of[block] is not None)):
                raise self._misuse("share", block)
        for block in blocks:
            if not owners[block]:
                del self._cached[block]
            owners[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """One owner less for each; null blocks are skipped.

        Goes from the last to the first, so that a sequence loses its tail to eviction before its head, without which
        the tail could not be found.
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

    def shared(self, block: int) -> bool:
        """Whether it has more than one owner: whoever wants to write into it needs a copy."""
        if not 0 <= block < self.num_blocks:
            raise self._misuse("look up", block)
        return self._owners[block] > 1

    # --- which block is cached under which key ----------------------------------------------------------------------

    def root(self, *extras: bytes | str | int) -> bytes:
        """The key that a chain starts from. Chains from different extras (adapter, salt, ...) have no key in common."""
        hashed = blake2b(digest_size=_DIGEST_BYTES, key=self._secret, person=b"root")
        for extra in extras:
            if isinstance(extra, str):
                # A salt from JSON may hold half of a surrogate pair, which plain utf-8 refuses.
                kind, body = b"s", extra.encode("utf-8", "surrogatepass")
            elif isinstance(extra, int):
                kind, body = b"i", hex(extra).encode()
            else:
                kind, body = b"b", bytes(memoryview(extra))
            hashed.update(kind + struct.pack("<Q", len(body)) + body)
        return hashed.digest() + self._generation_mark

    def chain(self, parent: bytes, tokens: Sequence[int]) -> bytes:
        """The key of the full block with these tokens that follows `parent`, a root or the block before it."""
        if len(parent) != _KEY_BYTES:
            raise RuntimeError(f"the parent of a chain has {len(parent)} bytes, a key has {_KEY_BYTES}")
        try:
            packed = self._tokens.pack(*tokens)
        except struct.error as error:  # also for placeholders of tokens that are not known yet: they are negative
            problem = f"a key takes {self._tokens.size // 4} token ids from 0 to 2**32 - 1, got {len(tokens)}"
            raise RuntimeError(f"{problem}, from {min(tokens, default=0)} to {max(tokens, default=0)}") from error
        hashed = self._chain_hash.copy()
        hashed.update(parent + packed)
        return hashed.digest() + parent[_DIGEST_BYTES:]

    def publish(self, block: int, key: bytes) -> None:
        """Say that an owned block holds what the key says, or will before, in device order, anyone reads it.

        Nothing happens where another block has the key, or where the key is of an earlier generation.
        """
        if not self._caching:
            return
        if not (0 < block < self.num_blocks and self._owners[block]):
            raise self._misuse("publish", block)
        if len(key) != _KEY_BYTES:
            raise RuntimeError(f"block {block} is published under {len(key)} bytes, a key has {_KEY_BYTES}")
        if key[_DIGEST_BYTES:] != self._generation_mark:
            return
        if self._key_of[block] not in (None, key):
            raise RuntimeError(f"cannot publish block {block}: it is cached under another key, so its content is fixed")
        if self._block_of.setdefault(key, block) == block:
            self._key_of[block] = key

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """The blocks of the longest run of cached keys, from the first; they get no owner by that.

        Takes keys one by one and stops at the first miss, so that a generator computes none in vain.
        """
        found: list[int] = []
        if not self._caching:
            return found
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def forget(self, blocks: Sequence[int]) -> None:
        """Their content is not to be trusted: they lose their keys, cached ones become free. Skips null blocks."""
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
        """Start the next generation: all keys are dropped, cached blocks become free. Owned blocks stay owned."""
        self.generation += 1
        self._generation_mark = self.generation.to_bytes(_GENERATION_BYTES)
        self._free[:0] = reversed(self._cached)  # who is reused before whom stays as it was
        self._cached.clear()
        self._block_of.clear()
        self._key_of = [None] * self.num_blocks

    def _drop_key(self, block: int) -> None:
        key = self._key_of[block]
        if key is not None:
            del self._block_of[key]
            self._key_of[block] = None

    # --- what can be asked and checked ------------------------------------------------------------------------------

    def counts(self) -> tuple[int, int, int]:
        """How many blocks are free, cached, used."""
        return len(self._free), len(self._cached), self.num_blocks - 1 - self.available

    def check_integrity(self, owners: Mapping[int, int] | None = None) -> None:
        """RuntimeError unless all that is kept agrees, also with how many owners the caller counts, by block."""
        faults = [*self._state_faults(), *self._key_faults()]
        if owners is not None and not faults:
            here = {block: count for block, count in enumerate(self._owners) if count}
            claimed = {block: count for block, count in owners.items() if block != NULL_BLOCK}
            faults += [
                f"block {block} has owners: {here.get(block, 0)}, by the caller's count {claimed.get(block, 0)}"
                for block in sorted(here.keys() | claimed.keys())
                if here.get(block, 0) != claimed.get(block, 0)
            ]
        if faults:
            more = f"; and {len(faults) - 8} more" if len(faults) > 8 else ""
            raise RuntimeError(f"the block pool contradicts itself: {'; '.join(faults[:8])}{more}")

    def _state_faults(self) -> Iterator[str]:
        """Every block but the null block is free, cached or used, and only one of them."""
        if not len(self._owners) == len(self._key_of) == self.num_blocks:
            yield f"{self.num_blocks} blocks, {len(self._owners)} owner counts, {len(self._key_of)} keys"
            return
        free = Counter(self._free)
        for block in [*free, *self._cached]:
            if not 0 < block < self.num_blocks:
                yield f"block {block} waits for reuse and {self._state(block)}"
        if self._owners[NULL_BLOCK]:
            yield f"the null block has owners: {self._owners[NULL_BLOCK]}"
        for block in range(1, self.num_blocks):
            places = free.get(block, 0) + (block in self._cached) + (self._owners[block] != 0)
            if places != 1 or self._owners[block] < 0:
                yield f"block {block} is in {places} of the states free, cached, used with {self._owners[block]} owners"
            elif block in self._cached and self._key_of[block] is None:
                yield f"block {block} is cached without a key"
            elif free.get(block, 0) and self._key_of[block] is not None:
                yield f"block {block} is free with a key"

    def _key_faults(self) -> Iterator[str]:
        """Keys and blocks map to each other one to one, and all keys are of this generation."""
        for key, block in self._block_of.items():
            if not (0 < block < len(self._key_of) and self._key_of[block] == key):
                yield f"key {key.hex()} leads to block {block}, which does not have it"
            if key[_DIGEST_BYTES:] != self._generation_mark:
                yield f"key {key.hex()} of block {block} is not of generation {self.generation}"
        for block, key in enumerate(self._key_of):
            if key is not None and self._block_of.get(key) != block:
                yield f"block {block} has key {key.hex()}, which does not lead to it"
        if self._block_of and not self._caching:
            yield f"{len(self._block_of)} keys without caching"

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
