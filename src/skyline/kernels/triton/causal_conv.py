"""The causal convolution before linear attention, and which of a step's tokens a program takes (skyline.ops.delta)."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from skyline.kernels.triton.sizes import cdiv, next_power_of_2
from skyline.ops import AttentionBatch, StateCache


@triton.jit
def request_of(tile, query_starts, requests, TOKENS: tl.constexpr):
    """Which request a tile of TOKENS tokens belongs to, and which of its tiles it is.

    Request r's tiles are numbered from query_starts[r] // TOKENS + r, which leaves room for all of them.
    """
    before = 0
    lane = tl.arange(0, 128)
    for first in range(0, requests, 128):
        request = first + lane
        start = tl.load(query_starts + request, mask=request < requests, other=0) // TOKENS + request
        before += tl.sum(((start <= tile) & (request < requests)).to(tl.int32))
    request = before - 1
    return request, tile - (tl.load(query_starts + request) // TOKENS + request)


def tiles(tokens: int, requests: int, size: int) -> int:
    """The most that `request_of` can count."""
    return tokens // size + requests


@triton.jit(do_not_specialize=["requests"])
def _conv_kernel(
    x,  # [T, channels]
    weight,  # [channels, TAPS + 1]
    conv,  # [blocks, TAPS, channels]
    blocks,  # [2, R] int32: reads, writes
    query_starts,  # [R + 1]
    y,  # [T, channels], contiguous
    x_stride,
    requests,
    channels,
    DECODE: tl.constexpr,  # a token a request
    TAPS: tl.constexpr,
    ROWS: tl.constexpr,  # of the state: TAPS, padded
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if DECODE:
        request, tile = tl.program_id(0), 0
    else:
        request, tile = request_of(tl.program_id(0), query_starts, requests, TOKENS)
    start = tl.load(query_starts + request).to(tl.int64)
    length = (tl.load(query_starts + request + 1) - start).to(tl.int32)
    if tile * TOKENS >= length:
        return
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    known = column < channels
    token = tile * TOKENS + tl.arange(0, TOKENS)
    total = tl.zeros((TOKENS, BLOCK), tl.float32)
    for tap in tl.static_range(TAPS + 1):
        at = token + tap - TAPS
        mask = ((at >= 0) & (at < length))[:, None] & known[None, :]
        values = tl.load(x + (start + at)[:, None] * x_stride + column[None, :], mask=mask, other=0.0)
        scale = tl.load(weight + column * (TAPS + 1) + tap, mask=known, other=0.0).to(tl.float32)
        total += values.to(tl.float32) * scale[None, :]
    if tile == 0:
        # Only this program reads the old state of these channels: so it is the one that may write over it.
        read = tl.load(blocks + request).to(tl.int64)
        write = tl.load(blocks + requests + request).to(tl.int64)
        old = conv + read * TAPS * channels
        for tap in tl.static_range(TAPS):
            past = token + tap
            old_mask = ((past < TAPS) & (read >= 0))[:, None] & known[None, :]
            values = tl.load(old + past[:, None] * channels + column[None, :], mask=old_mask, other=0.0)
            scale = tl.load(weight + column * (TAPS + 1) + tap, mask=known, other=0.0).to(tl.float32)
            total += values.to(x.dtype.element_ty).to(tl.float32) * scale[None, :]
        row = tl.arange(0, ROWS)
        source = length - TAPS + row
        inside = (row < TAPS)[:, None] & known[None, :]
        is_fresh = (source >= 0)[:, None]
        fresh = tl.load(x + (start + source)[:, None] * x_stride + column[None, :], mask=inside & is_fresh, other=0.0)
        kept_at = old + (length + row)[:, None] * channels + column[None, :]
        kept = tl.load(kept_at, mask=inside & (source < 0)[:, None] & (read >= 0), other=0.0)
        line = tl.where(is_fresh, fresh.to(tl.float32), kept.to(tl.float32)).to(conv.dtype.element_ty)
        tl.debug_barrier()  # all threads have read
        target = conv + write * TAPS * channels + row[:, None] * channels + column[None, :]
        tl.store(target, line, mask=inside & (write >= 0))
    rounded = total.to(y.dtype.element_ty).to(tl.float32)
    out = y + (start + token)[:, None] * channels + column[None, :]
    result = (rounded * tl.sigmoid(rounded)).to(y.dtype.element_ty)
    tl.store(out, result, mask=(token < length)[:, None] & known[None, :])


def causal_conv(x: Tensor, weight: Tensor, cache: StateCache, batch: AttentionBatch) -> Tensor:
    conv, _ = cache.tensors
    (rows, channels), requests = x.shape, len(batch.host_query_lens)
    y = x.new_empty((rows, channels))
    if not rows:
        return y
    decode = max(batch.host_query_lens) == 1
    tokens, block = (1, 256) if decode else (32, 128)
    programs = requests if decode else tiles(rows, requests, tokens)
    _conv_kernel[(programs, cdiv(channels, block))](
        x,
        weight.contiguous(),
        conv,
        batch.device_states(),
        batch.query_starts,
        y,
        x.stride(0),
        requests,
        channels,
        DECODE=decode,
        TAPS=cache.taps,
        ROWS=next_power_of_2(cache.taps),
        TOKENS=tokens,
        BLOCK=block,
        num_warps=2 if decode else 4,
    )
    return y
