"""The choice of tokens from logits, as skyline.runner.sampling.choose defines it: no sort, no wait for the device.

Scaled logits are ordered by 64-bit keys: the float's bits made monotonic above, the complemented id below, so that keys
differ and rank equal logits by lower id. Weights are whole numbers and their sums are exact in int64, in any order.

1. The largest key of each chunk of a row, a program a chunk.
2. The sum of each chunk's weights; where top_k or top_p is on, also how many logits lie how far from the top, in bins.
3. Where they are on: the logits up to a bin that leaves at most _CANDIDATES of them are gathered.
4. A program a row. Without top_k and top_p: the chunk where the running sum passes its target, then the place in it.
   Else a search for the key where a sum reaches an amount, by bisection: among the candidates, or in the whole row if
   they may not hold all that top_k and top_p keep. That happens where more tokens than candidates are likely.

Nothing depends on how many chunks there are or on the order of the candidates.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from skyline.kernels.triton.device import multiprocessors
from skyline.kernels.triton.sizes import cdiv, next_power_of_2

_BINS = 512
_CANDIDATES = 2048
_TILE = 2048  # of a whole row
_LOWEST = tl.constexpr(-(2**63))
_HIGHEST = tl.constexpr(2**63 - 1)


@triton.jit
def _keys(x, ids):
    """Keys of scaled logits float32. NaN is above everything, and -0.0 equals 0.0."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    bits ^= (bits >> 31) & 0x7FFFFFFF
    bits = tl.where(x != x, 0x7FFFFFFF, bits)
    return (bits.to(tl.int64) << 32) | (0x7FFFFFFF - ids)


@triton.jit
def _logit_of(keys):
    bits = (keys >> 32).to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _id_of(keys):
    return 0x7FFFFFFF - (keys & 0x7FFFFFFF)


@triton.jit
def _scaled(logits, ids, vocab, temperature):
    x = tl.load(logits + ids, mask=ids < vocab, other=-float("inf")).to(tl.float32)
    return tl.div_rn(x, temperature + tl.zeros_like(x))


@triton.jit
def _weights(scaled, top, min_p, scale):
    p = tl.exp(scaled - top)
    return tl.where(p < min_p, 0.0, p * scale).to(tl.int64)


@triton.jit
def _bins(scaled, top, min_p, limit, BINS: tl.constexpr):
    """By distance from the top, and whether a logit lies where weights can be other than zero, with some margin."""
    limit = tl.minimum(limit, 1e-3 - tl.log(tl.maximum(min_p, 1e-30)))
    distance = top - scaled
    inside = distance < limit
    return tl.minimum(tl.where(inside, distance, 0.0) * (BINS / limit), BINS - 1.0).to(tl.int32), inside


@triton.jit
def _cut(counts, top_k, vocab, BINS: tl.constexpr, CANDIDATES: tl.constexpr):
    """The last bin to gather (-1: none), the logits up to it, and whether they hold what top_k keeps, or all."""
    places = tl.arange(0, BINS)
    ends = tl.cumsum(tl.load(counts + places), 0)
    fits = tl.sum((ends <= CANDIDATES).to(tl.int32)) - 1
    wanted = BINS - 1
    if top_k < vocab:
        wanted = tl.minimum(tl.sum((ends < top_k).to(tl.int32)), BINS - 1)
    last = tl.minimum(wanted, fits)
    return last, tl.max(tl.where(places <= last, ends, 0)), wanted <= fits


@triton.jit(do_not_specialize=["rows"])
def _max_kernel(
    best,  # [rows, chunks] int64, out
    counts,  # [rows, BINS + 1] int32, set to zero if SCALED
    logits,  # [rows, vocab]
    numbers,  # [5, rows] float64 if SCALED
    stride,
    rows,
    vocab,
    SCALED: tl.constexpr,
    CHUNK: tl.constexpr,
    BINS: tl.constexpr,
):
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    if SCALED:
        x = _scaled(logits + row * stride, ids, vocab, tl.load(numbers + row).to(tl.float32))
        if chunk == 0:
            tl.store(counts + row * (BINS + 1) + tl.arange(0, BINS), tl.zeros((BINS,), tl.int32))
            tl.store(counts + row * (BINS + 1) + BINS, 0)
    else:
        x = tl.load(logits + row * stride + ids, mask=ids < vocab, other=-float("inf")).to(tl.float32)
    tl.store(best + row * tl.num_programs(0) + chunk, tl.max(_keys(x, ids)))


