"""Ops of attention over paged KV memory: rotary embedding, KV write, attention itself."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from skyline.ops.batch import AttentionBatch
from skyline.ops.caches import KVCache
from skyline.ops.contract import Case, Cost, Op, nbytes, randn, register

FP8_MAX = 448.0  # the largest number of float8_e4m3fn


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


def _rope(q: Tensor, k: Tensor, positions: Tensor, table: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Rotate q [T, Hq * head_dim] and k [T, Hk * head_dim] to their positions [T] (arXiv:2104.09864).

    Half-split layout: dimension i turns with dimension i + R / 2.
    table [P, R] holds cos | sin of R / 2 frequencies for each position; dimensions beyond R are passed through.
    """
    cos, sin = table.index_select(0, positions).to(q.dtype).unsqueeze(1).chunk(2, dim=-1)
    return (
        _rotate(q.view(len(q), -1, head_dim), cos, sin).flatten(-2),
        _rotate(k.view(len(k), -1, head_dim), cos, sin).flatten(-2),
    )


def _rope_cases(dtype: torch.dtype, generator: torch.Generator) -> Iterator[Case]:
    angles = torch.rand((40, 4), generator=generator) * 6
    table = torch.cat((angles.cos(), angles.sin()), dim=-1)
    for rows in (1, 7):
        positions = torch.randint(0, 40, (rows,), generator=generator)
        for head_dim in (8, 12):  # full and partial rotation
            q, k = randn((rows, 4 * head_dim), dtype, generator), randn((rows, 2 * head_dim), dtype, generator)
            yield Case(f"T={rows} D={head_dim}", (q, k, positions, table, head_dim))


rope = register(
    Op(
        "rope",
        _rope,
        cost=lambda q, k, positions, table, head_dim: Cost(
            2 * nbytes(q, k) + positions.numel() * table.shape[1] * table.element_size(), 3 * (q.numel() + k.numel())
        ),
        cases=_rope_cases,
        meta=lambda q, k, positions, table, head_dim: (q.new_empty(q.shape), k.new_empty(k.shape)),
        num_outputs=2,
    )
)


def _kv_write(k: Tensor, v: Tensor, cache: KVCache, batch: AttentionBatch) -> None:
    """Store k, v [T, Hk * head_dim] of this step's tokens at the places that `batch` gives them in the cache.

    An int8 cache takes each token's head x as round(x * (127 / max|x|)), halves to even, and the scale max|x| / 127;
    one of fp8 takes x / scale, with the head's own scale, limited to +-448.
    """
    shape = (-1, cache.num_kv_heads, cache.head_dim)
    places, size = batch.of(cache).slot_mapping, cache.tensors[0].shape[1]
    blocks, offsets = places // size, places % size
    for index, (fresh, cached) in enumerate(zip((k, v), cache.tensors, strict=True)):
        rows = fresh.reshape(shape)
        if cached.dtype == torch.float8_e4m3fn:
            assert cache.scales is not None
            scaled = (rows.float() / cache.scales[index].view(-1, 1)).clamp(-FP8_MAX, FP8_MAX).to(cached.dtype)
            rows, cached = scaled.view(torch.uint8), cached.view(torch.uint8)  # which every device assigns
        elif cache.scales is not None:
            rows, scale = quantized(rows)
            cache.scales[index][blocks, offsets] = scale
        cached[blocks, offsets] = rows.to(cached.dtype)


def quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., D] -> int8 [..., D] and scales [...] float32, symmetric about 0; of zeros both are 0."""
    wide = x.float()
    largest = wide.abs().amax(-1)
    top = torch.full_like(largest, 127)  # a tensor: by a number, torch would divide with two roundings
    inverse = torch.where(largest > 0, top / largest, 0)
    # Of a maximum that is not a normal number the inverse may be infinite.
    levels = torch.round(wide * inverse.unsqueeze(-1)).nan_to_num().clamp(-127, 127)
    return levels.to(torch.int8), largest / top


def gather(cache: KVCache, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of the blocks of one request, [len(blocks) * block_size, Hk, D]; of int8 and fp8, in float32."""
    if cache.dtype == torch.float8_e4m3fn:
        raw = (part.view(torch.uint8).index_select(0, blocks).flatten(0, 1) for part in cache.tensors)
        keys, values = (part.view(cache.dtype) for part in raw)
    else:
        keys, values = (part.index_select(0, blocks).flatten(0, 1) for part in cache.tensors)
    if cache.scales is not None:
        k_scale, v_scale = cache.scales
        if cache.dtype == torch.int8:
            k_scale, v_scale = (scale.index_select(0, blocks).flatten(0, 1) for scale in (k_scale, v_scale))
        keys, values = keys.float() * k_scale.unsqueeze(-1), values.float() * v_scale.unsqueeze(-1)
    return keys, values


def make_cache(dtype: torch.dtype, generator: torch.Generator, heads: int = 2, head_dim: int = 8) -> KVCache:
    cache = KVCache(heads, head_dim, dtype)
    cache.k, cache.v = (randn((12, 4, heads, head_dim), dtype, generator) for _ in range(2))
    return cache


