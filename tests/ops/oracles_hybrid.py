"""Oracles of the ops that only some architectures use: other norms and gates, routers, latent and linear attention."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from skyline.ops import AttentionBatch, IndexCache, LatentCache, StateCache

from .oracles import ORACLES, moe_experts, oracle, tokens_of


def _place(batch: AttentionBatch, request: int, position: int, block_size: int) -> tuple[int, int]:
    return int(batch.tables[0].block_tables[request, position // block_size]), position % block_size


@oracle
def offset_rms_norm(x: Tensor, weight: Tensor, eps: float) -> list[Tensor]:
    wide = x.double()
    return [torch.stack([row / math.sqrt(float(row @ row) / len(row) + eps) for row in wide]) * (1 + weight.double())]


@oracle
def offset_head_rms_norm(x: Tensor, weight: Tensor, eps: float) -> list[Tensor]:
    heads = x.unflatten(1, (-1, len(weight))).flatten(0, 1)
    return [offset_rms_norm(heads, weight, eps)[0].view(x.shape)]


@oracle
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> list[Tensor]:
    rows = [(row - row.mean()) / math.sqrt(float(row.var(unbiased=False)) + eps) for row in x.double()]
    return [torch.stack(rows) * weight.double() + bias.double()]


@oracle
def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> list[Tensor]:
    heads = x.double().unflatten(1, (-1, len(weight)))
    normed = heads / (heads.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()
    wide = gate.double()
    return [normed.flatten(1) * wide / (1 + (-wide).exp())]


@oracle
def gelu_mul(gate_up: Tensor) -> list[Tensor]:
    gate, up = gate_up.double().chunk(2, dim=1)
    inner = [[math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)) for v in row] for row in gate.tolist()]
    return [0.5 * gate * (1 + torch.tensor(inner, dtype=torch.float64)) * up]


@oracle
def sigmoid_mul(x: Tensor, gate: Tensor) -> list[Tensor]:
    return [x.double() / (1 + (-gate.double()).exp())]


@oracle
def scale(x: Tensor, factor: float) -> list[Tensor]:
    return [x.double() * factor]


@oracle
def router(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    correction: Tensor | None,
    top_k: int,
    scoring: str,
    renormalize: bool,
    factor: float,
    groups: int,
    top_groups: int,
) -> list[Tensor]:
    all_weights, all_ids = [], []
    experts = range(weight.shape[0])
    for row in x.double():
        logits = [float(w @ row) + (float(bias[e]) if bias is not None else 0) for e, w in enumerate(weight.double())]
        if scoring == "sigmoid":
            scores = [1 / (1 + math.exp(-v)) for v in logits]
        elif scoring == "softmax":
            total = sum(math.exp(v) for v in logits)
            scores = [math.exp(v) / total for v in logits]
        else:
            scores = logits
        ranked = [s + (float(correction[e]) if correction is not None else 0) for e, s in enumerate(scores)]
        size = len(ranked) // groups
        best_two = [sum(sorted(ranked[g * size : (g + 1) * size])[-2:]) for g in range(groups)]
        allowed = sorted(range(groups), key=lambda g, key=best_two: -key[g])[:top_groups]  # type: ignore[misc]
        ids = sorted((e for e in experts if e // size in allowed), key=lambda e, key=ranked: -key[e])[:top_k]  # type: ignore[misc]
        chosen = [scores[e] for e in ids]
        if scoring == "softmax of the chosen":
            chosen = [math.exp(v) for v in chosen]
        if renormalize or scoring == "softmax of the chosen":
            chosen = [v / sum(chosen) for v in chosen]
        all_weights.append([v * factor for v in chosen])
        all_ids.append(ids)
    return [torch.tensor(all_weights, dtype=torch.float64), torch.tensor(all_ids)]


@oracle
def moe_experts_clamped(
    x: Tensor,
    gate_up: Tensor,
    gate_up_bias: Tensor,
    down: Tensor,
    down_bias: Tensor,
    weights: Tensor,
    ids: Tensor,
    alpha: float,
    limit: float,
) -> list[Tensor]:
    result = torch.zeros(x.shape, dtype=torch.float64)
    for token in range(x.shape[0]):
        for weight, expert in zip(weights[token].tolist(), ids[token].tolist(), strict=True):
            product = gate_up[expert].double() @ x[token].double() + gate_up_bias[expert].double()
            half = len(product) // 2
            gate = torch.minimum(product[:half], torch.tensor(limit, dtype=torch.float64))
            up = product[half:].clamp(-limit, limit)
            hidden = gate / (1 + (-alpha * gate).exp()) * (up + 1)
            result[token] += weight * (down[expert].double() @ hidden + down_bias[expert].double())
    assert result.shape == moe_experts(x, gate_up, down, weights, ids)[0].shape
    return [result]


def _quantized(row: Tensor, dtype: torch.dtype) -> tuple[Tensor, list[float]]:
    """Each 128 numbers of a row over their scale, in the numbers of the type; the scales. float32, as in memory."""
    values, scales = [], []
    for group in row.float().split(128):
        largest = torch.tensor(max(abs(x) for x in group.tolist()))
        if dtype == torch.int8:
            scales.append(float(largest / torch.tensor(127.0)))
            inverse = torch.tensor(127.0) / largest
            values += [round(float(x * inverse)) for x in group]
        else:
            scale = largest / torch.tensor(448.0)
            scales.append(float(scale))
            values += [float((x / scale).to(dtype)) for x in group]
    return torch.tensor(values, dtype=torch.float64), scales


def _latents(cache: LatentCache) -> tuple[Tensor, Tensor]:
    """What is cached, [blocks, block size, rank] and [.., rope_dim]."""
    if cache.quantized is None:
        return torch.split(cache.tensors[0].double(), [cache.rank, cache.rope_dim], dim=-1)  # type: ignore[return-value]
    values, scales, keys = (part.double() for part in cache.tensors)
    for column in range(cache.rank):
        values[..., column] *= scales[..., column // 128]
    return values, keys


@oracle
def latent_rope_write(
    q: Tensor,
    latent: Tensor,
    k: Tensor,
    positions: Tensor,
    table: Tensor,
    head_dim: int,
    cache: LatentCache,
    batch: AttentionBatch,
    interleaved: bool,
    norm: Tensor | None,
    eps: float,
) -> list[Tensor]:
    if norm is not None:
        (latent,) = ORACLES["rms_norm"](latent, norm, eps)
    half = cache.rope_dim // 2

    def turned(row: list[float], position: int) -> list[float]:
        result = [0.0] * (2 * half)
        for i in range(half):
            cos, sin = float(table[position, i]), float(table[position, half + i])
            first, second = (row[2 * i], row[2 * i + 1]) if interleaved else (row[i], row[half + i])
            result[i], result[half + i] = first * cos - second * sin, second * cos + first * sin
        return result

    expected = [part.double().clone() for part in cache.tensors]
    out = q.double().clone()
    for token, request, position in tokens_of(batch):
        assert positions[token] == position
        place = _place(batch, request, position, expected[0].shape[1])
        key = torch.tensor(turned(k[token].tolist(), position), dtype=torch.float64)
        if cache.quantized is None:
            expected[0][place] = torch.cat((latent[token].double(), key))
        else:
            expected[0][place], scales = _quantized(latent[token], cache.quantized)
            expected[1][place], expected[2][place] = torch.tensor(scales, dtype=torch.float64), key
        for end in range(head_dim, q.shape[1] + 1, head_dim):
            columns = slice(end - cache.rope_dim, end)
            out[token, columns] = torch.tensor(turned(q[token, columns].tolist(), position), dtype=torch.float64)
    return [out, *expected]


@oracle
def latent_attention(
    q: Tensor,
    kv_b: Tensor,
    cache: LatentCache,
    batch: AttentionBatch,
    heads: int,
    value_dim: int,
    scale: float,
    chosen: Tensor | None,
) -> list[Tensor]:
    """Every head's keys and values written out, for every query anew."""
    latents, keys = _latents(cache)
    head_dim = q.shape[1] // heads
    plain = head_dim - cache.rope_dim
    result = torch.empty((q.shape[0], heads * value_dim), dtype=torch.float64)
    for token, request, position in tokens_of(batch):
        seen = range(position + 1) if chosen is None else [p for p in chosen[token].tolist() if p >= 0]
        places = [_place(batch, request, p, keys.shape[1]) for p in seen]
        for head in range(heads):
            rows = kv_b[head * (plain + value_dim) : (head + 1) * (plain + value_dim)].double()
            query = q[token, head * head_dim : (head + 1) * head_dim].double()
            entries = [(rows @ latents[place], keys[place]) for place in places]
            scores = [
                math.exp(scale * float(query[:plain] @ made[:plain] + query[plain:] @ shared))
                for made, shared in entries
            ]
            mixed = sum(score * made[plain:] for score, (made, _) in zip(scores, entries, strict=True))
            result[token, head * value_dim : (head + 1) * value_dim] = mixed / sum(scores)
    return [result]


