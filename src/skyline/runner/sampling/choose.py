"""Choosing tokens from processed logits, many rows at once, each row a pure function of itself.

A row's weights are exp(logit - max), rounded down to a multiple of 1/S where S * V <= 2**53. Sums of such numbers are
exact in float64, so they do not depend on the order of addition: the same row gives the same token alone or in a batch,
sorted or not, on one thread or many. What the rounding drops is under V/S of the largest weight (4e-6 at V = 151936),
less than float32 logits are accurate to. A token of weight zero can never be chosen.

Filters mean what they mean in vLLM and transformers, in this order: min_p (Nguyen et al. 2024), top_k, top_p (nucleus,
Holtzman et al. 2020, over what the first two left). Equal logits are ranked by lower token id first, so top_k keeps
exactly k tokens. Every function may overwrite its logits.

Where there are kernels for it, compiled ones for the CPU or Triton's for the GPU, `choose_mixed` does all of it for
rows of any mix of parameters. The other functions are torch, for other devices and for comparison; exp may differ in
its last bit between them.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from skyline.kernels.cpu import native, sampling
from skyline.kernels.gpu import OLDEST, detect
from skyline.kernels.triton import or_in_torch
from skyline.ops.batch import to_device

MAX_TOP_K = 1024  # the largest top_k found by selection; larger ones sort the row
NUCLEUS_CANDIDATES = 1024  # top_p looks here first, and sorts the row only if they hold too little mass
_BLOCK = 256


def weight_scale(vocab_size: int) -> float:
    """S above: the largest power of two, at most 2**40, with S * vocab_size <= 2**53."""
    return 2.0 ** min(40, 53 - math.ceil(math.log2(max(vocab_size, 2))))


def is_native(logits: Tensor) -> bool:
    """Whether `choose_native` takes these logits [R, V]."""
    return (
        logits.device.type == "cpu" and logits.dtype in (torch.float32, torch.bfloat16) and native.available() != "none"
    )


def is_triton(logits: Tensor) -> bool:
    """Whether Triton's kernels take these logits [R, V]."""
    if not logits.is_cuda:
        return False
    gpu = detect(logits.device.index or 0)
    return gpu.capability >= OLDEST and "triton" in gpu.libraries


def takes_mixed(logits: Tensor) -> bool:
    """Whether `choose_mixed` takes these logits [R, V]."""
    return is_native(logits) or is_triton(logits)


def choose_mixed(logits: Tensor, numbers: NDArray[np.float64]) -> tuple[Tensor, Tensor]:
    """As `choose_native`, on the CPU or on a GPU, for which it does not wait."""
    if is_native(logits):
        return choose_native(logits, numbers)
    from skyline.kernels.triton.sampling import choose_tokens

    there = to_device(np.ascontiguousarray(numbers), logits.device)
    return or_in_torch("choosing tokens", lambda: choose_tokens(logits, there), lambda: _choose_slowly(logits, there))


def choose_native(logits: Tensor, numbers: NDArray[np.float64]) -> tuple[Tensor, Tensor]:
    """Tokens [R] int64 and each row's largest scaled logit [R] float32, of logits [R, V] as `is_native` takes them.

    numbers [5, R]: temperature, top_k (1: greedy; V or more: off), top_p, min_p, u. The logits stay as they are; where
    the largest is not finite the token is arbitrary.
    """
    return sampling.choose_tokens(logits, torch.from_numpy(np.ascontiguousarray(numbers)))


