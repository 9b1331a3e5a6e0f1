"""Linear attention by the gated delta rule (skyline.ops.delta).

A few tokens of a request go one by one, with the state in registers. More go in chunks (arXiv:2412.06464): with the
decay G_i = exp(g_1 + .. + g_i) since the chunk's begin, where the state was S, the changes u_i that its tokens make to
the state obey

    u_i = beta_i (v_i - G_i S^T k_i - sum_{j < i} (G_i / G_j) (k_j . k_i) u_j),  that is  (I + A) u = beta (v - G K S)

A and the same products with the queries do not depend on S: a first kernel takes all chunks side by side and leaves
(I + A)^-1 beta and what mixes the changes into the outputs. A second one goes through a request's chunks in turn.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from skyline.kernels.triton.causal_conv import request_of, tiles
from skyline.kernels.triton.device import shared_memory
from skyline.kernels.triton.sizes import cdiv, next_power_of_2
from skyline.kernels.triton.thresholds import LARGEST_KEY, LONGEST
from skyline.ops import AttentionBatch, StateCache

_CHUNK = tl.constexpr(64)
_BLOCK = tl.constexpr(16)  # rows of a chunk that are solved one by one
_VALUES = 32  # columns of the state a program
_ROOMY = 200_000  # bytes of shared memory with which the next chunk is loaded ahead

_compiled: set[tuple[object, ...]] = set()  # cases whose `_recurrent_kernel` has been launched


@triton.jit
def _log_decay(a, decay, dt_bias):
    """g = -exp(decay) softplus(a + dt_bias)."""
    wide = a.to(tl.float32) + dt_bias.to(tl.float32)
    softplus = tl.maximum(wide, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(wide)))
    return -tl.exp(decay.to(tl.float32)) * softplus


@triton.jit(do_not_specialize=["requests", "longest"])
def _recurrent_kernel(
    qkv,  # [T, 2 * key_heads * KEY + heads * VALUE]
    b,  # [T, heads]
    a,  # [T, heads]
    decay,  # [heads]
    dt_bias,  # [heads]
    state,  # [blocks, heads, KEY, VALUE] float32
    blocks,  # [2, R] int32: reads, writes
    query_starts,  # [R + 1]
    y,  # [T, heads * VALUE], contiguous
    qkv_stride,
    b_stride,
    a_stride,
    requests,
    longest,
    key_heads,
    heads,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    KEYS: tl.constexpr,  # KEY, padded
    VALUES: tl.constexpr,  # columns a program
):
    """Requests of up to `longest` tokens, one by one."""
    request, head = tl.program_id(0), tl.program_id(1)
    start, end = tl.load(query_starts + request), tl.load(query_starts + request + 1)
    if end - start > longest:
        return
    read = tl.load(blocks + request).to(tl.int64)
    write = tl.load(blocks + requests + request).to(tl.int64)
    key = tl.arange(0, KEYS)
    value = tl.program_id(2) * VALUES + tl.arange(0, VALUES)
    inside = (key < KEY)[:, None] & (value < VALUE)[None, :]
    place = (head * KEY + key)[:, None] * VALUE + value[None, :]
    size = heads * KEY * VALUE
    memory = tl.load(state + read * size + place, mask=inside & (read >= 0), other=0.0)
    rate, bias = tl.load(decay + head), tl.load(dt_bias + head)
    shared = head // (heads // key_heads)
    for token in range(0, end - start):
        row = start.to(tl.int64) + token
        at = qkv + row * qkv_stride
        q = tl.load(at + shared * KEY + key, mask=key < KEY, other=0.0).to(tl.float32)
        k = tl.load(at + (key_heads + shared) * KEY + key, mask=key < KEY, other=0.0).to(tl.float32)
        v = tl.load(at + 2 * key_heads * KEY + head * VALUE + value, mask=value < VALUE, other=0.0).to(tl.float32)
        beta = tl.sigmoid(tl.load(b + row * b_stride + head).to(tl.float32))
        shrink = tl.exp(_log_decay(tl.load(a + row * a_stride + head), rate, bias))
        q *= tl.rsqrt(tl.sum(q * q) + 1e-6) * KEY**-0.5
        k *= tl.rsqrt(tl.sum(k * k) + 1e-6)
        memory *= shrink
        change = beta * (v - tl.sum(memory * k[:, None], 0))
        memory += k[:, None] * change[None, :]
        read_out = tl.sum(memory * q[:, None], 0)
        tl.store(y + (row * heads + head) * VALUE + value, read_out.to(y.dtype.element_ty), mask=value < VALUE)
    tl.store(state + write * size + place, memory, mask=inside & (write >= 0))


@triton.jit
def _inverse(lower):
    """(I + lower)^-1 of a [CHUNK, CHUNK] matrix that is zero on and above its diagonal.

    Blocks on the diagonal are solved row by row: powers of the whole could be huge where keys are alike. What is left,
    D (I + lower) = I + M with the blocks' inverses D, has M^4 = 0: its inverse is (I - M) (I + M^2).
    """
    COUNT: tl.constexpr = _CHUNK // _BLOCK
    lane = tl.arange(0, _CHUNK)
    same = (lane // _BLOCK)[:, None] == (lane // _BLOCK)[None, :]
    small = tl.sum(tl.reshape(tl.where(same, lower, 0.0), (COUNT, _BLOCK, COUNT, _BLOCK)), 2)
    row, column = tl.arange(0, _BLOCK)[None, :, None], tl.arange(0, _BLOCK)[None, None, :]
    solved = tl.where((row == column) & (small == small), 1.0, 0.0)
    for at in range(1, _BLOCK):
        factors = tl.sum(tl.where(row == at, small, 0.0), 1)
        known = tl.sum(factors[:, :, None] * solved, 1)
        solved = tl.where(row == at, solved - known[:, None, :], solved)
    wide = tl.broadcast_to(tl.reshape(solved, (COUNT, _BLOCK, 1, _BLOCK)), (COUNT, _BLOCK, COUNT, _BLOCK))
    diagonal = tl.where(same, tl.reshape(wide, (_CHUNK, _CHUNK)), 0.0)
    m = tl.dot(diagonal, tl.where(same, 0.0, lower), input_precision="tf32")
    square = tl.dot(m, m, input_precision="tf32")
    partly = diagonal + tl.dot(square, diagonal, input_precision="tf32")
    return partly - tl.dot(m, partly, input_precision="tf32")


@triton.jit(do_not_specialize=["requests", "longest"])
def _chunk_kernel(
    qkv,
    b,
    a,
    decay,
    dt_bias,
    query_starts,
    solutions,  # [T, heads, CHUNK] like qkv: rows of (I + A)^-1 beta
    mixes,  # like it: of q k^T with the decay between them, zero above the diagonal
    factors,  # [T, heads, 4] float32: what `_scan_kernel` scales rows by
    qkv_stride,
    b_stride,
    a_stride,
    requests,
    longest,
    key_heads,
    heads,
    KEY: tl.constexpr,
    KEYS: tl.constexpr,
):
    """A chunk of one head, of a request of more than `longest` tokens."""
    request, tile = request_of(tl.program_id(0), query_starts, requests, _CHUNK)
    head = tl.program_id(1)
    start, end = tl.load(query_starts + request), tl.load(query_starts + request + 1)
    first = start + tile * _CHUNK
    if end - start <= longest or first >= end:
        return
    lane, key = tl.arange(0, _CHUNK), tl.arange(0, KEYS)
    row = (first + lane).to(tl.int64)
    known = row < end
    mask = known[:, None] & (key < KEY)[None, :]
    at = qkv + row[:, None] * qkv_stride + (head // (heads // key_heads)) * KEY + key[None, :]
    k = tl.load(at + key_heads * KEY, mask=mask, other=0.0)
    k_wide = k.to(tl.float32)
    k_factor = tl.rsqrt(tl.sum(k_wide * k_wide, 1) + 1e-6)
    a_row = tl.load(a + row * a_stride + head, mask=known, other=0.0)
    decays = tl.where(known, _log_decay(a_row, tl.load(decay + head), tl.load(dt_bias + head)), 0.0)
    passed, whole = tl.cumsum(decays, 0), tl.sum(decays, 0)
    until = lane[:, None] >= lane[None, :]
    fade = tl.exp(tl.where(until, passed[:, None] - passed[None, :], 0.0)) * k_factor[None, :]
    out = (row[:, None] * heads + head) * _CHUNK + lane[None, :]
    square = known[:, None] & known[None, :]

    q = tl.load(at, mask=mask, other=0.0)
    q_wide = q.to(tl.float32)
    q_factor = tl.rsqrt(tl.sum(q_wide * q_wide, 1) + 1e-6) * KEY**-0.5
    mix = tl.where(until, tl.dot(q, tl.trans(k)) * fade * q_factor[:, None], 0.0)
    tl.store(mixes + out, mix.to(mixes.dtype.element_ty), mask=square)
    of_row = factors + (row * heads + head) * 4
    tl.store(of_row, k_factor * tl.exp(passed), mask=known)
    tl.store(of_row + 1, q_factor * tl.exp(passed), mask=known)
    tl.store(of_row + 2, k_factor * tl.exp(whole - passed), mask=known)
    tl.store(of_row + 3, tl.exp(whole + tl.zeros_like(passed)), mask=known)

    beta = tl.sigmoid(tl.load(b + row * b_stride + head, mask=known, other=0.0).to(tl.float32))
    alike = tl.dot(k, tl.trans(k)) * fade * (beta * k_factor)[:, None]
    solution = _inverse(tl.where(until & (lane[:, None] != lane[None, :]), alike, 0.0)) * beta[None, :]
    tl.store(solutions + out, solution.to(solutions.dtype.element_ty), mask=square)


@triton.jit(do_not_specialize=["requests", "longest"])
def _scan_kernel(
    qkv,
    state,
    blocks,
    query_starts,
    solutions,
    mixes,
    factors,
    y,
    qkv_stride,
    requests,
    longest,
    key_heads,
    heads,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The chunks of a request of more than `longest` tokens, in turn. Arguments as above.

    Products are of 16-bit numbers. What touches the state is their sum of two, of a high and a low part.
    """
    TYPE: tl.constexpr = qkv.dtype.element_ty
    request, head = tl.program_id(0), tl.program_id(1)
    start, end = tl.load(query_starts + request), tl.load(query_starts + request + 1)
    if end - start <= longest:
        return
    read = tl.load(blocks + request).to(tl.int64)
    write = tl.load(blocks + requests + request).to(tl.int64)
    lane, key = tl.arange(0, _CHUNK), tl.arange(0, KEYS)
    value = tl.program_id(2) * VALUES + tl.arange(0, VALUES)
    inside = (key < KEY)[:, None] & (value < VALUE)[None, :]
    place = (head * KEY + key)[:, None] * VALUE + value[None, :]
    size = heads * KEY * VALUE
    memory = tl.load(state + read * size + place, mask=inside & (read >= 0), other=0.0)
    shared = head // (heads // key_heads)
    for tile in tl.range(0, tl.cdiv(end - start, _CHUNK), num_stages=STAGES):
        first = start.to(tl.int64) + tile * _CHUNK
        row = first + lane
        known = row < end
        mask = known[:, None] & (key < KEY)[None, :]
        at = qkv + row[:, None] * qkv_stride
        q = tl.load(at + shared * KEY + key[None, :], mask=mask, other=0.0)
        k = tl.load(at + (key_heads + shared) * KEY + key[None, :], mask=mask, other=0.0)
        of_head = at + 2 * key_heads * KEY + head * VALUE + value[None, :]
        columns = known[:, None] & (value < VALUE)[None, :]
        v = tl.load(of_head, mask=columns, other=0.0).to(tl.float32)
        square = known[:, None] & known[None, :]
        place_of = (row[:, None] * heads + head) * _CHUNK + lane[None, :]
        solution = tl.load(solutions + place_of, mask=square, other=0.0)
        mix = tl.load(mixes + place_of, mask=square, other=0.0)
        of_row = factors + (row * heads + head) * 4
        k_begin = tl.load(of_row, mask=known, other=0.0)
        q_begin = tl.load(of_row + 1, mask=known, other=0.0)
        k_end = tl.load(of_row + 2, mask=known, other=0.0)
        whole = tl.load(factors + (first * heads + head) * 4 + 3)
        high = memory.to(TYPE)
        found = tl.dot(k, high) + tl.dot(k, (memory - high.to(tl.float32)).to(TYPE))
        missing = v - found * k_begin[:, None]
        change = tl.dot(solution, missing.to(TYPE))
        result = tl.dot(q, high) * q_begin[:, None]
        result += tl.dot(mix, change.to(TYPE))
        tl.store(
            y + (row[:, None] * heads + head) * VALUE + value[None, :], result.to(y.dtype.element_ty), mask=columns
        )
        faded = change * k_end[:, None]
        high = faded.to(TYPE)
        memory *= whole
        memory += tl.dot(tl.trans(k), high) + tl.dot(tl.trans(k), (faded - high.to(tl.float32)).to(TYPE))
    tl.store(state + write * size + place, memory, mask=inside & (write >= 0))