@oracle
def index_topk(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    positions: Tensor,
    table: Tensor,
    cache: IndexCache,
    batch: AttentionBatch,
    top_k: int,
    scale: float,
    norm: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
) -> list[Tensor]:
    if norm is not None:
        (k,) = ORACLES["layer_norm"](k, norm, norm_bias, eps)
    half = table.shape[1] // 2

    def turned(row: Tensor, position: int) -> Tensor:
        result = row.double().clone()
        for i in range(half):
            cos, sin = float(table[position, i]), float(table[position, half + i])
            result[i] = float(row[i]) * cos - float(row[half + i]) * sin
            result[half + i] = float(row[half + i]) * cos + float(row[i]) * sin
        return result

    keys, *scales = (part.double().clone() for part in cache.tensors)
    result = torch.full((q.shape[0], top_k), -1)
    for token, request, position in tokens_of(batch):
        place, key = _place(batch, request, position, keys.shape[1]), turned(k[token], position)
        if cache.quantized is None:
            keys[place] = key
        else:
            keys[place], (scales[0][place],) = _quantized(key.to(q.dtype), cache.quantized)
    for token, request, position in tokens_of(batch):
        scores = []
        for seen in range(position + 1):
            place = _place(batch, request, seen, keys.shape[1])
            key = keys[place] * scales[0][place] if scales else keys[place]
            heads = q[token].view(-1, cache.head_dim)
            products = [max(0.0, float(turned(head, position) @ key) * scale) for head in heads]
            scores.append(sum(float(w) * p for w, p in zip(weights[token], products, strict=True)))
        order = sorted(range(position + 1), key=lambda p, key=scores: -key[p])[:top_k]  # type: ignore[misc]
        result[token, : len(order)] = torch.tensor(order)
    return [result.int(), keys, *scales]


