"""Who owns each block of KV memory.

A block is in exactly one state, and the three counts always add up to the total:

    free    nobody refers to it and its content is worthless
    cached  nobody refers to it, but it holds a full block of tokens that a later request may reuse; evicted in
            order of last use
    held    one or more requests have it in their block table

A block is written only by the request that allocated it, and only while its content has no hash: publishing a hash is
the promise that the block is full and will not change. So a block that is shared has no writer, and a block that is
written is not shared.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

HASH_BYTES = 16


def root_hash(secret: bytes, salt: str) -> bytes:
    """The parent of a first block. The secret keeps clients from finding collisions, the salt keeps tenants apart."""
    return hashlib.blake2b(salt.encode(), key=secret, digest_size=HASH_BYTES).digest()


def block_hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Identity of a full block: its tokens and everything before them."""
    return hashlib.blake2b(parent + array("i", token_ids).tobytes(), digest_size=HASH_BYTES).digest()


class BlockPool:
    """Reference-counted blocks with a prefix cache. All operations are O(1) per block."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._references = [0] * num_blocks
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._by_hash: dict[bytes, int] = {}
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack: recently used memory is warm
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can hand out, evicting cached ones if need be."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_held(self) -> int:
        return self.num_blocks - len(self._free) - len(self._cached)

    def allocate(self, count: int) -> list[int]:
        """Blocks of undefined content, held once each. The caller has checked `num_available`."""
        if count > self.num_available:
            raise RuntimeError(f"{count} blocks asked for, {self.num_available} available")
        blocks = []
        for _ in range(count):
            if self._free:
                block = self._free.pop()
            else:
                block, _ = self._cached.popitem(last=False)
                self._forget(block)
            self._references[block] = 1
            blocks.append(block)
        return blocks

    def lookup(self, digest: bytes) -> int | None:
        """The block that holds this content, if any. Not yet held: see `share`."""
        return self._by_hash.get(digest)

    def share(self, blocks: Iterable[int]) -> None:
        """One more request refers to these published blocks."""
        for block in blocks:
            if self._references[block] == 0:
                del self._cached[block]
            self._references[block] += 1

    def publish(self, block: int, digest: bytes) -> None:
        """Make a full, held block reusable. If the same content is already known elsewhere, the first copy stays."""
        if self._references[block] == 0 or self._hash_of[block] is not None:
            raise RuntimeError(f"block {block} cannot be published")
        if digest not in self._by_hash:
            self._by_hash[digest] = block
            self._hash_of[block] = digest

    def is_published(self, block: int) -> bool:
        return self._hash_of[block] is not None

    def release(self, blocks: Sequence[int]) -> None:
        """One request lets go of its block table. Its last blocks are evicted before its first ones."""
        for block in reversed(blocks):
            count = self._references[block] - 1
            if count < 0:
                raise RuntimeError(f"block {block} released twice")
            self._references[block] = count
            if count == 0:
                if self._hash_of[block] is None:
                    self._free.append(block)
                else:
                    self._cached[block] = None

    def drop_cache(self) -> None:
        """Forget the content of every block that no request holds, and let held ones be forgotten when released."""
        for block in list(self._by_hash.values()):
            self._forget(block)
        self._free.extend(self._cached)
        self._cached.clear()

    def _forget(self, block: int) -> None:
        digest = self._hash_of[block]
        if digest is not None:
            self._hash_of[block] = None
            del self._by_hash[digest]

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Assert the ownership rule against the block tables of all requests. For tests; O(blocks)."""
        held = [0] * self.num_blocks
        for table in tables:
            assert len(set(table)) == len(table), "a block occurs twice in one table"
            for block in table:
                held[block] += 1
        assert held == self._references, "reference counts differ from the block tables"
        free, cached = set(self._free), set(self._cached)
        assert len(free) == len(self._free), "a block is free twice"
        assert not free & cached, "a block is both free and cached"
        for block, count in enumerate(held):
            assert (count > 0) + (block in free) + (block in cached) == 1, f"block {block} is in no or in two states"
            if block in free:
                assert self._hash_of[block] is None
            if block in cached:
                assert self._hash_of[block] is not None
        for digest, block in self._by_hash.items():
            assert self._hash_of[block] == digest
        assert sum(digest is not None for digest in self._hash_of) == len(self._by_hash)
