"""The write to the KV cache as engines do it: all types, odd heads, rows of padding, several tokens a program."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from skyline.kernels.triton import activations, rope
from skyline.ops import OPS, AttentionBatch, KVCache
from tests.kernels.triton.test_ops import DEVICE, moved

CPU = torch.device("cpu")
FP8 = torch.float8_e4m3fn
HEADS, KV_HEADS, ROWS = 10, 3, 7  # no multiples of what a program takes
PADDING = [2, 6]
CACHES = pytest.mark.parametrize("cached", [None, torch.int8, FP8], ids=["like q", "int8", "fp8"])
TOKENS = pytest.mark.parametrize("busy", [False, True], ids=["a token", "several tokens"])


def _cache(head_dim: int, dtype: torch.dtype) -> KVCache:
    cache = KVCache(KV_HEADS, head_dim, dtype)
    cache.allocate(3, 8, CPU)
    for part in (*cache.tensors, *(cache.scales or ())):
        part.view(torch.uint8).fill_(7)
    if dtype == FP8:
        cache.k_scale, cache.v_scale = torch.tensor([0.002, 0.01, 1.0]), torch.tensor([0.5, 0.004, 0.01])
    return cache


def _step(head_dim: int, dtype: torch.dtype) -> tuple[Tensor, AttentionBatch, AttentionBatch, Tensor]:
    """Columns of a wider matrix, a batch, one without its padding, and which rows those are."""
    generator = torch.Generator().manual_seed(head_dim)
    qkv = torch.randn((ROWS, (HEADS + 2 * KV_HEADS) * head_dim + 16), generator=generator).to(dtype)[:, 8:-8]
    qkv[1, -head_dim:] = 0  # a head of zeros has no scale
    batch = AttentionBatch.build([[2, 1]], [3], [ROWS], 8, CPU)
    batch.tables[0].slot_mapping[PADDING] = -1
    kept = (batch.tables[0].slot_mapping >= 0).nonzero().flatten()
    real = copy.deepcopy(batch)
    real.tables[0].slot_mapping = batch.tables[0].slot_mapping[kept]
    return qkv, batch, real, kept


def _on_device(x: Tensor) -> Tensor:
    wide = torch.zeros((len(x), x.stride(0)), dtype=x.dtype, device=DEVICE)
    return wide[:, 8 : 8 + x.shape[1]].copy_(x)


def _levels(part: Tensor) -> Tensor:
    """Of 8 bits, numbers whose neighbours differ by one."""
    if part.dtype != FP8:
        return part.cpu().float()
    bits = part.cpu().view(torch.uint8).int()
    return torch.where(bits >= 128, 128 - bits, bits).float()


@CACHES
@TOKENS
@pytest.mark.parametrize("head_dim,rotary,norm", [(128, 128, True), (96, 40, True), (80, 80, False)])
def test_rope_kv_write(
    cached: torch.dtype | None, busy: bool, head_dim: int, rotary: int, norm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rope, "multiprocessors", lambda device: 0 if busy else 10**6)
    generator = torch.Generator().manual_seed(1)
    qkv, batch, real, kept = _step(head_dim, torch.float32)
    angles = torch.rand((30, rotary // 2), generator=generator) * 6
    table, positions = torch.cat((angles.cos(), angles.sin()), -1), torch.randint(0, 30, (ROWS,), generator=generator)
    norms = [torch.randn((head_dim,), generator=generator) if norm else None for _ in range(2)]
    wanted = _cache(head_dim, cached or torch.float32)
    mine = moved(wanted)
    expected = OPS["rope_kv_write"].reference(qkv[kept], *norms, 1e-6, positions[kept], table, wanted, real)
    rest = [moved(value) for value in (*norms, 1e-6, positions, table)]
    actual = rope.rope_kv_write(_on_device(qkv), *rest, mine, moved(batch))
    assert actual.is_contiguous() and actual.isfinite().all()
    torch.testing.assert_close(actual.cpu()[kept], expected, rtol=1e-5, atol=1e-5)
    for want, got in zip(wanted.tensors, mine.tensors, strict=True):
        # Where a number lies between two levels, the last bit of the arithmetic decides.
        off = (_levels(got) - _levels(want)).abs()
        assert off.max() <= (1e-5 if cached is None else 1) and (off > 0.5).float().mean() < 1e-3
    for want, got in zip(wanted.scales or (), mine.scales or (), strict=True):
        torch.testing.assert_close(got.cpu(), want)


@CACHES
@TOKENS
def test_kv_write_to_the_bit(cached: torch.dtype | None, busy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rope, "multiprocessors", lambda device: 0 if busy else 10**6)
    qkv, batch, real, kept = _step(72, torch.bfloat16)
    k, v = qkv[:, -2 * KV_HEADS * 72 :].split(KV_HEADS * 72, dim=-1)
    wanted = _cache(72, cached or torch.bfloat16)
    mine = moved(wanted)
    OPS["kv_write"].reference(k[kept], v[kept], wanted, real)
    rope.kv_write(_on_device(k), _on_device(v), mine, moved(batch))
    for want, got in zip(wanted.tensors, mine.tensors, strict=True):
        assert torch.equal(got.cpu().view(torch.uint8), want.view(torch.uint8))
    for want, got in zip(wanted.scales or (), mine.scales or (), strict=True):
        assert torch.equal(got.cpu(), want)


def test_no_rows() -> None:
    cache, batch = moved(_cache(16, torch.float32)), moved(AttentionBatch.build([], [], [], 8, CPU))
    qkv, table = torch.empty((0, 16 * 16), device=DEVICE), torch.empty((4, 16), device=DEVICE)
    positions = torch.empty((0,), dtype=torch.int64, device=DEVICE)
    assert rope.rope_kv_write(qkv, None, None, 1e-6, positions, table, cache, batch).shape == (0, 10 * 16)


@pytest.mark.parametrize("busy", [False, True], ids=["narrow", "wide"])
@pytest.mark.parametrize("name", ["silu_mul", "gelu_mul", "sigmoid_mul"])
def test_gates_of_several_blocks(name: str, busy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "multiprocessors", lambda device: 0 if busy else 10**6)
    x = torch.randn((3, 2 * 2500), generator=torch.Generator().manual_seed(2))
    arguments = (x[:, :2500], x[:, 2500:]) if name == "sigmoid_mul" else (x,)
    actual = getattr(activations, name)(*(part.to(DEVICE) for part in arguments))
    torch.testing.assert_close(actual.cpu(), OPS[name].reference(*arguments), rtol=1e-5, atol=1e-5)
