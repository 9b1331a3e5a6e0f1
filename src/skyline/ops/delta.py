"""Ops of linear attention by the gated delta rule (Gated DeltaNet, arXiv:2412.06464), with their state in blocks."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from skyline.ops.attention import BATCHES, make_batch
from skyline.ops.batch import AttentionBatch
from skyline.ops.caches import StateCache
from skyline.ops.contract import Case, Cost, Op, nbytes, randn, register


def _causal_conv(x: Tensor, weight: Tensor, cache: StateCache, batch: AttentionBatch) -> Tensor:
    """x [T, C], weight [C, taps + 1] -> silu of each channel's causal convolution over its request's tokens, [T, C].

    The tokens before this step's are in cache.conv, where the last `taps` inputs are left for the next step.
    """
    conv, _ = cache.tensors
    output = torch.empty_like(x)
    offset = 0
    for queries, read, write in zip(batch.host_query_lens, batch.state_reads, batch.state_writes, strict=True):
        fresh = x[offset : offset + queries]
        before = conv[read].to(x.dtype) if read >= 0 else x.new_zeros((cache.taps, cache.channels))
        line = torch.cat((before, fresh))
        product = F.conv1d(line.T.unsqueeze(0), weight.unsqueeze(1), groups=cache.channels)
        output[offset : offset + queries] = F.silu(product[0].T)
        conv[write] = line[queries:].to(conv.dtype)
        offset += queries
    return output


def _gated_delta_rule(
    qkv: Tensor,
    b: Tensor,
    a: Tensor,
    decay: Tensor,
    dt_bias: Tensor,
    key_heads: int,
    cache: StateCache,
    batch: AttentionBatch,
) -> Tensor:
    """qkv [T, 2 * key_heads * Dk + heads * Dv] = q | k | v; b, a [T, heads] -> [T, heads * Dv].

    For each head, with q and k of unit length, a memory S [Dk, Dv] and
    g = -exp(decay) * softplus(a + dt_bias), beta = sigmoid(b), in float32 and token by token:

        S <- exp(g) S;  S <- S + k (beta (v - k^T S))^T;  output = (q / sqrt(Dk))^T S

    decay, dt_bias [heads]. Each of the key_heads serves heads / key_heads neighbouring heads. S is read from and
    written to cache.state.
    """
    _, states = cache.tensors
    heads, key_dim, value_dim = cache.shape
    q, k, v = torch.split(qkv.float(), [key_heads * key_dim, key_heads * key_dim, heads * value_dim], dim=-1)
    share = heads // key_heads
    q, k = (_unit(x.view(len(x), key_heads, key_dim)).repeat_interleave(share, dim=1) for x in (q, k))
    q = q * key_dim**-0.5
    v = v.view(len(v), heads, value_dim)
    shrink = (-decay.float().exp() * F.softplus(a.float() + dt_bias.float())).exp()
    beta = b.float().sigmoid()
    output = v.new_empty(v.shape)
    offset = 0
    for queries, read, write in zip(batch.host_query_lens, batch.state_reads, batch.state_writes, strict=True):
        state = states[read].clone() if read >= 0 else states.new_zeros(cache.shape)
        for token in range(offset, offset + queries):
            state *= shrink[token].view(-1, 1, 1)
            known = torch.bmm(k[token].unsqueeze(1), state)  # [heads, 1, Dv]
            change = (v[token].unsqueeze(1) - known) * beta[token].view(-1, 1, 1)
            state += k[token].unsqueeze(2) * change
            output[token] = torch.bmm(q[token].unsqueeze(1), state).squeeze(1)
        states[write] = state
        offset += queries
    result: Tensor = output.flatten(1).to(qkv.dtype)
    return result


def _unit(x: Tensor) -> Tensor:
    length = torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)
    return x * length


def _make_cache(dtype: torch.dtype, generator: torch.Generator) -> StateCache:
    heads, key_dim, value_dim, channels = 4, 8, 6, 2 * 2 * 8 + 4 * 6
    conv = randn((12, 3, channels), dtype, generator)
    state = randn((12, heads, key_dim, value_dim), torch.float32, generator)
    return StateCache(3, channels, heads, key_dim, value_dim, dtype, conv, state)


def _batch(starts: list[int], lengths: list[int]) -> AttentionBatch:
    """The second request, if there is one, keeps its old state and writes another."""
    batch = make_batch(starts, lengths)
    if len(starts) > 1:
        batch.state_writes[1] = 0
    return batch


def _causal_conv_cases(dtype: torch.dtype, generator: torch.Generator) -> Iterator[Case]:
    for starts, lengths in BATCHES:
        cache = _make_cache(dtype, generator)
        x, weight = (
            randn((sum(lengths), cache.channels), dtype, generator),
            randn((cache.channels, 4), dtype, generator),
        )
        arguments = (x, weight, cache, _batch(starts, lengths))
        yield Case(f"starts={starts} lengths={lengths}", arguments, mutated=cache.tensors[:1])


causal_conv = register(
    Op(
        "causal_conv",
        _causal_conv,
        cost=lambda x, weight, cache, batch: Cost(
            2 * nbytes(x) + nbytes(weight) + 2 * len(batch.state_reads) * cache.taps * x.shape[1] * x.element_size(),
            x.numel() * (2 * weight.shape[1] + 4),
        ),
        cases=_causal_conv_cases,
        meta=lambda x, *_: x.new_empty(x.shape),
        tolerance={torch.float32: (1e-5, 1e-5), torch.bfloat16: (1.6e-2, 2e-2), torch.float16: (2e-3, 2e-3)},
    )
)


def _gated_delta_rule_cases(dtype: torch.dtype, generator: torch.Generator) -> Iterator[Case]:
    for starts, lengths in BATCHES:
        cache, rows = _make_cache(dtype, generator), sum(lengths)
        qkv = randn((rows, cache.channels), dtype, generator)
        b, a = (randn((rows, 4), dtype, generator) for _ in range(2))
        decay, dt_bias = (randn((4,), dtype, generator, 0.5) for _ in range(2))
        arguments = (qkv, b, a, decay, dt_bias, 2, cache, _batch(starts, lengths))
        yield Case(f"starts={starts} lengths={lengths}", arguments, mutated=cache.tensors[1:])


gated_delta_rule = register(
    Op(
        "gated_delta_rule",
        _gated_delta_rule,
        cost=lambda qkv, b, a, decay, dt_bias, key_heads, cache, batch: Cost(
            2 * nbytes(qkv)
            + nbytes(b, a)
            + 2 * len(batch.state_reads) * 4 * cache.heads * cache.key_dim * cache.value_dim,
            7 * qkv.shape[0] * math.prod(cache.shape),
        ),
        cases=_gated_delta_rule_cases,
        meta=lambda qkv, b, a, decay, dt_bias, key_heads, cache, batch: qkv.new_empty(
            (qkv.shape[0], cache.heads * cache.value_dim)
        ),
        tolerance={torch.float32: (1e-4, 1e-4), torch.bfloat16: (1.6e-2, 2e-2), torch.float16: (2e-3, 2e-3)},
    )
)
