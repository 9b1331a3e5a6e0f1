"""Every op once more, the slow and obvious way in float64, sharing no code with the references.

An oracle takes the op's arguments and returns what the op should: a list of its outputs, or, for an op that works by
its side effect, what the tensors it writes should hold afterwards. It leaves its arguments alone.
"""

from __future__ import annotations

import cmath
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from skyline.ops import AttentionBatch, KVCache, QuantizedWeight

ORACLES: dict[str, Callable[..., list[Tensor]]] = {}


def oracle(function: Callable[..., list[Tensor]]) -> Callable[..., list[Tensor]]:
    ORACLES[function.__name__] = function
    return function


@oracle
def embedding(ids: Tensor, weight: Tensor) -> list[Tensor]:
    return [torch.stack([weight[i] for i in ids.tolist()]).double()]


@oracle
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, activated: bool = False) -> list[Tensor]:
    rows = [[(row * column).sum() for column in weight.double()] for row in x.double()]
    result = torch.tensor(rows, dtype=torch.float64)
    result = result if bias is None else result + bias.double()
    return silu_mul(result) if activated else [result]


@oracle
def linear_int8_weight_only(
    x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None, activated: bool = False
) -> list[Tensor]:
    return _finished(x.double().numpy() @ _dequantized(weight).T, bias, activated)


@oracle
def linear_int4_weight_only(x: Tensor, weight: QuantizedWeight, *rest: Any) -> list[Tensor]:
    return linear_int8_weight_only(x, weight, *rest)


@oracle
def linear_int4(
    x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None, activated: bool = False
) -> list[Tensor]:
    assert weight.group is not None
    group, wide, rounded = weight.group, x.float().numpy(), np.empty(x.shape)
    for row in range(wide.shape[0]):
        for start in range(0, wide.shape[1], group):
            part = wide[row, start : start + group]
            largest = np.abs(part).max()
            # In float32, like the op: a tie that falls the other way would change an integer.
            levels = np.rint(part * (np.float32(127) / largest)) if largest else np.zeros_like(part)
            rounded[row, start : start + group] = levels.astype(np.float64) * (float(largest) / 127)
    return _finished(rounded @ _dequantized(weight).T, bias, activated)


@oracle
def linear_int8(
    x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None, activated: bool = False
) -> list[Tensor]:
    rows = []
    for row in x.float().numpy():
        largest = np.abs(row).max()
        # In float32, like the op: a tie that falls the other way would change an integer.
        levels = np.rint(row * (np.float32(127) / largest)) if largest else np.zeros_like(row)
        products = weight.values.numpy().astype(np.int64) @ levels.astype(np.int64)
        rows.append(products * (float(largest) / 127) * weight.scales.double().numpy())
    return _finished(np.stack(rows), bias, activated)


def _dequantized(weight: QuantizedWeight) -> np.ndarray:
    values, scales = weight.values.double().numpy(), weight.scales.double().numpy()
    if weight.group is None:
        return values * scales[:, None]
    group = np.arange(values.shape[1]) // weight.group
    zeros = 0.0 if weight.zeros is None else weight.zeros.double().numpy()[:, group]
    return (values - zeros) * scales[:, group]


def _finished(product: np.ndarray, bias: Tensor | None, activated: bool) -> list[Tensor]:
    result = torch.from_numpy(product if bias is None else product + bias.double().numpy())
    return silu_mul(result) if activated else [result]


@oracle
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> list[Tensor]:
    rows = x.double().reshape(-1, x.shape[-1])
    normed = [row / math.sqrt(sum(value * value for value in row.tolist()) / len(row) + eps) for row in rows]
    return [(torch.stack(normed) * weight.double()).reshape(x.shape)]


@oracle
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> list[Tensor]:
    total = x.double() + residual.double()
    return [*rms_norm(total, weight, eps), total]


@oracle
def head_rms_norm(x: Tensor, weight: Tensor, eps: float) -> list[Tensor]:
    heads = [rms_norm(head, weight, eps)[0] for head in x.split(weight.shape[0], dim=1)]
    return [torch.cat(heads, dim=1)]