def make_batch(starts: list[int], lengths: list[int], block_size: int = 4) -> AttentionBatch:
    """Requests with block tables that share no block and are in no order."""
    tables, free = [], list(range(1, 12))
    for start, length in zip(starts, lengths, strict=True):
        tables.append([free.pop(len(free) // 2) for _ in range(-(-(start + length) // block_size))])
    return AttentionBatch.build(tables, starts, lengths, block_size, torch.device("cpu"))


# Decode, whole prompts, a later chunk, and all mixed.
BATCHES = (([5], [1]), ([0, 0], [6, 1]), ([3], [7]), ([9, 0, 2], [1, 5, 3]))


def _kv_write_cases(dtype: torch.dtype, generator: torch.Generator) -> Iterator[Case]:
    for starts, lengths in BATCHES:
        batch, cache = make_batch(starts, lengths), make_cache(dtype, generator)
        k, v = (randn((sum(lengths), 16), dtype, generator) for _ in range(2))
        yield Case(f"starts={starts} lengths={lengths}", (k, v, cache, batch), mutated=cache.tensors)


kv_write = register(
    Op(
        "kv_write",
        _kv_write,
        cost=lambda k, v, cache, batch: Cost(2 * nbytes(k, v) + nbytes(batch.of(cache).slot_mapping), 0),
        cases=_kv_write_cases,
        num_outputs=0,
        meta=lambda k, v, cache, batch: None,
    )
)


def _paged_attention(
    q: Tensor,
    cache: KVCache,
    batch: AttentionBatch,
    scale: float,
    window: int | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Causal attention of q [T, Hq * head_dim] over each request's own cached keys and values -> [T, Hq * head_dim].

    Query head h reads KV head h // (Hq / Hk). With a window, a token sees itself and the window - 1 tokens before it.
    softcap: scores become softcap * tanh(scores / softcap) (arXiv:2408.00118). sinks [Hq]: one more score of each head,
    which belongs to no token and only adds to the denominator of the softmax (arXiv:2309.17453, arXiv:2508.10925).
    """
    block_size, head_dim, kv_heads = cache.tensors[0].shape[1], cache.head_dim, cache.num_kv_heads
    output = torch.empty_like(q)
    offset = 0
    for row, (queries, context) in enumerate(zip(batch.host_query_lens, batch.host_context_lens, strict=True)):
        blocks = batch.of(cache).block_tables[row, : -(-context // block_size)]
        k, v = (part[:context].transpose(0, 1) for part in gather(cache, blocks))  # [Hk, L, D]
        mine = q[offset : offset + queries].reshape(queries, kv_heads, -1, head_dim).to(k.dtype)  # [n, Hk, G, D]
        group = mine.shape[2]
        if sinks is not None or softcap is not None:
            rows = mine.permute(1, 2, 0, 3).float()  # [Hk, G, n, D]
            scores = rows @ k.float().transpose(1, 2).unsqueeze(1) * scale
            scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
            scores = scores.masked_fill(~causal_mask(queries, context, window, q.device), float("-inf"))
            weights = _softmax(scores, None if sinks is None else sinks.float().view(kv_heads, group, 1, 1))
            out = weights @ v.float().unsqueeze(1)
            output[offset : offset + queries] = out.permute(2, 0, 1, 3).flatten(1).to(q.dtype)
        elif queries == 1 and window is None:
            # The group's heads read the same keys and nothing is masked: they are the rows of one product.
            out = F.scaled_dot_product_attention(mine[0].unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0), scale=scale)
            output[offset] = out.reshape(-1).to(q.dtype)
        else:
            k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
            rows = mine.flatten(1, 2).transpose(0, 1).unsqueeze(0)  # [1, Hq, n, D]
            mask = causal_mask(queries, context, window, q.device)
            out = F.scaled_dot_product_attention(rows, k.unsqueeze(0), v.unsqueeze(0), attn_mask=mask, scale=scale)
            output[offset : offset + queries] = out[0].transpose(0, 1).flatten(1).to(q.dtype)
        offset += queries
    return output


def _softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Softmax over the last dimension, whose denominator also counts the sink."""
    if sinks is None:
        return torch.softmax(scores, -1)
    return torch.softmax(torch.cat((scores, sinks.expand(*scores.shape[:-1], 1)), -1), -1)[..., :-1]


def causal_mask(queries: int, context: int, window: int | None, device: torch.device) -> Tensor:
    """[queries, context] bool, true where the query (one of the last of the context) may look."""
    positions = torch.arange(context - queries, context, device=device).unsqueeze(1)
    keys = torch.arange(context, device=device).unsqueeze(0)
    mask = keys <= positions
    return mask if window is None else mask & (keys > positions - window)


def _paged_attention_cost(
    q: Tensor,
    cache: KVCache,
    batch: AttentionBatch,
    scale: float,
    window: int | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
) -> Cost:
    read = seen = 0
    for queries, context in zip(batch.host_query_lens, batch.host_context_lens, strict=True):
        read += context if window is None else min(context, window + queries - 1)
        first = context - queries
        seen += sum(min(first + i + 1, window or context) for i in range(queries))
    return Cost(2 * nbytes(q) + nbytes(sinks) + read * cache.bytes_per_token(), 4 * seen * q.shape[-1])


def _paged_attention_cases(dtype: torch.dtype, generator: torch.Generator) -> Iterator[Case]:
    for starts, lengths in BATCHES:
        for group in (1, 3):
            for window in (None, 1, 4):
                for sink, softcap in ((False, None), (True, None), (False, 1.5), (True, 0.7)):
                    batch, cache = make_batch(starts, lengths), make_cache(dtype, generator)
                    q = randn((sum(lengths), 16 * group), dtype, generator)
                    sinks = randn((2 * group,), dtype, generator) if sink else None
                    yield Case(
                        f"starts={starts} lengths={lengths} G={group} W={window} sinks={sink} softcap={softcap}",
                        (q, cache, batch, 0.3, window, sinks, softcap),
                    )


paged_attention = register(
    Op(
        "paged_attention",
        _paged_attention,
        cost=_paged_attention_cost,
        cases=_paged_attention_cases,
        meta=lambda q, *_: q.new_empty(q.shape),
    )
)
