"""How latent attention goes about a step: which requests together, in which tiles and splits. Told without Triton."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

# Queries of a request that are absorbed. In operations, with DeepSeek's sizes, that is less work for up to 170.
ABSORBED_QUERIES = 64
TOKENS_AT_ONCE = 2048  # that are absorbed: each takes heads * rank numbers twice
EXPANDED_BYTES = 512 << 20  # keys and values that are held at once
SCORE_BYTES = 128 << 20  # of the indexer, that are held at once
LEAST_KEYS = 64  # of a split
_MOST_SPLITS = 64
_SPLIT_KEYS = 256  # in whose time a split begins, ends and is merged
_EXPECTED_KEYS = 8192  # of a context of which no more is known than its upper bound


class Part(NamedTuple):
    """Neighbouring requests that are computed together, and their tokens. longest: the most queries of one."""

    requests: slice
    tokens: slice
    longest: int


def parts(lengths: list[int]) -> Iterator[Part]:
    """Each request with many queries alone, those with few together."""
    first = token = longest = 0  # of the part that is not finished
    end = 0
    for request, length in enumerate(lengths):
        if request > first and (max(length, longest) > ABSORBED_QUERIES or end + length - token > TOKENS_AT_ONCE):
            yield Part(slice(first, request), slice(token, end), longest)
            first, token, longest = request, end, 0
        end += length
        longest = max(longest, length)
    if end > token:
        yield Part(slice(first, len(lengths)), slice(token, end), longest)


class Tactic(NamedTuple):
    """Rows of queries and keys in a tile, warps, stages of the pipeline."""

    rows: int
    keys: int
    warps: int
    stages: int


def absorbed_tactic(
    rows: int, width: int, item: int, shared: int, hopper: bool, chosen: bool, quantized: bool
) -> Tactic:
    """rows: pairs of a query and a head that share keys; width: numbers of a token, padded; item: bytes of one."""
    if item == 4:
        return Tactic(16, 16, 8, 1)
    if hopper and width > 128:
        # Products of fewer rows have instructions for which Triton does not load ahead what is used twice.
        tactic = Tactic(64, 32, 8, 3) if chosen else Tactic(64, 64, 8, 2)
        if (tactic.rows + 2 * tactic.keys) * width * item + 8192 <= shared:
            return tactic
    if quantized and width > 128:  # more rows, and what is widened no longer fits into registers
        return Tactic(16, 32, 8, 2)
    return Tactic(16, 32, 4, 2) if rows <= 16 else Tactic(32, 32, 8, 2)


@functools.cache
def num_splits(programs: int, capacity: int, processors: int) -> int:
    """Into how many parts contexts are cut of which no more is known than that they are at most `capacity` long."""
    expected = min(capacity, _EXPECTED_KEYS)

    def time(splits: int) -> float:
        return math.ceil(programs * splits / processors) * (expected / splits + _SPLIT_KEYS)

    return min(range(1, max(1, min(_MOST_SPLITS, capacity // LEAST_KEYS)) + 1), key=time)


def heads_at_once(heads: int, context: int, rows: int, item: int) -> int:
    """Whose keys and values, `rows` numbers of `item` bytes a token together, are held at once."""
    return max(1, min(heads, EXPANDED_BYTES // (context * rows * item)))


def queries_at_once(tokens: int, width: int) -> int:
    """Whose scores in the indexer, of `width` positions each, are held at once."""
    return min(tokens, max(1, SCORE_BYTES // (4 * width)))