def greedy(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens [R] int64 (lowest id among equals) and their logits [R] float32 of `logits` [R, V] of any float dtype."""
    if is_native(logits):
        return sampling.choose_tokens(logits, None)
    if is_triton(logits):
        from skyline.kernels.triton import sampling as on_gpu

        return or_in_torch("greedy choice", lambda: on_gpu.greedy(logits), lambda: _largest(logits))
    return _largest(logits)


def _largest(logits: Tensor) -> tuple[Tensor, Tensor]:
    values, tokens = logits.max(dim=-1)
    return tokens, values.float()


def _choose_slowly(logits: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """`choose_native` in torch, on any device without waiting for it; numbers as there, on the device."""
    temperature, top_k, top_p, min_p, u = numbers.unsqueeze(-1)
    temperature, top_k, min_p = temperature.float(), top_k.long(), min_p.float()
    unsorted, tops = draw_unsorted(logits.to(torch.float32, copy=True), temperature, min_p, u)
    tokens, _ = draw_sorted(logits.to(torch.float32, copy=True), temperature, top_k, top_p, min_p, u)
    everything = (top_k >= logits.shape[1]) & (top_p >= 1)
    return torch.where(everything.squeeze(1), unsorted, tokens), tops


def draw_unsorted(logits: Tensor, temperature: Tensor, min_p: Tensor | None, u: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse CDF over all tokens in the order of their ids; no sort.

    logits [R, V] float32; temperature, min_p [R, 1] float32 (min_p None: off for all rows); u [R, 1] float64.
    Returns tokens [R] int64 and each row's largest scaled logit [R]; where that is not finite the token is arbitrary.
    """
    logits.div_(temperature)
    top = logits.amax(dim=-1, keepdim=True)
    weights = _weights(logits.sub_(top), min_p, logits.shape[1])
    return _invert_cdf(weights, u), top.squeeze(1)


def draw_top_k(
    logits: Tensor, temperature: Tensor, top_k: Tensor, limit: int, top_p: Tensor, min_p: Tensor | None, u: Tensor
) -> tuple[Tensor, Tensor]:
    """As `draw_unsorted`, with top_k [R, 1] int64, each at most `limit`, and top_p [R, 1] float64."""
    logits.div_(temperature)
    values, ids = top_candidates(logits, min(limit, logits.shape[1]))
    weights = _weights(values - values[:, :1], min_p, logits.shape[1])
    weights.masked_fill_(torch.arange(weights.shape[1], device=weights.device) >= top_k, 0.0)
    tokens, _ = _draw_nucleus(weights, ids, weights.sum(-1, keepdim=True, dtype=torch.float64), top_p, u)
    return tokens, logits.amax(dim=-1)


def draw_top_p(
    logits: Tensor, temperature: Tensor, top_p: Tensor, min_p: Tensor | None, u: Tensor
) -> tuple[Tensor, Tensor]:
    """As `draw_unsorted`, with top_p [R, 1] float64 and no top_k.

    Looks at the NUCLEUS_CANDIDATES most likely tokens and sorts only rows whose nucleus is larger. Knowing which rows
    those are is the one place where choosing waits for the device.
    """
    vocab_size = logits.shape[1]
    logits.div_(temperature)
    values, ids = top_candidates(logits, min(NUCLEUS_CANDIDATES, vocab_size))
    top = logits.amax(dim=-1, keepdim=True)
    total = _weights(logits - top, min_p, vocab_size).sum(-1, keepdim=True, dtype=torch.float64)
    weights = _weights(values - top, min_p, vocab_size)
    tokens, reached = _draw_nucleus(weights, ids, total, top_p, u)
    if values.shape[1] < vocab_size:
        # A NaN row compares false, and is not worth a sort: its token does not matter.
        rows = (~reached & top.isfinite()).squeeze(1).nonzero().squeeze(1)
        if rows.numel():
            values, ids = sort_candidates(logits[rows])
            weights = _weights(values - values[:, :1], None if min_p is None else min_p[rows], vocab_size)
            tokens[rows], _ = _draw_nucleus(weights, ids, total[rows], top_p[rows], u[rows])
    return tokens, top.squeeze(1)


def draw_sorted(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor | None, u: Tensor
) -> tuple[Tensor, Tensor]:
    """As `draw_top_k` for any top_k, by sorting the rows."""
    logits.div_(temperature)
    values, ids = sort_candidates(logits)
    weights = _weights(values - values[:, :1], min_p, logits.shape[1])
    weights.masked_fill_(torch.arange(weights.shape[1], device=weights.device) >= top_k, 0.0)
    tokens, _ = _draw_nucleus(weights, ids, weights.sum(-1, keepdim=True, dtype=torch.float64), top_p, u)
    return tokens, logits.amax(dim=-1)


def top_candidates(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of `logits` [R, V] float32: values [R, k] and ids [R, k], by value, lower id first among equals.

    Where a NaN comes is not defined, so callers look for one themselves (amax keeps it).

    torch.topk promises nothing about which of equal values it takes. Unique integer keys settle it. On the CPU, where
    making them costs more than the selection, a few values too many are taken instead: unless all of those equal the
    k-th, every token that equals it is among them. Looking is free there; on a GPU it would wait for the device.
    """
    taken = k + max(64, k // 4)
    if taken >= logits.shape[1]:
        values, ids = sort_candidates(logits)
        return values[:, :k], ids[:, :k]
    if logits.device.type != "cpu":
        ids = _key_ids(_keys(logits).topk(k, dim=-1).values)
        return logits.gather(1, ids), ids
    values, ids = logits.topk(taken, dim=-1)
    ids, order = ids.sort(dim=-1)
    values, order = values.gather(1, order).sort(dim=-1, descending=True, stable=True)
    values, ids, last = values[:, :k].contiguous(), ids.gather(1, order)[:, :k], values[:, -1]
    tied = (values[:, -1] == last).nonzero().squeeze(1)
    if tied.numel():
        ids[tied] = _key_ids(_keys(logits[tied]).topk(k, dim=-1).values)
        values[tied] = logits[tied].gather(1, ids[tied])
    return values, ids


def sort_candidates(logits: Tensor) -> tuple[Tensor, Tensor]:
    """`top_candidates` for k = V."""
    keys = _keys(logits)
    if logits.device.type == "cpu":
        # numpy's vectorised integer sort is some twenty times as fast as torch.sort.
        keys = torch.from_numpy(np.sort(keys.numpy(), axis=-1)).flip(-1)
    else:
        keys = keys.sort(dim=-1, descending=True).values
    ids = _key_ids(keys)
    return logits.gather(1, ids), ids


def _keys(logits: Tensor) -> Tensor:
    """int64 keys that order as (value, -id): the float's bits made monotonic above, the complemented id below.

    Adding zero first turns -0.0 into 0.0, which are equal as values.
    """
    bits = (logits + 0.0).view(torch.int32)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    ids = torch.arange(logits.shape[1] - 1, -1, -1, device=logits.device)
    return bits.to(torch.int64).bitwise_left_shift_(32).add_(ids + (0x7FFFFFFF - logits.shape[1] + 1))


def _key_ids(keys: Tensor) -> Tensor:
    return 0x7FFFFFFF - (keys & 0x7FFFFFFF)


def _weights(shifted: Tensor, min_p: Tensor | None, vocab_size: int) -> Tensor:
    """Overwrites logits minus their row's maximum with whole-numbered weights (see the top of this file)."""
    weights = shifted.exp_()
    if min_p is not None:
        weights.masked_fill_(weights < min_p, 0.0)
    return weights.mul_(weight_scale(vocab_size)).floor_()


def _target(total: Tensor, u: Tensor) -> Tensor:
    # The clamp is for u * total rounding up to total.
    return torch.minimum((total * u).floor_(), total - 1)


def _invert_cdf(weights: Tensor, u: Tensor) -> Tensor:
    """First id whose cumulative weight exceeds floor(u * total): first find its block, then look inside."""
    vocab_size = weights.shape[1]
    size = min(_BLOCK, vocab_size)
    whole = vocab_size // size
    blocks = torch.unflatten(weights[:, : whole * size], 1, (whole, size)).sum(-1, dtype=torch.float64)
    rest = weights[:, whole * size :].sum(-1, keepdim=True, dtype=torch.float64)
    blocks = torch.cat((blocks, rest), dim=1)
    ends = blocks.cumsum(-1)
    target = _target(ends[:, -1:], u)
    block = (ends <= target).sum(-1, keepdim=True).clamp_(max=whole)
    target = target - (ends - blocks).gather(1, block)
    ids = block * size + torch.arange(size, device=weights.device)
    inside = weights.gather(1, ids.clamp(max=vocab_size - 1)).masked_fill_(ids >= vocab_size, 0.0)
    offset = (inside.cumsum(-1, dtype=torch.float64) <= target).sum(-1)
    return (block.squeeze(1) * size + offset).clamp_(max=vocab_size - 1)


def _draw_nucleus(weights: Tensor, ids: Tensor, total: Tensor, top_p: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Draw among the fewest leading candidates that hold `top_p` of `total`.

    weights [R, C] float32, falling; ids [R, C]; total, top_p, u [R, 1] float64. Returns tokens [R] and whether the
    candidates hold that much [R, 1].
    """
    ends = weights.cumsum(-1, dtype=torch.float64)
    needed = total * top_p
    kept = (ends - weights < needed).sum(-1, keepdim=True).clamp_(min=1)
    target = _target(ends.gather(1, kept - 1), u)
    place = (ends <= target).sum(-1, keepdim=True).clamp_(max=weights.shape[1] - 1)
    return ids.gather(1, place).squeeze(1), ends[:, -1:] >= needed