@oracle
def causal_conv(x: Tensor, weight: Tensor, cache: StateCache, batch: AttentionBatch) -> list[Tensor]:
    conv = cache.tensors[0].double().clone()
    before = conv.clone()
    result = torch.empty_like(x, dtype=torch.float64)
    starts = batch.query_starts.tolist()
    for request, (read, write) in enumerate(zip(batch.state_reads, batch.state_writes, strict=True)):
        window = [row.clone() for row in before[read]] if read >= 0 else [torch.zeros(x.shape[1])] * cache.taps
        for token in range(starts[request], starts[request + 1]):
            window.append(x[token].double())
            total = sum(row * weight[:, tap].double() for tap, row in enumerate(window[-weight.shape[1] :]))
            result[token] = total / (1 + (-total).exp())
        conv[write] = torch.stack(window[-cache.taps :])
    return [result, conv]


@oracle
def gated_delta_rule(
    qkv: Tensor,
    b: Tensor,
    a: Tensor,
    decay: Tensor,
    dt_bias: Tensor,
    key_heads: int,
    cache: StateCache,
    batch: AttentionBatch,
) -> list[Tensor]:
    states = cache.tensors[1].double().clone()
    before = states.clone()
    heads, key_dim, value_dim = cache.shape
    result = torch.empty((qkv.shape[0], heads * value_dim), dtype=torch.float64)
    starts = batch.query_starts.tolist()
    for request, (read, write) in enumerate(zip(batch.state_reads, batch.state_writes, strict=True)):
        for head in range(heads):
            memory = before[read, head].clone() if read >= 0 else torch.zeros(key_dim, value_dim, dtype=torch.float64)
            source = head * key_heads // heads
            for token in range(starts[request], starts[request + 1]):
                row = qkv[token].double()
                q = row[source * key_dim :][:key_dim]
                k = row[(key_heads + source) * key_dim :][:key_dim]
                v = row[2 * key_heads * key_dim + head * value_dim :][:value_dim]
                q, k = (u / math.sqrt(float(u @ u) + 1e-6) for u in (q, k))
                step = math.log1p(math.exp(float(a[token, head]) + float(dt_bias[head])))
                memory = memory * math.exp(-math.exp(float(decay[head])) * step)
                beta = 1 / (1 + math.exp(-float(b[token, head])))
                memory = memory + torch.outer(k, beta * (v - memory.T @ k))
                result[token, head * value_dim : (head + 1) * value_dim] = memory.T @ q / math.sqrt(key_dim)
            states[write, head] = memory
    return [result, states]


@oracle
def moe_sort(x: Tensor, ids: Tensor, experts: int) -> list[Tensor]:
    pairs = sorted((int(expert), token, choice) for token, row in enumerate(ids) for choice, expert in enumerate(row))
    places = torch.empty(ids.shape)
    for place, (_, token, choice) in enumerate(pairs):
        places[token, choice] = place
    offsets = [sum(expert < bound for expert, _, _ in pairs) for bound in range(experts + 1)]
    return [torch.stack([x[token] for _, token, _ in pairs]).double(), torch.tensor(offsets).int(), places.int()]


@oracle
def moe_experts_ragged(rows: Tensor, offsets: Tensor, gate_up: Tensor, down: Tensor) -> list[Tensor]:
    experts = [sum(int(offset) <= row for offset in offsets[1:]) for row in range(rows.shape[0])]
    ids = torch.tensor(experts).view(-1, 1)
    return moe_experts(rows, gate_up, down, torch.ones(ids.shape), ids)


@oracle
def moe_experts_padded(rows: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor) -> list[Tensor]:
    result = torch.zeros(rows.shape, dtype=torch.float64)
    for expert, count in enumerate(counts.tolist()):
        ids = torch.full((count, 1), expert)
        result[expert, :count] = moe_experts(rows[expert, :count], gate_up, down, torch.ones(ids.shape), ids)[0]
    return [result]


@oracle
def moe_combine(rows: Tensor, places: Tensor, weights: Tensor) -> list[Tensor]:
    result = torch.zeros((places.shape[0], rows.shape[1]), dtype=torch.float64)
    for token, (row, factors) in enumerate(zip(places.tolist(), weights.tolist(), strict=True)):
        for place, factor in zip(row, factors, strict=True):
            result[token] += factor * rows[place].double()
    return [result]
