"""Decoding with multi-head latent attention: over the latents themselves, W_k and W_v moved to the query's side."""

from __future__ import annotations

import flashinfer.mla
import torch
import torch.nn.functional as F
from torch import Tensor

from skyline.kernels.flashinfer import calls, step
from skyline.kernels.flashinfer.trials import checked
from skyline.kernels.triton import latent as triton
from skyline.ops import AttentionBatch, LatentCache

_PLAIN, _RANK, _ROPE = 128, 512, 64  # DeepSeek-V2's and V3's
_BLOCK_SIZES = (32, 64)
_TABLE_TOKENS = 128  # a multiple of which a row of a block table must cover


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
    data = cache.tensors[0]
    plain = q.shape[1] // heads - cache.rope_dim
    mine = step.of(batch)
    made_for = (plain, cache.rank, cache.rope_dim) == (_PLAIN, _RANK, _ROPE) and data.shape[1] in _BLOCK_SIZES
    if chosen is not None or not mine.decodes or not made_for or not q.shape[0] or data.dtype != q.dtype:
        return triton.latent_attention(q, kv_b, cache, batch, heads, value_dim, scale, chosen)

    def decode() -> Tensor:
        return _decode(q, kv_b, cache, batch, heads, value_dim, scale)

    kind = ("decoding with latents of", cache.rank, "by", heads, "heads, blocks of", data.shape[1], q.dtype)
    return checked(
        kind, decode, lambda: triton.latent_attention(q, kv_b, cache, batch, heads, value_dim, scale, chosen)
    )


def _decode(
    q: Tensor, kv_b: Tensor, cache: LatentCache, batch: AttentionBatch, heads: int, value_dim: int, scale: float
) -> Tensor:
    data = cache.tensors[0]
    plain = q.shape[1] // heads - cache.rope_dim
    w_k, w_v = torch.split(kv_b.view(heads, plain + value_dim, cache.rank), [plain, value_dim], dim=1)
    q_plain, q_turned = torch.split(q.view(-1, heads, plain + cache.rope_dim), [plain, cache.rope_dim], dim=2)
    absorbed = torch.bmm(q_plain.transpose(0, 1), w_k).transpose(0, 1)  # [R, heads, rank]
    query = torch.cat((absorbed, q_turned), -1).unsqueeze(1)
    tables = batch.of(cache).block_tables
    tables = F.pad(tables, (0, -tables.shape[1] % (_TABLE_TOKENS // data.shape[1])))
    lengths, padding = step.of(batch).lengths()
    memory = step.workspace("decode", q.device)
    mixed = flashinfer.mla.trtllm_batch_decode_with_kv_cache_mla(
        **calls.latent_decode(query, data, memory, tables, lengths, plain, cache.rank, scale)
    )
    out = torch.bmm(mixed.view(-1, heads, cache.rank).transpose(0, 1), w_v.transpose(1, 2))  # [heads, R, value_dim]
    return out.transpose(0, 1).reshape(-1, heads * value_dim).masked_fill_(padding, 0)
