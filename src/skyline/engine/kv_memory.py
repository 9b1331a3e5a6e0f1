"""All memory that a model has of its requests: a pool of blocks for each group of layers, and one set of rules.

Layers that keep the same tokens for the same time form a group and share block tables:

    full     every token is kept to the end
    window   tokens that no later query can see are let go; their places in the table stay, and are never read again
    state    a block is the whole state of a recurrent layer, not a piece of context; a request has one

A prefix is in the cache if every group has what a request would need to go on from there: a full group all of its
blocks, a window group the last of them, a state group the state at exactly that length. A state is kept by leaving it
where it is: the step that begins there reads it, and writes to another block. So here as elsewhere a block that is
shared has no writer.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from skyline.engine.kv_blocks import BlockPool, block_hash, root_hash
from skyline.engine.request import Request

NONE = -1  # in a table, where nothing is kept any more
NEVER = 1 << 62
# Blocks of tokens between the states that are kept while generating: a state can be as large as thousands of tokens.
STATE_INTERVAL = 16


@dataclass(frozen=True, slots=True)
class KVGroup:
    """window: how many tokens back a query looks, itself included; None is all of them. state: of recurrent layers."""

    num_blocks: int
    window: int | None = None
    state: bool = False


@dataclass(slots=True)
class Holding:
    """What one request has of the memory. Lists are by paged group."""

    tables: list[list[int]]
    published: list[int]  # blocks of each table that are in the prefix cache's hands
    dropped: list[int]  # blocks of each table, from its beginning, that are NONE
    state: int = NONE  # the block that has its state after all planned steps
    # States that a planned step reads and none writes any more: their length in tokens, and block.
    sealed: list[tuple[int, int]] = field(default_factory=list)
    seal_at: int = 0  # the length, within what was known at admission, whose state is to be kept
    # Most steps change nothing: for how many tokens there is room, and at which length there is something to confirm.
    room: int = 0
    due: int = 0


class KVMemory:
    def __init__(
        self, groups: tuple[KVGroup, ...], block_size: int, prefix_caching: bool, secret: bytes | None = None
    ) -> None:
        """At most one group is of states, and it is the last."""
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self.pools = [BlockPool(group.num_blocks) for group in groups]
        has_state = bool(groups) and groups[-1].state
        assert not any(group.state for group in groups[:-1])
        self._states = self.pools[-1] if has_state else None
        self._paged = list(zip(self.pools, (group.window for group in groups), strict=True))[: len(groups) - has_state]
        self._secret = os.urandom(32) if secret is None else secret

    @property
    def available(self) -> tuple[int, ...]:
        return tuple(pool.num_available for pool in self.pools)

    def cached_prefix(self, request: Request) -> int:
        """Blocks of the longest known prefix that every group can go on from, leaving at least one token to compute."""
        if not self.prefix_caching:
            return 0
        count = (len(request.tokens) - 1) // self.block_size
        for pool, window in self._paged:
            if window is None:
                known = 0
                while known < count and pool.lookup(self._hash(request, known)) is not None:
                    known += 1
                count = known
        while count > 0:
            shorter = self._missing(request, count)
            if shorter is None:
                return count
            count = shorter
        return 0

    def _missing(self, request: Request, count: int) -> int | None:
        """None if windows and states are there after `count` blocks; else how many to try next."""
        for pool, window in self._paged:
            if window is None:
                continue
            for index in range(count - 1, self._first_seen(count * self.block_size, window) - 1, -1):
                if pool.lookup(self._hash(request, index)) is None:
                    return index
        if self._states is not None and self._states.lookup(self._hash(request, count - 1)) is None:
            return count - 1
        return None

    def start(self, request: Request, cached: int, end: int, at_once: tuple[int, ...]) -> bool:
        """Give a request its `cached` blocks of prefix and room up to token `end`; False, and nothing, if none is left.

        There must be room for all of its known tokens, as far as they are kept at one time: at_once is how many blocks
        of each paged group that can be, the cached ones among them.
        """
        holding = Holding([], [], [])
        for pool, window in self._paged:
            first = 0 if window is None else self._first_seen(cached * self.block_size, window)
            hits = [pool.lookup(self._hash(request, index)) for index in range(first, cached)]
            found = [block for block in hits if block is not None]
            assert len(found) == len(hits)
            pool.share(found)
            holding.tables.append([NONE] * first + found)
            holding.published.append(cached)
            holding.dropped.append(first)
        if self._states is not None and cached:
            state = self._states.lookup(self._hash(request, cached - 1))
            assert state is not None
            self._states.share([state])
            holding.sealed.append((cached * self.block_size, state))
        request.holding = holding
        known = -(-len(request.tokens) // self.block_size)
        short = any(
            min(known - cached, most - len(table) + first) > pool.num_available
            for most, table, first, (pool, _) in zip(at_once, holding.tables, holding.dropped, self._paged, strict=True)
        )
        if short or (self._states is not None and self._states.num_available == 0):
            self.release(request)
            return False
        if self._states is not None:
            (holding.state,) = self._states.allocate(1)
            if self.prefix_caching:
                holding.seal_at = (len(request.tokens) - 1) // self.block_size * self.block_size
        grown = self.grow(request, end)
        assert grown is not None
        return True

    def grow(self, request: Request, end: int) -> list[tuple[int, list[int]]] | None:
        """Room up to token `end`: the new blocks by paged group; None, and nothing, if there is none.

        Not needed while `end` is within `room`.
        """
        holding = request.holding
        missing = [-(-end // self.block_size) - len(table) for table in holding.tables]
        if any(count > pool.num_available for count, (pool, _) in zip(missing, self._paged, strict=True)):
            return None
        grown = []
        for index, count in enumerate(missing):
            if count > 0:
                blocks = self._paged[index][0].allocate(count)
                holding.tables[index] += blocks
                grown.append((index, blocks))
        holding.room = -(-end // self.block_size) * self.block_size
        return grown

    def whole_chunk(self, request: Request, count: int) -> int:
        """How many of `count` tokens to compute at once: up to where the state is to be kept."""
        left = request.holding.seal_at - request.num_computed
        return left if 0 < left < count else count

    def advance_state(self, request: Request, start: int) -> tuple[int, int]:
        """The blocks that a step from token `start` on reads the state from (NONE: it begins), and writes it to."""
        holding, states = request.holding, self._states
        assert states is not None
        if start == 0:
            return NONE, holding.state
        if holding.sealed and holding.sealed[-1][0] == start:  # found in the prefix cache
            return holding.sealed[-1][1], holding.state
        interval = self.block_size * STATE_INTERVAL
        wanted = self.prefix_caching and (start == holding.seal_at or start % interval == 0)
        if not wanted or states.num_available == 0:
            return holding.state, holding.state
        holding.sealed.append((start, holding.state))
        holding.due = 0
        (holding.state,) = states.allocate(1)
        return holding.sealed[-1][1], holding.state

    def confirm(self, request: Request, start: int, end: int) -> None:
        """A step has computed tokens start to end: publish what is complete, and let go of what nobody will see.

        Not needed while `end` is below `due`.
        """
        holding = request.holding
        for index, (pool, window) in enumerate(self._paged):
            table = holding.tables[index]
            if self.prefix_caching:
                for at in range(holding.published[index], end // self.block_size):
                    pool.publish(table[at], self._hash(request, at))
                    holding.published[index] = at + 1
            if window is None:
                continue
            first = min(self._first_seen(end, window), len(table))
            gone = table[holding.dropped[index] : first]
            if gone:
                pool.release(gone)
                table[holding.dropped[index] : first] = [NONE] * len(gone)
                holding.dropped[index] = first
        while holding.sealed and holding.sealed[0][0] <= start:
            assert self._states is not None
            length, block = holding.sealed.pop(0)
            if self.prefix_caching and not self._states.is_published(block):
                self._states.publish(block, self._hash(request, length // self.block_size - 1))
            self._states.release([block])
        holding.due = self._next_due(holding)

    def _next_due(self, holding: Holding) -> int:
        """The first length at which `confirm` has something to do, as far as it is known now."""
        if holding.sealed:
            return 0
        due = NEVER
        for index, (_, window) in enumerate(self._paged):
            if self.prefix_caching:
                due = min(due, (holding.published[index] + 1) * self.block_size)
            if window is not None:
                due = min(due, (holding.dropped[index] + 1) * self.block_size + window - 1)
        return due

    def release(self, request: Request) -> None:
        """Everything the request has, whatever state it is in."""
        holding = request.holding
        for (pool, _), table, dropped in zip(self._paged, holding.tables, holding.dropped, strict=True):
            pool.release(table[dropped:])
        if self._states is not None:
            self._states.release([block for block in (holding.state,) if block != NONE])
            self._states.release([block for _, block in holding.sealed])
        request.holding = NOTHING

    def drop_cache(self) -> None:
        for pool in self.pools:
            pool.drop_cache()

    def check(self, requests: list[Request]) -> None:
        """Assert the ownership rule over every pool. For tests."""
        for index, (pool, _) in enumerate(self._paged):
            tables = [(r.holding.tables[index], r.holding.dropped[index], r.holding.published[index]) for r in requests]
            pool.check([table[dropped:] for table, dropped, _ in tables])
            assert all(block != NONE for table, dropped, _ in tables for block in table[dropped:])
            writers: set[int] = set()
            for table, dropped, published in tables:
                mine = set(table[max(published, dropped) :])
                assert not mine & writers, "a block has two writers"
                writers |= mine
        if self._states is not None:
            holdings = [request.holding for request in requests]
            self._states.check([[h.state, *(block for _, block in h.sealed)] for h in holdings])
            written = [h.state for h in holdings]
            assert len(set(written)) == len(written), "a state has two writers"
            assert not {block for h in holdings for _, block in h.sealed} & set(written), "a state is read and written"

    def _first_seen(self, position: int, window: int) -> int:
        """The block with the oldest token that a query at this position, or any later one, can see."""
        return max(0, position - window + 1) // self.block_size

    def _hash(self, request: Request, index: int) -> bytes:
        hashes = request.block_hashes
        while index >= len(hashes):
            parent = hashes[-1] if hashes else root_hash(self._secret, request.salt)
            at = len(hashes) * self.block_size
            hashes.append(block_hash(parent, request.tokens[at : at + self.block_size]))
        return hashes[index]


NOTHING = Holding([], [], [])


def blocks_for_one(group: KVGroup, block_size: int, max_model_len: int, max_num_batched_tokens: int) -> int:
    """Blocks with which one request can always go on, however long, with two steps of it under way."""
    if group.state:
        return 2  # one that it was found in, one that it is written to
    whole = -(-max_model_len // block_size)
    if group.window is None:
        return whole
    return min(whole, -(-(group.window - 1 + 2 * max_num_batched_tokens) // block_size) + 2)
