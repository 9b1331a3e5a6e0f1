"""The block pool against a naive model of it, step by step."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from skyline.engine.kv_blocks import BlockPool, block_hash, root_hash

TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=6)  # one token a block: few of them, so that prefixes meet
ROOT = root_hash(b"secret", "salt")


class Table:
    """The block table of one request, and which content each of its blocks is meant to hold."""

    def __init__(self, tokens: list[int]) -> None:
        self.digests: list[bytes] = []
        for token in tokens:
            self.digests.append(block_hash(self.digests[-1] if self.digests else ROOT, [token]))
        self.blocks: list[int] = []
        self.done = 0  # blocks that are full and published, or found published


class PoolMachine(RuleBasedStateMachine):
    """Requests come, share, grow, publish, are preempted, finish. `lru`, `free` and `hashed` are the naive model."""

    @initialize(num_blocks=st.integers(1, 12))
    def start(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks)
        self.free = set(range(num_blocks))
        self.lru: list[int] = []
        self.hashed: dict[int, bytes] = {}  # block -> hash it was published under
        self.content: dict[int, bytes | None] = dict.fromkeys(range(num_blocks))  # what is really in memory
        self.tables: list[Table] = []

    # --- what a scheduler does, each beside the model --------------------------------------------------------------

    def take(self, count: int) -> list[int]:
        """Allocate, and check that cached blocks are evicted only for want of free ones, least recently used first."""
        from_free = min(count, len(self.free))
        evicted = self.lru[: count - from_free]
        blocks = self.pool.allocate(count)
        assert set(blocks[:from_free]) <= self.free
        assert blocks[from_free:] == evicted
        self.free -= set(blocks)
        del self.lru[: len(evicted)]
        for block in blocks:
            self.hashed.pop(block, None)
            self.content[block] = None
        return blocks

    def drop(self, blocks: list[int]) -> None:
        self.pool.release(blocks)
        held = self.references()
        for block in reversed(blocks):
            if held[block] == 0:
                if block in self.hashed:
                    self.lru.append(block)
                else:
                    self.free.add(block)

    def references(self) -> Counter[int]:
        return Counter(block for table in self.tables for block in table.blocks)

    def admit(self, table: Table, want: int) -> bool:
        """Share the longest known prefix and allocate the rest of the first `want` blocks, if there is room."""
        hits = []
        for digest in table.digests[:want]:
            block = self.pool.lookup(digest)
            if block is None:
                break
            hits.append(block)
        self.pool.share(hits)
        self.lru = [block for block in self.lru if block not in hits]
        if want - len(hits) > self.pool.num_available:
            self.drop(hits)
            return False
        table.blocks = hits + self.take(want - len(hits))
        table.done = len(hits)
        return True

    @rule(tokens=TOKENS, portion=st.integers(1, 6))
    def arrive(self, tokens: list[int], portion: int) -> None:
        table = Table(tokens)
        if self.admit(table, min(portion, len(tokens))):
            self.tables.append(table)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def grow(self, data: st.DataObject) -> None:
        """A running request gets one more block, or is told that there is none."""
        table = data.draw(st.sampled_from(self.tables))
        if len(table.blocks) < len(table.digests):
            if self.pool.num_available:
                table.blocks += self.take(1)
            else:
                with pytest.raises(RuntimeError, match="available"):
                    self.pool.allocate(1)

    @precondition(lambda self: any(table.done < len(table.blocks) for table in self.tables))
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        """A request fills its next block and publishes it; a second copy of known content stays private."""
        table = data.draw(st.sampled_from([table for table in self.tables if table.done < len(table.blocks)]))
        block, digest = table.blocks[table.done], table.digests[table.done]
        assert self.references()[block] == 1, "a block that is being written is shared"
        assert block not in self.hashed, "a published block is written"
        self.content[block] = digest
        known = digest in self.hashed.values()
        self.pool.publish(block, digest)
        if not known:
            self.hashed[block] = digest
        table.done += 1

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def finish_or_abort(self, data: st.DataObject) -> None:
        """Whatever state a request is in, it lets go of its whole table."""
        table = data.draw(st.sampled_from(self.tables))
        self.tables.remove(table)
        self.drop(table.blocks)

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), portion=st.integers(1, 6))
    def preempt(self, data: st.DataObject, portion: int) -> None:
        """A request gives everything up and comes back later, often to find its own blocks still cached."""
        table = data.draw(st.sampled_from(self.tables))
        self.tables.remove(table)
        self.drop(table.blocks)
        table.blocks, table.done = [], 0
        if self.admit(table, min(portion, len(table.digests))):
            self.tables.append(table)

    @rule()
    def drop_cache(self) -> None:
        self.pool.drop_cache()
        self.hashed.clear()
        self.free |= set(self.lru)
        self.lru.clear()

    # --- misuse: refused, and nothing changes (the invariants run afterwards) ----------------------------------------

    @rule(extra=st.integers(1, 3))
    def allocate_too_many(self, extra: int) -> None:
        with pytest.raises(RuntimeError, match="available"):
            self.pool.allocate(self.pool.num_available + extra)

    @precondition(lambda self: self.free or self.lru)
    @rule(data=st.data())
    def misuse_of_an_unheld_block(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(sorted(self.free) + self.lru))
        with pytest.raises(RuntimeError, match="twice"):
            self.pool.release([block])
        with pytest.raises(RuntimeError, match="published"):
            self.pool.publish(block, b"new")

    @precondition(lambda self: self.hashed)
    @rule(data=st.data())
    def publish_again(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(sorted(self.hashed)))
        with pytest.raises(RuntimeError, match="published"):
            self.pool.publish(block, b"new")

    # --- after every rule --------------------------------------------------------------------------------------------

    @invariant()
    def every_block_has_one_owner(self) -> None:
        pool, held = self.pool, self.references()
        pool.check([table.blocks for table in self.tables])
        assert (pool.num_held, pool.num_cached) == (len(held), len(self.lru))
        assert pool.num_available == len(self.free) + len(self.lru) == pool.num_blocks - len(held)
        writers = Counter(block for table in self.tables for block in table.blocks[table.done :])
        assert all(count == 1 and held[block] == 1 for block, count in writers.items()), "a block has two writers"

    @invariant()
    def what_a_hash_promises_is_there(self) -> None:
        for block, digest in self.hashed.items():
            assert self.pool.lookup(digest) == block
            assert self.content[block] == digest
        for table in self.tables:
            for block, digest in zip(table.blocks[: table.done], table.digests, strict=False):
                assert self.content[block] == digest, "the content of a finished block has changed under its reader"
            for digest in table.digests:
                assert (self.pool.lookup(digest) is not None) == (digest in self.hashed.values())

    def teardown(self) -> None:
        if hasattr(self, "pool"):
            for table in self.tables:
                self.pool.release(table.blocks)
            self.pool.check([])
            assert self.pool.num_held == 0


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestPoolMachine = PoolMachine.TestCase


def test_evicts_the_end_of_a_prefix_before_its_beginning() -> None:
    """Evicting a first block first would make every block behind it unreachable."""
    pool = BlockPool(3)
    blocks = pool.allocate(3)
    for index, block in enumerate(blocks):
        pool.publish(block, bytes([index]))
    pool.release(blocks)
    assert pool.allocate(2) == [blocks[2], blocks[1]]
    assert pool.lookup(b"\0") == blocks[0]


def test_a_reused_block_moves_to_the_end_of_the_eviction_order() -> None:
    """Without this a hot system prompt would be evicted as often as a cold one."""
    pool = BlockPool(2)
    hot, cold = pool.allocate(2)
    pool.publish(hot, b"hot")
    pool.publish(cold, b"cold")
    pool.release([hot])
    pool.release([cold])
    pool.share([hot])
    pool.release([hot])
    assert pool.allocate(1) == [cold]


def test_drop_cache_forgets_held_blocks_when_they_are_released() -> None:
    """A request that runs across a reset must not bring old content back into the cache."""
    pool = BlockPool(1)
    [block] = pool.allocate(1)
    pool.publish(block, b"content")
    pool.drop_cache()
    pool.release([block])
    assert pool.lookup(b"content") is None
    assert (pool.num_cached, pool.num_held) == (0, 0)


@pytest.mark.parametrize("tokens", [[1, 2], [2, 1], [1], [1, 2, 3]])
def test_block_hashes_depend_on_tokens_parent_salt_and_secret(tokens: list[int]) -> None:
    """Two different histories under one hash would hand one client's context to another."""
    roots = {root_hash(secret, salt) for secret in (b"a", b"b") for salt in ("", "x")}
    assert len(roots) == 4
    hashes = {block_hash(root, other) for root in roots for other in (tokens, [*tokens, 0], [257])}
    assert len(hashes) == 12
    assert block_hash(ROOT, tokens) == block_hash(ROOT, tuple(tokens))