@triton.jit
def _best(best, row, chunks, CHUNKS: tl.constexpr):
    places = tl.arange(0, CHUNKS)
    return tl.max(tl.load(best + row * chunks + places, mask=places < chunks, other=_LOWEST))


@triton.jit
def _merge_kernel(tokens, tops, best, chunks, CHUNKS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    key = _best(best, row, chunks, CHUNKS)
    tl.store(tokens + row, _id_of(key))
    tl.store(tops + row, _logit_of(key))


@triton.jit
def _numbers(numbers, row, rows, vocab):
    """Temperature, top_k (vocab: off), min_p, and whether the order of the logits matters."""
    temperature = tl.load(numbers + row).to(tl.float32)
    top_k = tl.minimum(tl.load(numbers + rows + row), vocab * 1.0).to(tl.int32)
    min_p = tl.load(numbers + 3 * rows + row).to(tl.float32)
    ranked = (top_k < vocab) | (tl.load(numbers + 2 * rows + row) < 1.0)
    return temperature, top_k, min_p, ranked


@triton.jit
def _finite(x):
    return tl.abs(x) < float("inf")


@triton.jit(do_not_specialize=["rows"])
def _sum_kernel(
    sums,  # [rows, chunks] int64, out
    counts,  # [rows, BINS + 1] int32, added to
    best,
    logits,
    numbers,
    stride,
    rows,
    vocab,
    scale,
    limit,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    BINS: tl.constexpr,
):
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    chunks = tl.num_programs(0)
    temperature, top_k, min_p, ranked = _numbers(numbers, row, rows, vocab)
    top = _logit_of(_best(best, row, chunks, CHUNKS))
    if (top_k > 1) & _finite(top):
        x = _scaled(logits + row * stride, chunk * CHUNK + tl.arange(0, CHUNK), vocab, temperature)
        tl.store(sums + row * chunks + chunk, tl.sum(_weights(x, top, min_p, scale)))
        if ranked:
            bins, inside = _bins(x, top, min_p, limit, BINS)
            found = tl.histogram(bins, BINS, mask=inside)
            tl.atomic_add(counts + row * (BINS + 1) + tl.arange(0, BINS), found, mask=found > 0)


@triton.jit(do_not_specialize=["rows"])
def _gather_kernel(
    candidates,  # [rows, CANDIDATES] int64, out, in no order
    counts,  # [rows, BINS + 1] int32; the last counts what was gathered
    best,
    logits,
    numbers,
    stride,
    rows,
    vocab,
    limit,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    BINS: tl.constexpr,
    CANDIDATES: tl.constexpr,
):
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    chunks = tl.num_programs(0)
    temperature, top_k, min_p, ranked = _numbers(numbers, row, rows, vocab)
    top = _logit_of(_best(best, row, chunks, CHUNKS))
    if (top_k > 1) & ranked & _finite(top):
        counts += row * (BINS + 1)
        last, _, _ = _cut(counts, top_k, vocab, BINS, CANDIDATES)
        nearest, near = _bins(_logit_of(tl.load(best + row * chunks + chunk)), top, min_p, limit, BINS)
        if near & (nearest <= last):
            ids = chunk * CHUNK + tl.arange(0, CHUNK)
            x = _scaled(logits + row * stride, ids, vocab, temperature)
            bins, inside = _bins(x, top, min_p, limit, BINS)
            taken = inside & (bins <= last)
            ends = tl.cumsum(taken.to(tl.int32), 0)
            count = tl.max(ends)
            start = tl.minimum(tl.atomic_add(counts + BINS, count), CANDIDATES - count)  # never beyond the row's
            tl.store(candidates + row * CANDIDATES + start + ends - 1, _keys(x, ids), mask=taken)


@triton.jit
def _middle(low, high):
    """A key above low and not above high; their difference may not fit 64 bits."""
    return (low & high) + ((low ^ high) >> 1) + 1


@triton.jit
def _select(keys, weights, amount):
    """The first key in falling order where the running sum of weights reaches `amount`, and that sum.

    Both ends of what is searched are keys that exist, so it is soon over where keys are few or alike.
    """
    low = tl.min(tl.where(weights > 0, keys, _HIGHEST))
    high = tl.max(keys)
    total = tl.sum(weights)
    while low < high:
        middle = _middle(low, high)
        above = keys >= middle
        part = tl.sum(tl.where(above, weights, 0))
        if part >= amount:
            low = tl.min(tl.where(above, keys, _HIGHEST))
            total = part
        else:
            high = tl.max(tl.where(above, _LOWEST, keys))
    return low, total


@triton.jit
def _select_in_row(
    logits,
    vocab,
    temperature,
    top,
    min_p,
    scale,
    least,
    total,
    amount,
    COUNT: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
):
    """`_select` among all keys of a row from `least` on, whose weights sum up to `total`. COUNT: each weighs 1."""
    low = least
    high = tl.full((), _HIGHEST, tl.int64)
    while low < high:
        middle = _middle(low, high)
        parts = tl.zeros((TILE,), tl.int64)
        higher = tl.full((TILE,), _HIGHEST, tl.int64)
        lower = tl.full((TILE,), _LOWEST, tl.int64)
        for tile in range(TILES):
            ids = tile * TILE + tl.arange(0, TILE)
            x = _scaled(logits, ids, vocab, temperature)
            keys = tl.where(ids < vocab, _keys(x, ids), _LOWEST)
            above = keys >= middle
            if COUNT:
                parts += above.to(tl.int64)
            else:
                parts += tl.where(above, _weights(x, top, min_p, scale), 0)
            higher = tl.minimum(higher, tl.where(above, keys, _HIGHEST))
            lower = tl.maximum(lower, tl.where(above, _LOWEST, keys))
        part = tl.sum(parts)
        if part >= amount:
            low = tl.min(higher)
            total = part
        else:
            high = tl.max(lower)
    return low, total


@triton.jit
def _least_sum(total, top_p):
    """The sum of weights that a nucleus has to reach."""
    return tl.maximum(tl.ceil(total.to(tl.float64) * top_p).to(tl.int64), 1)


@triton.jit
def _target(total, u):
    """The first running sum above floor(total * u); rounding could turn total * u into total."""
    return tl.minimum((total.to(tl.float64) * u).to(tl.int64), total - 1) + 1


@triton.jit(do_not_specialize=["rows"])
def _choose_kernel(
    tokens,  # [rows] int64, out
    tops,  # [rows] float32, out
    best,
    sums,
    counts,
    candidates,
    logits,
    numbers,
    stride,
    rows,
    vocab,
    scale,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    BINS: tl.constexpr,
    CANDIDATES: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
):
    row, chunks = tl.program_id(0).to(tl.int64), tl.cdiv(vocab, CHUNK)
    temperature, top_k, min_p, ranked = _numbers(numbers, row, rows, vocab)
    top_p, u = tl.load(numbers + 2 * rows + row), tl.load(numbers + 4 * rows + row)
    key = _best(best, row, chunks, CHUNKS)
    top = _logit_of(key)
    tl.store(tops + row, top)
    logits += row * stride
    if (top_k > 1) & _finite(top):
        places = tl.arange(0, CHUNKS)
        ends = tl.cumsum(tl.load(sums + row * chunks + places, mask=places < chunks, other=0), 0)
        total = tl.max(ends)
        if ranked:
            _, count, complete = _cut(counts + row * (BINS + 1), top_k, vocab, BINS, CANDIDATES)
            lanes = tl.arange(0, CANDIDATES)
            keys = tl.load(candidates + row * CANDIDATES + lanes, mask=lanes < count, other=_LOWEST)
            held = lanes < count
            weights = _weights(tl.where(held, _logit_of(keys), -float("inf")), top, min_p, scale)
            if complete & (top_k < count):
                least, kept = _select(keys, held.to(tl.int64), top_k)
                weights = tl.where(keys >= least, weights, 0)
            mass = tl.sum(weights)
            if top_k < vocab:
                total = mass
            elif not complete:
                complete = mass >= _least_sum(total, top_p)
            if complete:
                kept = mass
                if top_p < 1.0:
                    least, kept = _select(keys, weights, _least_sum(total, top_p))
                key, kept = _select(keys, weights, _target(kept, u))
            else:
                least = _keys(-float("inf") + top, vocab)
                total = tl.max(ends)
                if top_k < vocab:
                    least, kept = _select_in_row(
                        logits,
                        vocab,
                        temperature,
                        top,
                        min_p,
                        scale,
                        least,
                        vocab.to(tl.int64),
                        top_k,
                        True,
                        TILE,
                        TILES,
                    )
                    # What that key and all above it weigh: the sum that a search for it would end with.
                    parts = tl.zeros((TILE,), tl.int64)
                    for tile in range(TILES):
                        ids = tile * TILE + tl.arange(0, TILE)
                        x = _scaled(logits, ids, vocab, temperature)
                        parts += tl.where(_keys(x, ids) >= least, _weights(x, top, min_p, scale), 0)
                    total = tl.sum(parts)
                kept = total
                if top_p < 1.0:
                    amount = _least_sum(total, top_p)
                    least, kept = _select_in_row(
                        logits, vocab, temperature, top, min_p, scale, least, total, amount, False, TILE, TILES
                    )
                amount = _target(kept, u)
                key, kept = _select_in_row(
                    logits, vocab, temperature, top, min_p, scale, least, kept, amount, False, TILE, TILES
                )
        else:
            target = _target(total, u)
            chunk = tl.sum((ends < target).to(tl.int32))
            target -= tl.max(tl.where(places < chunk, ends, 0))
            ids = chunk * CHUNK + tl.arange(0, CHUNK)
            inside = tl.cumsum(_weights(_scaled(logits, ids, vocab, temperature), top, min_p, scale), 0)
            place = tl.sum((inside < target).to(tl.int32))
            key = _keys(top, chunk * CHUNK + place)
    tl.store(tokens + row, _id_of(key))


def _chunk(rows: int, vocab: int, device: torch.device) -> int:
    """Logits of a row for one program: fewer where there would not be enough programs."""
    return 8192 if rows * cdiv(vocab, 8192) >= 2 * multiprocessors(device) else 2048


def greedy(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens [R] int64 (lowest id among equals) and their logits [R] float32 of logits [R, V] of any float dtype.

    Where a row has a NaN, its logit is NaN. It can be captured into a CUDA graph.
    """
    rows, vocab = logits.shape
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    tops = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if not rows:
        return tokens, tops
    chunk = _chunk(rows, vocab, logits.device)
    chunks = cdiv(vocab, chunk)
    best = torch.empty((rows, chunks), dtype=torch.int64, device=logits.device)
    stride = logits.stride(0)
    _max_kernel[(chunks, rows)](
        best, best, logits, best, stride, rows, vocab, SCALED=False, CHUNK=chunk, BINS=_BINS, num_warps=chunk // 1024
    )
    _merge_kernel[(rows,)](tokens, tops, best, chunks, CHUNKS=next_power_of_2(chunks), num_warps=1)
    return tokens, tops


def choose_tokens(logits: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens [R] int64 and each row's largest scaled logit [R] float32, for rows of any mix of parameters.

    logits [R, V] of any float dtype, left as they are. numbers [5, R] float64 on the device: temperature, top_k (1:
    greedy; V or more: off), top_p, min_p, and a uniform random number of each row. Where the largest logit is not
    finite the token is arbitrary.
    """
    rows, vocab = logits.shape
    device = logits.device
    tokens = torch.empty(rows, dtype=torch.int64, device=device)
    tops = torch.empty(rows, dtype=torch.float32, device=device)
    if not rows:
        return tokens, tops
    chunk = _chunk(rows, vocab, device)
    chunks = cdiv(vocab, chunk)
    best = torch.empty((rows, chunks), dtype=torch.int64, device=device)
    sums = torch.empty((rows, chunks), dtype=torch.int64, device=device)
    counts = torch.empty((rows, _BINS + 1), dtype=torch.int32, device=device)
    candidates = torch.empty((rows, _CANDIDATES), dtype=torch.int64, device=device)
    exponent = min(40, 53 - (max(vocab, 2) - 1).bit_length())
    scale, limit = 2.0**exponent, (exponent + 1) * math.log(2)
    row_of = (logits, numbers, logits.stride(0), rows, vocab)
    grid, warps, count = (chunks, rows), chunk // 1024, next_power_of_2(chunks)
    _max_kernel[grid](best, counts, *row_of, SCALED=True, CHUNK=chunk, BINS=_BINS, num_warps=warps)
    _sum_kernel[grid](sums, counts, best, *row_of, scale, limit, CHUNK=chunk, CHUNKS=count, BINS=_BINS, num_warps=warps)
    _gather_kernel[grid](
        candidates,
        counts,
        best,
        *row_of,
        limit,
        CHUNK=chunk,
        CHUNKS=count,
        BINS=_BINS,
        CANDIDATES=_CANDIDATES,
        num_warps=warps,
    )
    _choose_kernel[(rows,)](
        tokens,
        tops,
        best,
        sums,
        counts,
        candidates,
        *row_of,
        scale,
        CHUNK=chunk,
        CHUNKS=count,
        BINS=_BINS,
        CANDIDATES=_CANDIDATES,
        TILE=_TILE,
        TILES=cdiv(vocab, _TILE),
        num_warps=8,
    )
    return tokens, tops
