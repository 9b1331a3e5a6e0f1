"""Multi-head latent attention: the write to the cache, and which way each request's attention goes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from skyline.kernels.triton import latent_tactics
from skyline.kernels.triton.device import overlaps
from skyline.kernels.triton.latent_absorbed import Heads, absorbed, parts_of
from skyline.kernels.triton.latent_expanded import expanded
from skyline.kernels.triton.rope import by_own_scale, own_scale
from skyline.kernels.triton.sizes import cdiv, next_power_of_2
from skyline.ops import AttentionBatch, LatentCache
from skyline.ops.caches import LATENT_GROUP


@triton.jit
def _turned(at, cosine, sine, inside, HALF: tl.constexpr, WIDTH: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Of vectors at `at` [n, 1] the two halves after the rotation, [n, WIDTH] float32."""
    column = tl.arange(0, WIDTH)[None, :]
    mask = inside & (column < HALF)
    first = tl.load(at + (2 * column if INTERLEAVED else column), mask=mask, other=0.0).to(tl.float32)
    second = tl.load(at + (2 * column + 1 if INTERLEAVED else column + HALF), mask=mask, other=0.0).to(tl.float32)
    return first * cosine - second * sine, second * cosine + first * sine


@triton.jit
def _store_quantized(values, to, scales, RANK: tl.constexpr, WIDE_RANK: tl.constexpr, GROUP: tl.constexpr):
    """A latent [WIDE_RANK], each GROUP of it with a scale of its own."""
    GROUPS: tl.constexpr = WIDE_RANK // GROUP
    group, within = tl.arange(0, GROUPS), tl.arange(0, GROUP)
    wide = tl.reshape(values.to(tl.float32), (GROUPS, GROUP))
    largest = tl.max(tl.abs(wide), 1)
    TYPE: tl.constexpr = to.dtype.element_ty
    column = group[:, None] * GROUP + within[None, :]
    tl.store(to + column, by_own_scale(wide, largest, TYPE).to(TYPE), mask=column < RANK)
    tl.store(scales + group, own_scale(largest, TYPE), mask=group * GROUP < RANK)