@oracle
def silu_mul(gate_up: Tensor) -> list[Tensor]:
    half = gate_up.shape[1] // 2
    rows = [[_silu(row[i]) * row[half + i] for i in range(half)] for row in gate_up.tolist()]
    return [torch.tensor(rows, dtype=torch.float64)]


def _silu(value: float) -> float:
    return value / (1 + math.exp(-value))


@oracle
def add(x: Tensor, y: Tensor) -> list[Tensor]:
    return [x.double() + y.double()]


@oracle
def split(x: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [x[:, end - size : end].double() for size, end in zip(sizes, ends, strict=True)]


@oracle
def select_rows(x: Tensor, rows: Tensor) -> list[Tensor]:
    picked = [x[i].double() for i in rows.tolist()]
    return [torch.stack(picked) if picked else torch.empty((0, x.shape[1]), dtype=torch.float64)]


@oracle
def rope(q: Tensor, k: Tensor, positions: Tensor, table: Tensor, head_dim: int) -> list[Tensor]:
    return [_rotated(q, positions, table, head_dim), _rotated(k, positions, table, head_dim)]


def _rotated(x: Tensor, positions: Tensor, table: Tensor, head_dim: int) -> Tensor:
    """Each pair (i, i + half) of a head's values is a complex number, turned by the angle of its plane."""
    result = x.double().clone()
    half = table.shape[1] // 2
    for token, position in enumerate(positions.tolist()):
        for head in range(0, x.shape[1], head_dim):
            for i in range(half):
                turn = complex(table[position, i], table[position, half + i])
                assert abs(abs(turn) - 1) < 1e-5 and cmath.isfinite(turn)
                value = complex(x[token, head + i], x[token, head + half + i]) * turn
                result[token, head + i], result[token, head + half + i] = value.real, value.imag
    return result


@oracle
def rope_kv_write(
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    positions: Tensor,
    table: Tensor,
    cache: KVCache,
    batch: AttentionBatch,
) -> list[Tensor]:
    width = cache.num_kv_heads * cache.head_dim
    q, k, v = qkv[:, : -2 * width], qkv[:, -2 * width : -width], qkv[:, -width:]
    q = q if q_norm is None else head_rms_norm(q, q_norm, eps)[0]
    k = k if k_norm is None else head_rms_norm(k, k_norm, eps)[0]
    q, k = rope(q, k, positions, table, cache.head_dim)
    return [q, *kv_write(k, v, cache, batch)]


def tokens_of(batch: AttentionBatch) -> Iterator[tuple[int, int, int]]:
    """(token, request, position) of every token of a batch, from its device tensors alone."""
    starts, contexts = batch.query_starts.tolist(), batch.context_lens.tolist()
    for request, context in enumerate(contexts):
        for token in range(starts[request], starts[request + 1]):
            yield token, request, context - (starts[request + 1] - token)


@oracle
def kv_write(k: Tensor, v: Tensor, cache: KVCache, batch: AttentionBatch) -> list[Tensor]:
    expected = [cached.double().clone() for cached in cache.tensors]
    block_size = expected[0].shape[1]
    for token, request, position in tokens_of(batch):
        block = int(batch.tables[0].block_tables[request, position // block_size])
        for cached, fresh in zip(expected, (k, v), strict=True):
            for head in range(cache.num_kv_heads):
                columns = fresh[token, head * cache.head_dim : (head + 1) * cache.head_dim]
                cached[block, position % block_size, head] = columns.double()
    return expected


@oracle
def paged_attention(
    q: Tensor,
    cache: KVCache,
    batch: AttentionBatch,
    scale: float,
    window: int | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
) -> list[Tensor]:
    keys, values = (cached.double() for cached in cache.tensors)
    block_size, head_dim = keys.shape[1], cache.head_dim
    heads = q.shape[1] // head_dim
    result = torch.empty_like(q, dtype=torch.float64)
    for token, request, position in tokens_of(batch):
        places = [
            (int(batch.tables[0].block_tables[request, seen // block_size]), seen % block_size)
            for seen in range(position + 1)
            if window is None or seen > position - window
        ]
        for head in range(heads):
            columns = slice(head * head_dim, (head + 1) * head_dim)
            kv_head = head // (heads // cache.num_kv_heads)
            logits = [scale * float(q[token, columns].double() @ keys[b, o, kv_head]) for b, o in places]
            if softcap is not None:
                logits = [softcap * math.tanh(logit / softcap) for logit in logits]
            scores = [math.exp(logit) for logit in logits]
            mixed = sum(score * values[b, o, kv_head] for score, (b, o) in zip(scores, places, strict=True))
            result[token, columns] = mixed / (sum(scores) + (0 if sinks is None else math.exp(sinks[head])))
    return [result]


@oracle
def topk_router(logits: Tensor, top_k: int, renormalize: bool) -> list[Tensor]:
    weights, ids = [], []
    for row in logits.tolist():
        order = sorted(range(len(row)), key=lambda expert, row=row: -row[expert])[:top_k]  # type: ignore[misc]
        over = order if renormalize else range(len(row))
        total = sum(math.exp(row[expert]) for expert in over)
        weights.append([math.exp(row[expert]) / total for expert in order])
        ids.append(order)
    return [torch.tensor(weights, dtype=torch.float64), torch.tensor(ids)]


@oracle
def moe_experts(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, ids: Tensor) -> list[Tensor]:
    result = torch.zeros(x.shape, dtype=torch.float64)
    for token in range(x.shape[0]):
        for weight, expert in zip(weights[token].tolist(), ids[token].tolist(), strict=True):
            hidden = silu_mul((gate_up[expert].double() @ x[token].double()).unsqueeze(0))[0][0]
            result[token] += weight * (down[expert].double() @ hidden)
    return [result]


@oracle
def moe_experts_int8(x: Tensor, gate_up: QuantizedWeight, down: QuantizedWeight, *chosen: Tensor) -> list[Tensor]:
    return _quantized_experts(linear_int8, x, gate_up, down, *chosen)


@oracle
def moe_experts_int8_weight_only(
    x: Tensor, gate_up: QuantizedWeight, down: QuantizedWeight, *chosen: Tensor
) -> list[Tensor]:
    return _quantized_experts(linear_int8_weight_only, x, gate_up, down, *chosen)


@oracle
def moe_experts_int4(x: Tensor, gate_up: QuantizedWeight, down: QuantizedWeight, *chosen: Tensor) -> list[Tensor]:
    return _quantized_experts(linear_int4, x, gate_up, down, *chosen)


@oracle
def moe_experts_int4_weight_only(
    x: Tensor,
    gate_up: QuantizedWeight,
    down: QuantizedWeight,
    weights: Tensor,
    ids: Tensor,
    residual: Tensor | None = None,
) -> list[Tensor]:
    (result,) = _quantized_experts(linear_int4_weight_only, x, gate_up, down, weights, ids)
    return [result if residual is None else result + residual.double()]


def _quantized_experts(
    linear: Callable[..., list[Tensor]],
    x: Tensor,
    gate_up: QuantizedWeight,
    down: QuantizedWeight,
    weights: Tensor,
    ids: Tensor,
) -> list[Tensor]:
    def matrix(weight: QuantizedWeight, expert: int) -> QuantizedWeight:
        zeros = None if weight.zeros is None else weight.zeros[expert]
        return QuantizedWeight(weight.values[expert], weight.scales[expert], zeros, weight.group)

    result = torch.zeros(x.shape, dtype=torch.float64)
    for token in range(x.shape[0]):
        for weight, expert in zip(weights[token].tolist(), ids[token].tolist(), strict=True):
            (hidden,) = linear(x[token : token + 1], matrix(gate_up, expert), None, True)
            (added,) = linear(hidden.to(x.dtype), matrix(down, expert), None, False)
            result[token] += weight * added[0]
    return [result]


def as_list(result: Any) -> list[Tensor]:
    """An op's return value as a list of its outputs."""
    return [] if result is None else [result] if isinstance(result, Tensor) else list(result)
