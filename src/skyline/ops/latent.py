"""Ops of multi-head latent attention (MLA, DeepSeek-V2, arXiv:2405.04434), dense and sparse (DeepSeek-V3.2).

A token is cached as one latent vector for all heads and one rotated key that they share. For each head,
key = (W_k latent, rotated key) and value = W_v latent, where W_k and W_v are rows of one weight, `kv_b`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from skyline.ops import dense, gates
from skyline.ops.attention import BATCHES, FP8_MAX, causal_mask, make_batch, quantized
from skyline.ops.batch import AttentionBatch
from skyline.ops.caches import LATENT_GROUP, IndexCache, LatentCache
from skyline.ops.contract import Case, Cost, Op, nbytes, randn, register

# Up to so many queries of a request, attention goes over the latents themselves ("absorbed"): nothing is expanded,
# but each score costs rank + rope_dim multiplications instead of a head's own size.
ABSORBED_QUERIES = 16


def _turn_pairs(x: Tensor, positions: Tensor, table: Tensor) -> Tensor:
    """x [T, heads, R] turned to its position; dimensions 2i and 2i + 1 turn together, and come out as i and i + R/2."""
    cos, sin = table.index_select(0, positions).to(x.dtype).unsqueeze(1).chunk(2, dim=-1)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.cat((even * cos - odd * sin, odd * cos + even * sin), dim=-1)


def _latent_rope_write(
    q: Tensor, latent: Tensor, k: Tensor, positions: Tensor, table: Tensor, head_dim: int, cache: LatentCache,
    batch: AttentionBatch, interleaved: bool = True, norm: Tensor | None = None, eps: float = 0.0
) -> Tensor:  # fmt: skip
    """Rotate q's and k's rotary dimensions, cache the token, and return q, [T, heads * head_dim].

    q [T, heads * head_dim]: of each head the last R = rope_dim dimensions are rotated. latent [T, rank] and k [T, R]
    go into the cache. table [P, R]: cos | sin. `interleaved`: neighbouring dimensions turn together, else i and
    i + R/2. norm [rank]: the weight of the latent's rms_norm, if that is to be done here.
    """
    if norm is not None:
        latent = dense.rms_norm.reference(latent, norm, eps)
    heads = q.view(len(q), -1, head_dim)
    plain, turned = torch.split(heads, [head_dim - cache.rope_dim, cache.rope_dim], dim=-1)
    key = k.unsqueeze(1)
    if not interleaved:
        turned, key = (torch.stack(x.chunk(2, dim=-1), dim=-1).flatten(-2) for x in (turned, key))
    key = _turn_pairs(key, positions, table).squeeze(1)
    if cache.quantized is None:
        fresh: tuple[Tensor, ...] = (torch.cat((latent, key), dim=-1),)
    else:
        fresh = (*quantize_latents(latent, cache.quantized), key)
    places = batch.of(cache).slot_mapping
    for rows, cached in zip(fresh, cache.tensors, strict=True):
        _as_bytes(cached).flatten(0, 1).index_copy_(0, places, _as_bytes(rows.to(cached.dtype)))
    return torch.cat((plain, _turn_pairs(turned, positions, table)), dim=-1).flatten(1)


def quantize_latents(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x [T, rank] in int8 or float8_e4m3fn, and scales [T, ceil(rank / 128)] float32, of each 128 neighbours."""
    padded = F.pad(x.float(), (0, -x.shape[1] % LATENT_GROUP))
    values, scales = _quantize(padded.view(x.shape[0], padded.shape[1] // LATENT_GROUP, LATENT_GROUP), dtype)
    return _as_bytes(values).flatten(1)[:, : x.shape[1]].view(dtype), scales


def _quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x [..., D] -> values [..., D] of int8 or float8_e4m3fn, and scales [...] float32.

    The largest of each D becomes the largest number of the type. NaN stays NaN in FP8, and becomes a scale in int8.
    """
    if dtype == torch.int8:
        return quantized(x)
    wide = x.float()
    largest = wide.abs().amax(-1)
    scales = torch.where(largest > 0, largest / torch.full_like(largest, FP8_MAX), 1.0)
    return (wide / scales.unsqueeze(-1)).clamp(-FP8_MAX, FP8_MAX).to(dtype), scales


def known_latents(cache: LatentCache, blocks: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Of the blocks of one request, latents [len(blocks) * block_size, rank] and rotated keys [.., rope_dim]."""
    parts = _in_blocks(cache, blocks)
    if cache.quantized is None:
        latents, keys = torch.split(parts[0].to(dtype), [cache.rank, cache.rope_dim], dim=-1)
        return latents, keys
    values, scales, keys = parts
    spread = scales.repeat_interleave(LATENT_GROUP, -1)[:, : cache.rank]
    return (values.float() * spread).to(dtype), keys.to(dtype)


def _in_blocks(cache: LatentCache | IndexCache, blocks: Tensor) -> list[Tensor]:
    """Its tensors in some blocks, as they are, [len(blocks) * block_size, ...]."""
    return [_as_bytes(part).index_select(0, blocks).flatten(0, 1).view(part.dtype) for part in cache.tensors]


def _as_bytes(x: Tensor) -> Tensor:
    """FP8 as uint8: torch copies no rows of the former on a CPU."""
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x


def _latent_rope_write_cost(
    q: Tensor, latent: Tensor, k: Tensor, positions: Tensor, table: Tensor, head_dim: int, cache: LatentCache,
    batch: AttentionBatch, interleaved: bool = True, norm: Tensor | None = None, eps: float = 0.0
) -> Cost:  # fmt: skip
    turns = positions.numel() * table.shape[1] * table.element_size()
    flops = 3 * (k.numel() + q.numel()) + (0 if norm is None else 4 * latent.numel())
    return Cost(2 * nbytes(q, latent, k) + turns + nbytes(norm), flops)


_FORMS: tuple[tuple[int, torch.dtype | None], ...] = ((16, None), (16, torch.int8), (160, torch.float8_e4m3fn))


def _make_cache(
    dtype: torch.dtype, generator: torch.Generator, rank: int = 16, quantized: torch.dtype | None = None
) -> LatentCache:
    latents, keys = (randn((12, 4, size), dtype, generator) for size in (rank, 8))
    if quantized is None:
        return LatentCache(rank, 8, dtype, torch.cat((latents, keys), -1))
    values, scales = quantize_latents(latents.flatten(0, 1), quantized)
    return LatentCache(rank, 8, dtype, values.view(12, 4, -1), quantized, scales.view(12, 4, -1), keys)


def _positions(starts: list[int], lengths: list[int]) -> Tensor:
    return torch.cat([torch.arange(start, start + n) for start, n in zip(starts, lengths, strict=True)])


def _latent_rope_write_cases(dtype: torch.dtype, generator: torch.Generator) -> Iterator[Case]:
    angles = torch.rand((40, 4), generator=generator) * 6
    table = torch.cat((angles.cos(), angles.sin()), dim=-1)
    for starts, lengths in BATCHES:
        for interleaved, normed in ((True, False), (False, False), (True, True)):
            batch, cache, rows = make_batch(starts, lengths), _make_cache(dtype, generator), sum(lengths)
            q, latent, k = (randn((rows, n), dtype, generator) for n in (3 * 20, 16, 8))
            norm = (1 + randn((16,), dtype, generator, 0.1), 0.1) if normed else (None, 0.0)
            yield Case(
                f"starts={starts} lengths={lengths} interleaved={interleaved} norm={normed}",
                (q, latent, k, _positions(starts, lengths), table, 20, cache, batch, interleaved, *norm),
                mutated=cache.tensors,
            )
        for rank, form in _FORMS[1:]:
            cache = _make_cache(dtype, generator, rank, form)
            q, latent, k = (randn((rows, n), dtype, generator) for n in (3 * 20, rank, 8))
            yield Case(
                f"starts={starts} lengths={lengths} {form}",
                (q, latent, k, _positions(starts, lengths), table, 20, cache, batch, True, None, 0.0),
                mutated=cache.tensors,
            )


latent_rope_write = register(
    Op(
        "latent_rope_write",
        _latent_rope_write,
        cost=_latent_rope_write_cost,
        cases=_latent_rope_write_cases,
        meta=lambda q, *_: q.new_empty(q.shape),
    )
)


def _latent_attention(
    q: Tensor,
    kv_b: Tensor,
    cache: LatentCache,
    batch: AttentionBatch,
    heads: int,
    value_dim: int,
    scale: float,
    chosen: Tensor | None = None,
) -> Tensor:
    """Causal attention of q [T, heads * head_dim] over each request's own latents -> [T, heads * value_dim].

    q's heads end with their cache.rope_dim rotated dimensions; kv_b [heads * (head_dim - rope_dim + value_dim), rank]
    holds W_k and then W_v of each head. chosen [T, n] int32: the positions that each query may see, -1 for none;
    None is all that are not after it. Softmax in float32.
    """
    plain = q.shape[1] // heads - cache.rope_dim
    w_k, w_v = torch.split(kv_b.view(heads, plain + value_dim, cache.rank), [plain, value_dim], dim=1)
    block_size = cache.tensors[0].shape[1]
    output = q.new_empty((q.shape[0], heads * value_dim))
    offset = 0
    for row, (queries, context) in enumerate(zip(batch.host_query_lens, batch.host_context_lens, strict=True)):
        blocks = batch.of(cache).block_tables[row, : -(-context // block_size)]
        latents, shared = (part[:context] for part in known_latents(cache, blocks, q.dtype))
        mine = q[offset : offset + queries].view(queries, heads, -1).transpose(0, 1)  # [heads, n, D]
        q_plain, q_turned = torch.split(mine, [plain, cache.rope_dim], dim=-1)
        absorbed = queries <= ABSORBED_QUERIES
        keys = latents if absorbed else torch.einsum("cr,hdr->hcd", latents, w_k)
        q_plain = torch.bmm(q_plain, w_k) if absorbed else q_plain
        scores = (q_plain @ keys.transpose(-1, -2)).float() + (q_turned @ shared.T).float()
        visible = causal_mask(queries, context, None, q.device)
        if chosen is not None:
            visible &= _only(chosen[offset : offset + queries], context)
        weights = (scores * scale).masked_fill(~visible, float("-inf")).softmax(-1).to(q.dtype)
        if absorbed:
            mixed = torch.bmm(weights @ latents, w_v.transpose(1, 2))
        else:
            mixed = torch.bmm(weights, torch.einsum("cr,hdr->hcd", latents, w_v))
        output[offset : offset + queries] = mixed.transpose(0, 1).flatten(1)
        offset += queries
    return output


def _only(chosen: Tensor, context: int) -> Tensor:
    """[n, context] bool, true at the positions in chosen [n, k], of which those that are -1 do not count."""
    mask = chosen.new_zeros((chosen.shape[0], context + 1), dtype=torch.bool)
    return mask.scatter_(1, chosen.long().masked_fill(chosen < 0, context), True)[:, :context]


def _latent_attention_cost(
    q: Tensor,
    kv_b: Tensor,
    cache: LatentCache,
    batch: AttentionBatch,
    heads: int,
    value_dim: int,
    scale: float,
    chosen: Tensor | None = None,
) -> Cost:
    """Over the latents for few queries, over expanded keys and values for many."""
    head_dim, width = q.shape[1] // heads, cache.rank + cache.rope_dim
    flops = read = offset = 0
    for queries, context in zip(batch.host_query_lens, batch.host_context_lens, strict=True):
        seen = sum(context - queries + i + 1 for i in range(queries))
        if chosen is not None:
            seen = min(seen, queries * chosen.shape[1])
        per_token = 2 * kv_b.numel()
        absorbed = seen * heads * 2 * (width + cache.rank) + queries * per_token
        flops += min(absorbed, seen * heads * 2 * (head_dim + value_dim) + context * per_token)
        read += min(context, seen)
        offset += queries
    out = q.shape[0] * heads * value_dim * q.element_size()
    return Cost(nbytes(q, kv_b, chosen) + out + read * cache.bytes_per_token(), flops)


def _latent_attention_cases(dtype: torch.dtype, generator: torch.Generator) -> Iterator[Case]:
    heads, plain, value_dim = 3, 12, 10
    for starts, lengths in (*BATCHES, ([3], [ABSORBED_QUERIES + 4])):
        for rank, form in _FORMS:
            batch, rows = make_batch(starts, lengths), sum(lengths)
            cache = _make_cache(dtype, generator, rank, form)
            q = randn((rows, heads * (plain + cache.rope_dim)), dtype, generator)
            kv_b = randn((heads * (plain + value_dim), cache.rank), dtype, generator, rank**-0.5)
            shape, name = (q, kv_b, cache, batch, heads, value_dim, 0.3), f"starts={starts} lengths={lengths} {form}"
            yield Case(name, (*shape, None))
            # Each sees itself, one other if there is one, and an empty place.
            last = _positions(starts, lengths).int()
            chosen = torch.stack((last, torch.where(last > 0, last - 1, -1), torch.full_like(last, -1)), 1)
            yield Case(f"{name} chosen", (*shape, chosen))


latent_attention = register(
    Op(
        "latent_attention",
        _latent_attention,
        cost=_latent_attention_cost,
        cases=_latent_attention_cases,
        meta=lambda q, kv_b, cache, batch, heads, value_dim, *_: q.new_empty((q.shape[0], heads * value_dim)),
        # A head's output is a sum of products of rounded weights and rounded values.
        tolerance={torch.float32: (1e-4, 1e-4), torch.bfloat16: (2e-2, 3e-2), torch.float16: (4e-3, 4e-3)},
    )
)


def _index_topk(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    positions: Tensor,
    table: Tensor,
    cache: IndexCache,
    batch: AttentionBatch,
    top_k: int,
    scale: float,
    norm: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """The lightning indexer: which earlier tokens each query attends to. -> positions [T, top_k] int32, -1 for none.

    q [T, heads * D], k [T, D]: their first R dimensions are rotated (table [P, R], dimension i with i + R/2), then k is
    cached. The score of a position is the sum over heads of weights [T, heads] * relu(q . k) * scale, in float32; the
    `top_k` best are chosen, all if there are no more. (DeepSeek-V3.2, arXiv:2512.02556, section 2.1. Its Hadamard
    transform of q and k leaves the products as they are and is left out.) A quantized cache keeps each key times a
    scale, by which the score is multiplied. norm, norm_bias [D]: those of the layer_norm
    of k, if that is to be done here.
    """
    if norm is not None and norm_bias is not None:
        k = gates.layer_norm.reference(k, norm, norm_bias, eps)
    rotary, size = table.shape[1], cache.head_dim
    cos, sin = table.index_select(0, positions).to(q.dtype).unsqueeze(1).chunk(2, dim=-1)

    def turned(x: Tensor) -> Tensor:
        first, second, rest = torch.split(x, [rotary // 2, rotary // 2, size - rotary], dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)

    key = turned(k.view(len(k), 1, size)).squeeze(1)
    fresh = (key,) if cache.quantized is None else _quantize(key, cache.quantized)
    for rows, cached in zip(fresh, cache.tensors, strict=True):
        _as_bytes(cached).flatten(0, 1).index_copy_(0, batch.of(cache).slot_mapping, _as_bytes(rows.to(cached.dtype)))
    block_size = cache.tensors[0].shape[1]
    heads = turned(q.view(len(q), -1, size)).float()
    chosen = torch.full((q.shape[0], top_k), -1, dtype=torch.int32, device=q.device)
    offset = 0
    for row, (queries, context) in enumerate(zip(batch.host_query_lens, batch.host_context_lens, strict=True)):
        mine = slice(offset, offset + queries)
        blocks = batch.of(cache).block_tables[row, : -(-context // block_size)]
        known, *scales = (part[:context] for part in _in_blocks(cache, blocks))
        factor = scale * scales[0] if scales else scale
        scores = (heads[mine] @ known.float().T * factor).relu()  # [n, heads, context]
        scores = (weights[mine].float().unsqueeze(1) @ scores).squeeze(1)
        scores = scores.masked_fill(~causal_mask(queries, context, None, q.device), float("-inf"))
        # A stable sort: of equals, and scores of 0 are common, the earlier go first, however the prompt is cut.
        best = scores.sort(dim=-1, descending=True, stable=True)
        values, indices = best.values[:, :top_k], best.indices[:, :top_k]
        chosen[mine, : indices.shape[1]] = indices.int().masked_fill(values == float("-inf"), -1)
        offset += queries
    return chosen


def _index_topk_cost(
    q: Tensor, k: Tensor, weights: Tensor, positions: Tensor, table: Tensor, cache: IndexCache, batch: AttentionBatch,
    top_k: int, scale: float, norm: Tensor | None = None, norm_bias: Tensor | None = None, eps: float = 0.0
) -> Cost:  # fmt: skip
    seen = sum(
        sum(context - queries + i + 1 for i in range(queries))
        for queries, context in zip(batch.host_query_lens, batch.host_context_lens, strict=True)
    )
    read = sum(batch.host_context_lens) * cache.bytes_per_token()
    normed = Cost(nbytes(norm, norm_bias), 0 if norm is None else 7 * k.numel())
    return normed + Cost(nbytes(q, weights) + 2 * nbytes(k) + read + 4 * q.shape[0] * top_k, 2 * seen * q.shape[1])


def _index_topk_cases(dtype: torch.dtype, generator: torch.Generator) -> Iterator[Case]:
    angles = torch.rand((40, 2), generator=generator) * 0.1
    table = torch.cat((angles.cos(), angles.sin()), dim=-1)
    straight = torch.cat((torch.ones_like(angles), torch.zeros_like(angles)), dim=-1)
    for starts, lengths in BATCHES:
        for top_k in (2, 16):
            batch, rows = make_batch(starts, lengths), sum(lengths)
            # Lengths of the keys well apart, so that the order is plain in every dtype.
            sizes = 1.4 ** torch.randperm(48, generator=generator).view(12, 4, 1)
            known = (sizes * (1 + 0.1 * torch.rand((12, 4, 8), generator=generator))).to(dtype)
            cache = IndexCache(8, dtype, known)
            q = (1 + 0.1 * torch.rand((rows, 3 * 8), generator=generator)).to(dtype)
            k = ((1.4 ** torch.randperm(rows, generator=generator) * 0.01).view(-1, 1) * torch.ones(8)).to(dtype)
            weights = (0.5 + torch.rand((rows, 3), generator=generator)).to(dtype)
            arguments = (q, k, weights, _positions(starts, lengths), table, cache, batch, top_k, 0.3)
            label = f"starts={starts} lengths={lengths} k={top_k}"
            yield Case(label, (*arguments, None, None, 0.0), mutated=cache.tensors)
            for form in (torch.int8, torch.float8_e4m3fn):
                values, scales = _quantize(known, form)
                quantized_keys = IndexCache(8, dtype, values, form, scales)
                # Not rotated, so that no other rounding comes before that to the form.
                case = (*arguments[:4], straight, quantized_keys, *arguments[6:], None, None, 0.0)
                yield Case(f"{label} {form}", case, mutated=quantized_keys.tensors)
            # An eps beside which lengths still tell normed keys apart: their columns alternate about a mean of 0.
            normed_keys = IndexCache(8, dtype, known.clone())
            signs = torch.tensor([1.0, -1.0]).repeat(4)
            norm = (
                (signs * (1 + 0.1 * torch.rand(8, generator=generator))).to(dtype),
                torch.full((8,), 0.002).to(dtype),
            )
            longer = 5 * k * signs.to(dtype)
            with_norm = (q, longer, *arguments[2:5], normed_keys, *arguments[6:], *norm, 100.0)
            yield Case(f"{label} norm", with_norm, mutated=normed_keys.tensors)


index_topk = register(
    Op(
        "index_topk",
        _index_topk,
        cost=_index_topk_cost,
        cases=_index_topk_cases,
        meta=lambda q, k, weights, positions, table, cache, batch, top_k, *_: q.new_empty(
            (q.shape[0], top_k), dtype=torch.int32
        ),
    )
)