@triton.jit
def _cache_token(
    slot, data, scales, keys, latent, k, norm, eps, cosine, sine,
    RANK: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, NORM: tl.constexpr, WIDE_RANK: tl.constexpr,
    WIDTH: tl.constexpr, QUANTIZED: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Write a token's latent, normed if there is a norm, and its key, rotated, to its place."""
    first, second = _turned(k + tl.zeros((1, 1), tl.int32), cosine, sine, True, HALF, WIDTH, INTERLEAVED)
    column = tl.arange(0, WIDTH)[None, :]
    if QUANTIZED:
        place, key = data + slot * RANK, keys + slot * (2 * HALF)
    else:
        place = data + slot * (RANK + 2 * HALF)
        key = place + RANK
    # The key takes the type of k before that of the cache, as in the reference.
    tl.store(key + column, first.to(k.dtype.element_ty).to(key.dtype.element_ty), mask=column < HALF)
    tl.store(key + HALF + column, second.to(k.dtype.element_ty).to(key.dtype.element_ty), mask=column < HALF)
    rank = tl.arange(0, WIDE_RANK)
    values = tl.load(latent + rank, mask=rank < RANK, other=0.0)
    if NORM:
        wide = values.to(tl.float32)
        normed = (wide * tl.rsqrt(tl.sum(wide * wide) / RANK + eps)).to(values.dtype).to(tl.float32)
        scale = tl.load(norm + rank, mask=rank < RANK, other=0.0).to(tl.float32)
        values = (normed * scale).to(values.dtype)
    if QUANTIZED:
        GROUPS: tl.constexpr = (RANK + GROUP - 1) // GROUP
        _store_quantized(values, place, scales + slot * GROUPS, RANK, WIDE_RANK, GROUP)
    else:
        tl.store(place + rank, values.to(place.dtype.element_ty), mask=rank < RANK)


@triton.jit
def _rope_write_kernel(
    q,  # [T, HEADS * (PLAIN + 2 * HALF)]
    latent,  # [T, RANK]
    k,  # [T, 2 * HALF]
    positions,  # [T]
    table,  # [P, 2 * HALF] float32
    slots,  # [T] int64
    norm,  # [RANK], or unused
    q_out,  # like q, contiguous
    data,  # [places, RANK + 2 * HALF], or [places, RANK] if QUANTIZED
    scales,  # [places, ceil(RANK / GROUP)] float32, if QUANTIZED
    keys,  # [places, 2 * HALF], if QUANTIZED
    q_stride,
    latent_stride,
    k_stride,
    eps,
    HEADS: tl.constexpr,
    PLAIN: tl.constexpr,
    RANK: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    NORM: tl.constexpr,
    LANES: tl.constexpr,  # heads of a program
    WIDE_PLAIN: tl.constexpr,
    WIDE_RANK: tl.constexpr,
    WIDTH: tl.constexpr,
    QUANTIZED: tl.constexpr,
    GROUP: tl.constexpr,
    EARLY: tl.constexpr,
):
    """A program takes some heads of a token, and the last one of each token what is cached."""
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.arange(0, WIDTH)[None, :]
    known = column < HALF
    at = table + tl.load(positions + row).to(tl.int64) * (2 * HALF) + column
    cosine = tl.load(at, mask=known, other=0.0).to(q.dtype.element_ty).to(tl.float32)
    sine = tl.load(at + HALF, mask=known, other=0.0).to(q.dtype.element_ty).to(tl.float32)
    if group < tl.num_programs(1) - 1:
        SIZE: tl.constexpr = PLAIN + 2 * HALF
        head = group * LANES + tl.arange(0, LANES)
        inside = (head < HEADS)[:, None]
        source = (q + row * q_stride + head * SIZE)[:, None]
        target = (q_out + row * (HEADS * SIZE) + head * SIZE)[:, None]
        first, second = _turned(source + PLAIN, cosine, sine, inside, HALF, WIDTH, INTERLEAVED)
        mask = inside & known
        tl.store(target + PLAIN + column, first.to(q_out.dtype.element_ty), mask=mask)
        tl.store(target + PLAIN + HALF + column, second.to(q_out.dtype.element_ty), mask=mask)
        plain = tl.arange(0, WIDE_PLAIN)[None, :]
        mask = inside & (plain < PLAIN)
        tl.store(target + plain, tl.load(source + plain, mask=mask, other=0.0), mask=mask)
    else:
        slot = tl.load(slots + row)
        if slot >= 0:
            _cache_token(
                slot, data, scales, keys, latent + row * latent_stride, k + row * k_stride, norm, eps,
                cosine, sine, RANK, HALF, INTERLEAVED, NORM, WIDE_RANK, WIDTH, QUANTIZED, GROUP,
            )  # fmt: skip


def latent_rope_write(
    q: Tensor,
    latent: Tensor,
    k: Tensor,
    positions: Tensor,
    table: Tensor,
    head_dim: int,
    cache: LatentCache,
    batch: AttentionBatch,
    interleaved: bool = True,
    norm: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    data, scales, keys = parts_of(cache)
    out = q.new_empty(q.shape)
    rows, heads, plain = q.shape[0], q.shape[1] // head_dim, head_dim - cache.rope_dim
    if rows:
        lanes = min(8, next_power_of_2(heads))
        early, wide_rank = overlaps(q.device), next_power_of_2(cache.rank)
        _rope_write_kernel[(rows, cdiv(heads, lanes) + 1)](
            q,
            latent,
            k,
            positions,
            table,
            batch.of(cache).slot_mapping,
            q if norm is None else norm,
            out,
            data,
            scales,
            keys,
            q.stride(0),
            latent.stride(0),
            k.stride(0),
            eps,
            HEADS=heads,
            PLAIN=plain,
            RANK=cache.rank,
            HALF=cache.rope_dim // 2,
            INTERLEAVED=interleaved,
            NORM=norm is not None,
            LANES=lanes,
            WIDE_PLAIN=next_power_of_2(max(1, plain)),
            WIDE_RANK=wide_rank,
            WIDTH=next_power_of_2(cache.rope_dim // 2),
            QUANTIZED=cache.quantized is not None,
            GROUP=min(LATENT_GROUP, wide_rank),
            EARLY=early,
            num_warps=2,
            launch_pdl=early,
            # Levels of int8 are rounded products: fused with the addition that rounds them, they would not be.
            enable_fp_fusion=cache.quantized != torch.int8,
        )
    return out


def latent_attention(
    q: Tensor,
    kv_b: Tensor,
    cache: LatentCache,
    batch: AttentionBatch,
    heads: int,
    value_dim: int,
    scale: float,
    chosen: Tensor | None = None,
) -> Tensor:
    plain = q.shape[1] // heads - cache.rope_dim
    out = q.new_empty((q.shape[0], heads * value_dim))
    shape = Heads(kv_b.view(heads, plain + value_dim, cache.rank), plain, scale, cache)
    if chosen is not None:
        everyone = slice(0, len(batch.host_query_lens))
        for first in range(0, q.shape[0], latent_tactics.TOKENS_AT_ONCE):
            some = slice(first, first + latent_tactics.TOKENS_AT_ONCE)
            absorbed(q[some], out[some], shape, batch, everyone, first, 1, chosen[some])
        return out
    for requests, tokens, longest in latent_tactics.parts(batch.host_query_lens):
        if longest <= latent_tactics.ABSORBED_QUERIES:
            absorbed(q[tokens], out[tokens], shape, batch, requests, tokens.start, longest, None)
        else:
            expanded(q[tokens], out[tokens], shape, batch, requests.start)
    return out
