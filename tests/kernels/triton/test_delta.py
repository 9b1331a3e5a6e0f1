"""Linear attention in sizes that take several tiles and chunks, and the padding of a replayed graph."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from skyline.kernels import candidates
from skyline.kernels import triton as provider
from skyline.kernels.triton import causal_conv, delta
from skyline.ops import OPS, AttentionBatch, StateCache
from tests.kernels.triton.test_ops import DEVICE, moved

CPU = torch.device("cpu")
HEADS, KEY_HEADS, TAPS = 4, 2, 3


def _cache(dtype: torch.dtype, key_dim: int = 128, value_dim: int = 128, blocks: int = 6) -> StateCache:
    generator = torch.Generator().manual_seed(5)
    channels = 2 * KEY_HEADS * key_dim + HEADS * value_dim
    cache = StateCache(TAPS, channels, HEADS, key_dim, value_dim, dtype)
    cache.conv = torch.randn((blocks, TAPS, channels), generator=generator).to(dtype)
    cache.state = torch.randn((blocks, HEADS, key_dim, value_dim), generator=generator) * 0.3
    return cache


def _batch(starts: list[int], lengths: list[int], states: tuple[list[int], list[int]] | None = None) -> AttentionBatch:
    tables = [[block] for block in range(len(starts))]
    return AttentionBatch.build(tables, starts, lengths, 4096, CPU, states)


def _inputs(rows: int, cache: StateCache, dtype: torch.dtype, alike: float = 0.0) -> tuple[Tensor, ...]:
    """Columns of wider matrices, as projections give them. alike: how much of a key is the same in all tokens."""
    generator = torch.Generator().manual_seed(rows)
    qkv = torch.randn((rows, cache.channels + 8), generator=generator)
    qkv = (1 - alike) * qkv + alike * torch.randn((1, cache.channels + 8), generator=generator)
    ba = torch.randn((rows, 2 * HEADS + 3), generator=generator)
    decay, dt_bias = (torch.randn((HEADS,), generator=generator) * 0.5 - 2 for _ in range(2))
    qkv, ba, decay, dt_bias = (part.to(dtype) for part in (qkv, ba, decay, dt_bias))
    return qkv[:, : cache.channels], ba[:, :HEADS], ba[:, HEADS : 2 * HEADS], decay, dt_bias


def _moved(parts: tuple[Tensor, ...]) -> list[Tensor]:
    """On the device with the same strides."""
    wide = [part.new_empty((len(part), part.stride(0)), device=DEVICE) if part.dim() == 2 else None for part in parts]
    return [
        moved(part) if room is None else room[:, : part.shape[1]].copy_(part)
        for part, room in zip(parts, wide, strict=True)
    ]


def _check_rule(
    batch: AttentionBatch, cache: StateCache, inputs: tuple[Tensor, ...], rtol: float = 1e-4, atol: float = 1e-4
) -> None:
    wide = copy.deepcopy(cache)
    expected = OPS["gated_delta_rule"].reference(*(part.float() for part in inputs), KEY_HEADS, wide, batch)
    mine = moved(cache)
    actual = delta.gated_delta_rule(*_moved(inputs), KEY_HEADS, mine, moved(batch))
    torch.testing.assert_close(actual.float().cpu(), expected, rtol=rtol, atol=atol)
    torch.testing.assert_close(mine.tensors[1].cpu(), wide.tensors[1], rtol=rtol, atol=atol)


@pytest.mark.parametrize("dims", [(128, 128), (24, 40)])
def test_token_by_token(dims: tuple[int, int]) -> None:
    cache = _cache(torch.float32, *dims)
    _check_rule(_batch([7, 0, 3], [1, 9, 3], ([4, -1, 2], [4, 1, 5])), cache, _inputs(13, cache, torch.float32))


@pytest.mark.parametrize("alike", [0.0, 0.9], ids=["different keys", "keys almost the same"])
@pytest.mark.parametrize("dims", [(128, 128), (24, 40)])
def test_chunks(dims: tuple[int, int], alike: float) -> None:
    """Beside requests too short for them. The second's chunks begin within tiles of 64 of the step's tokens."""
    cache = _cache(torch.float16, *dims)
    batch = _batch([0, 2, 8, 9], [5, 130, 1, 64], ([-1, 1, 2, 3], [0, 4, 2, 3]))
    _check_rule(batch, cache, _inputs(200, cache, torch.float16, alike), rtol=4e-3, atol=4e-3)


def test_a_prompt_in_pieces() -> None:
    """Of which some go in chunks and some token by token: as in one go."""
    cache = _cache(torch.bfloat16, 128, 32)
    inputs = _inputs(130, cache, torch.bfloat16)
    whole = moved(cache)
    expected = delta.gated_delta_rule(*_moved(inputs), KEY_HEADS, whole, moved(_batch([0], [130])))
    pieces, parts, done = moved(cache), [], 0
    for length in (70, 3, 1, 56):
        part = tuple(x[done : done + length] if x.dim() == 2 else x for x in inputs)
        parts.append(delta.gated_delta_rule(*_moved(part), KEY_HEADS, pieces, moved(_batch([done], [length]))))
        done += length
    torch.testing.assert_close(torch.cat(parts), expected, rtol=1.6e-2, atol=1e-2)
    torch.testing.assert_close(pieces.tensors[1][0], whole.tensors[1][0], rtol=1.6e-2, atol=1e-2)


@pytest.mark.parametrize("lengths", [[40, 1, 5, 33, 2], [1] * 5, [2, 3, 1, 31, 32]])
def test_convolution(lengths: list[int]) -> None:
    cache = _cache(torch.float32, 40, 24)
    batch = _batch([4, 0, 9, 0, 2], lengths, ([0, -1, 2, -1, 5], [0, 1, 2, 3, 4]))
    (x, *_), mine, wide = _inputs(sum(lengths), cache, torch.float32), moved(cache), copy.deepcopy(cache)
    weight = torch.randn((cache.channels, TAPS + 1), generator=torch.Generator().manual_seed(1))
    expected = OPS["causal_conv"].reference(x, weight, wide, batch)
    actual = causal_conv.causal_conv(_moved((x,))[0], moved(weight), mine, moved(batch))
    torch.testing.assert_close(actual.cpu(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mine.tensors[0].cpu(), wide.tensors[0])


def test_many_requests() -> None:
    """More than are looked through at a time for the one a tile belongs to."""
    cache = _cache(torch.float32, 4, 2, blocks=130)
    lengths = [2 if request % 3 else 1 for request in range(130)]
    batch = _batch([0] * 130, lengths)
    (x, *_), mine, wide = _inputs(sum(lengths), cache, torch.float32), moved(cache), copy.deepcopy(cache)
    weight = torch.ones((cache.channels, TAPS + 1))
    expected = OPS["causal_conv"].reference(x, weight, wide, batch)
    actual = causal_conv.causal_conv(_moved((x,))[0], moved(weight), mine, moved(batch))
    torch.testing.assert_close(actual.cpu(), expected, rtol=1e-5, atol=1e-5)


def test_padding_of_a_replayed_graph() -> None:
    """Rows beyond the requests read and write no state, and the others are as without them."""
    cache, dtype = _cache(torch.float32, 16, 16), torch.float32
    x, b, a, *rest = _inputs(4, cache, dtype)
    weight = torch.ones((cache.channels, TAPS + 1), dtype=dtype)
    results = []
    for rows in (2, 4):
        mine, batch = moved(cache), moved(_batch([5, 0, 0, 0][:rows], [1] * rows))
        batch.state_blocks = torch.tensor([[3, -1, -1, -1], [3, 1, -1, -1]], dtype=torch.int32, device=DEVICE)[:, :rows]
        batch.state_blocks = batch.state_blocks.contiguous()
        x_, b_, a_, *rest_ = _moved((x[:rows], b[:rows], a[:rows], *rest))
        mixed = causal_conv.causal_conv(x_, moved(weight), mine, batch)
        results.append((delta.gated_delta_rule(mixed, b_, a_, *rest_, KEY_HEADS, mine, batch), *mine.tensors))
    (few, *states), (many, *padded) = results
    assert torch.equal(few, many[:2]) and many.isfinite().all()
    assert all(map(torch.equal, states, padded))
    assert torch.equal(padded[1][[0, 2, 4, 5]].cpu(), cache.tensors[1][[0, 2, 4, 5]])


class _TooLarge:
    def __getitem__(self, grid: object) -> object:
        def launch(*_: object, **__: object) -> None:
            raise OutOfResources(300_000, 232_448, "shared memory")

        return launch


@pytest.mark.parametrize("kernel", ["_chunk_kernel", "_scan_kernel", "_recurrent_kernel"])
def test_states_advance_once_if_a_kernel_does_not_compile(monkeypatch: pytest.MonkeyPatch, kernel: str) -> None:
    """The reference takes over a step in which other kernels might have run: one request decodes, one begins."""
    cache, batch = _cache(torch.bfloat16, 16, 16), _batch([4, 0], [1, 40])
    inputs, expected, mine = _inputs(41, cache, torch.bfloat16), copy.deepcopy(cache), moved(cache)
    wanted = OPS["gated_delta_rule"].reference(*inputs, KEY_HEADS, expected, batch)
    run = next(k.run for k in candidates("gated_delta_rule") if k.provider == provider.PROVIDER)
    monkeypatch.setattr(provider, "FALLS_BACK", True)
    monkeypatch.setattr(delta, "_compiled", set())
    monkeypatch.setattr(delta, kernel, _TooLarge())
    got = run(*_moved(inputs), KEY_HEADS, mine, moved(batch))
    torch.testing.assert_close(got.cpu(), wanted, rtol=0, atol=0 if DEVICE.type == "cpu" else 1e-2)
    torch.testing.assert_close(mine.tensors[1].cpu(), expected.tensors[1])


def test_no_rows() -> None:
    cache, batch = moved(_cache(torch.float32, 16, 16)), moved(_batch([], []))
    x, *rest = _moved(_inputs(0, cache, torch.float32))
    assert causal_conv.causal_conv(x, x.new_ones((cache.channels, TAPS + 1)), cache, batch).shape == x.shape
    assert delta.gated_delta_rule(x, *rest, KEY_HEADS, cache, batch).shape == (0, HEADS * 16)