def gated_delta_rule(
    qkv: Tensor,
    b: Tensor,
    a: Tensor,
    decay: Tensor,
    dt_bias: Tensor,
    key_heads: int,
    cache: StateCache,
    batch: AttentionBatch,
) -> Tensor:
    _, state = cache.tensors
    heads, key_dim, value_dim = cache.shape
    rows, requests = qkv.shape[0], len(batch.host_query_lens)
    y = qkv.new_empty((rows, heads * value_dim))
    if not rows:
        return y
    blocks, starts = batch.device_states(), batch.query_starts
    keys, values = (max(16, next_power_of_2(dim)) for dim in (key_dim, value_dim))
    values = min(values, _VALUES)
    most, fewest = max(batch.host_query_lens), min(batch.host_query_lens)
    longest = LONGEST if keys <= LARGEST_KEY and qkv.dtype != torch.float32 else most
    shape = {"KEY": key_dim, "KEYS": keys}
    columns = {"VALUE": value_dim, "VALUES": values}
    grid = (requests, heads, cdiv(value_dim, values))

    def recurrent(longest: int) -> None:
        _recurrent_kernel[grid](
            qkv,
            b,
            a,
            decay,
            dt_bias,
            state,
            blocks,
            starts,
            y,
            qkv.stride(0),
            b.stride(0),
            a.stride(0),
            requests,
            longest,
            key_heads,
            heads,
            **shape,
            **columns,
            num_warps=4,
        )

    if most > longest:
        # If a kernel does not compile, the reference computes all anew, from states that nothing may have changed yet:
        # so each kernel is compiled before the first that writes some.
        case = (qkv.device, qkv.dtype, cache.shape, key_heads, qkv.stride(0), b.stride(0), a.stride(0))
        if fewest <= longest and case not in _compiled:
            recurrent(-1)  # nobody's tokens are so few
            _compiled.add(case)
        solutions, mixes = (qkv.new_empty((rows, heads, _CHUNK.value)) for _ in range(2))
        factors = torch.empty((rows, heads, 4), dtype=torch.float32, device=qkv.device)
        roomy = shared_memory(qkv.device) >= _ROOMY
        _chunk_kernel[(tiles(rows, requests, _CHUNK.value), heads)](
            qkv,
            b,
            a,
            decay,
            dt_bias,
            starts,
            solutions,
            mixes,
            factors,
            qkv.stride(0),
            b.stride(0),
            a.stride(0),
            requests,
            longest,
            key_heads,
            heads,
            **shape,
            num_warps=4 if roomy else 8,
        )
        _scan_kernel[grid](
            qkv,
            state,
            blocks,
            starts,
            solutions,
            mixes,
            factors,
            y,
            qkv.stride(0),
            requests,
            longest,
            key_heads,
            heads,
            **shape,
            **columns,
            STAGES=2 if roomy else 1,
            num_warps=8,
        )
    if fewest <= longest:
        recurrent(longest)
    return y
