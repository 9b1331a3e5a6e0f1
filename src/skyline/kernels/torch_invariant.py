"""Batch-invariant kernels in plain torch: a row's result has the same bits whatever else is in the batch.

Every product is done in tiles of one fixed shape, padded where rows run out, so BLAS reduces in one fixed order.
Attention walks over keys in fixed tiles with an online softmax (arXiv:2205.14135); a key tile that a query may not see
adds exact zeros. docs/architecture.md says what that costs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from skyline import ops
from skyline.kernels.registry import Kernel, Request, register
from skyline.ops import AttentionBatch, KVCache
from skyline.ops.attention import gather

ROW_TILE = 16
KEY_TILE = 128


def _pad_rows(x: Tensor, multiple: int) -> Tensor:
    return F.pad(x, (0, 0, 0, -x.shape[0] % multiple))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, silu_mul: bool = False) -> Tensor:
    if x.shape[0] == 0:
        return x.new_empty((0, weight.shape[0]))
    tiles = [F.linear(tile, weight, bias) for tile in torch.split(_pad_rows(x, ROW_TILE), ROW_TILE)]
    y = (torch.cat(tiles) if len(tiles) > 1 else tiles[0])[: x.shape[0]]
    activated: Tensor = ops.silu_mul.reference(y) if silu_mul else y
    return activated


def moe_experts(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    # One choice after the other: each token adds its experts in its own order, not in the order of the batch.
    output = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for choice in range(ids.shape[1]):
        chosen = ids[:, choice]
        for expert in torch.unique(chosen).tolist():
            rows = (chosen == expert).nonzero().squeeze(1)
            gate, up = linear(x.index_select(0, rows), gate_up[expert]).chunk(2, dim=-1)
            hidden = linear(F.silu(gate) * up, down[expert])
            output[rows] += hidden.float() * weights[rows, choice].unsqueeze(1)
    return output.to(x.dtype)


def paged_attention(
    q: Tensor,
    cache: KVCache,
    batch: AttentionBatch,
    scale: float,
    window: int | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    block_size, head_dim, kv_heads = cache.tensors[0].shape[1], cache.head_dim, cache.num_kv_heads
    output = torch.empty_like(q)
    extra = None if sinks is None else sinks.float().view(kv_heads, -1, 1, 1)
    offset = 0
    for row, (queries, context) in enumerate(zip(batch.host_query_lens, batch.host_context_lens, strict=True)):
        padding = -context % KEY_TILE
        blocks = batch.of(cache).block_tables[row, : -(-context // block_size)]
        k, v = (
            F.pad(part[:context], (0, 0, 0, 0, 0, padding)).transpose(0, 1).float() for part in gather(cache, blocks)
        )
        for first in range(0, queries, ROW_TILE):
            count = min(ROW_TILE, queries - first)
            tile = q[offset + first : offset + first + count].view(count, kv_heads, -1, head_dim).float()
            tile = F.pad(tile, (0, 0, 0, 0, 0, 0, 0, ROW_TILE - count))  # [ROW_TILE, Hk, G, D]
            positions = torch.arange(ROW_TILE, device=q.device) + (context - queries + first)
            out = _attend(tile.permute(1, 2, 0, 3), k, v, positions, scale, window, extra, softcap)
            output[offset + first : offset + first + count] = out[:count].to(q.dtype)
        offset += queries
    return output


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    scale: float,
    window: int | None,
    sinks: Tensor | None,
    softcap: float | None,
) -> Tensor:
    """q [Hk, G, ROW_TILE, D], k and v [Hk, n * KEY_TILE, D], positions [ROW_TILE] -> [ROW_TILE, Hk * G * D]."""
    best = torch.full((*q.shape[:-1], 1), -1e30, device=q.device)  # finite: a row that sees nothing yet stays defined
    total = torch.zeros_like(best)
    output = torch.zeros_like(q)
    last = int(positions[-1])  # of the padded tile, so that rows beyond the queries see at least what is there
    for start in range(0, min(k.shape[1], last + 1), KEY_TILE):
        tile = slice(start, start + KEY_TILE)
        visible = torch.arange(start, start + KEY_TILE, device=q.device) <= positions.unsqueeze(1)
        if window is not None:
            visible &= torch.arange(start, start + KEY_TILE, device=q.device) > positions.unsqueeze(1) - window
        scores = torch.matmul(q, k[:, tile].unsqueeze(1).transpose(-1, -2)) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~visible, float("-inf"))
        new_best = torch.maximum(best, scores.amax(-1, keepdim=True))
        weights = torch.exp(scores - new_best)
        shrink = torch.exp(best - new_best)
        total = total * shrink + weights.sum(-1, keepdim=True)
        output = output * shrink + torch.matmul(weights, v[:, tile].unsqueeze(1))
        best = new_best
    if sinks is not None:
        new_best = torch.maximum(best, sinks)
        shrink = torch.exp(best - new_best)
        total, output = total * shrink + torch.exp(sinks - new_best), output * shrink
    return (output / total).permute(2, 0, 1, 3).flatten(1)


def _supports(request: Request) -> str | None:
    if not request.batch_invariant:
        return "slower; only used when batch invariance is asked for"
    return None if request.device == "cpu" else f"batch invariance was never verified on {request.device}"


for _run in (linear, moe_experts, paged_attention):
    register(Kernel(_run.__name__, "torch-invariant", _run, _supports))
