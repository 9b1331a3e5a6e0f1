"""What a layer remembers of each request: paged memory, one kind for each kind of attention.

A cache holds blocks that the engine hands out. Caches with the same `group` use the same block tables: they keep the
same tokens for the same time. The runner allocates the tensors once it knows how many blocks fit.
"""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass
from typing import Literal

import torch

from skyline.ops.host_memory import reserve

CacheKind = Literal["full attention", "sliding window", "latent", "index", "recurrent state"]


@dataclass(slots=True, eq=False, kw_only=True)
class LayerCache(abc.ABC):
    """What all kinds have. `group`: which of a step's block tables it goes by."""

    group: int = 0

    @property
    @abc.abstractmethod
    def kind(self) -> CacheKind: ...

    @property
    @abc.abstractmethod
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The memory, as it is stored; the first dimension counts blocks."""

    @abc.abstractmethod
    def allocate(self, num_blocks: int, block_size: int, device: torch.device) -> None: ...

    @abc.abstractmethod
    def bytes_per_token(self) -> int:
        """0 where memory does not grow with the context."""

    def bytes_per_block(self, block_size: int) -> int:
        return self.bytes_per_token() * block_size


def _allocated(*tensors: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    found = tuple(tensor for tensor in tensors if tensor is not None)
    assert len(found) == len(tensors), "KV cache used before it was allocated"
    return found


@dataclass(slots=True, eq=False)
class KVCache(LayerCache):
    """One layer's paged keys and values.

    k, v: [num_blocks, block_size, num_kv_heads, head_dim]; in int8 and fp8 (float8_e4m3fn) what is cached is
    k * k_scale and v * v_scale.
    by_head: in a block's memory all tokens of a head lie side by side, which a core reads in order when it attends to
    one head after the other; else all heads of a token do.
    k_scale, v_scale: [num_blocks, block_size, num_kv_heads] float32, only beside int8; beside fp8 [num_kv_heads], given
    by the checkpoint, else 1.
    window: how many tokens back a query looks, itself included; None is all of them.
    """

    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    k: torch.Tensor | None = None
    v: torch.Tensor | None = None
    k_scale: torch.Tensor | None = None
    v_scale: torch.Tensor | None = None
    window: int | None = None
    by_head: bool = False

    @property
    def kind(self) -> CacheKind:
        return "full attention" if self.window is None else "sliding window"

    def allocate(self, num_blocks: int, block_size: int, device: torch.device) -> None:
        # On a CPU the pages are only committed as they are used. No kernel reads what was never written.
        assert not self.by_head or device.type in ("cpu", "meta"), "GPU kernels read all heads of a token together"

        def block_by_block(dtype: torch.dtype, *inner: int) -> torch.Tensor:
            outer = (self.num_kv_heads, block_size) if self.by_head else (block_size, self.num_kv_heads)
            memory = reserve((num_blocks, *outer, *inner), dtype, device)
            return memory.transpose(1, 2) if self.by_head else memory

        self.k = block_by_block(self.dtype, self.head_dim)
        self.v = block_by_block(self.dtype, self.head_dim)
        if self.dtype == torch.int8:
            self.k_scale = block_by_block(torch.float32)
            self.v_scale = block_by_block(torch.float32)
        elif self.dtype == torch.float8_e4m3fn:
            ones = torch.ones(self.num_kv_heads, device=device)
            self.k_scale = ones if self.k_scale is None else self.k_scale.to(device)
            self.v_scale = ones if self.v_scale is None else self.v_scale.to(device)

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """k and v, as they are stored."""
        k, v = _allocated(self.k, self.v)
        return k, v

    @property
    def scales(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """k_scale and v_scale, or None if k and v are not quantized."""
        return None if self.k_scale is None or self.v_scale is None else (self.k_scale, self.v_scale)

    def bytes_per_token(self) -> int:
        scale = torch.float32.itemsize if self.dtype == torch.int8 else 0
        return 2 * self.num_kv_heads * (self.head_dim * self.dtype.itemsize + scale)


LATENT_GROUP = 128  # neighbours in a quantized latent that share a scale


@dataclass(slots=True, eq=False)
class LatentCache(LayerCache):
    """What multi-head latent attention keeps of a token (DeepSeek-V2, arXiv:2405.04434): one vector for all heads.

    data: [num_blocks, block_size, rank + rope_dim]: the normalised latent, from which each head's key and value are
    made, and the rotated part of the key, which the heads share; both of `dtype`.

    With `quantized`, int8 or float8_e4m3fn, the latent alone is data, [num_blocks, block_size, rank], each 128
    neighbours times their own scale, in scales [num_blocks, block_size, ceil(rank / 128)] float32. The rotated part
    is kept in keys [num_blocks, block_size, rope_dim] of `dtype`: positions suffer more from rounding (as FlashMLA
    keeps FP8, github.com/deepseek-ai/FlashMLA).
    """

    rank: int
    rope_dim: int
    dtype: torch.dtype
    data: torch.Tensor | None = None
    quantized: torch.dtype | None = None
    scales: torch.Tensor | None = None
    keys: torch.Tensor | None = None

    @property
    def kind(self) -> CacheKind:
        return "latent"

    @property
    def groups(self) -> int:
        """Scales of a quantized latent."""
        return -(-self.rank // LATENT_GROUP)

    def allocate(self, num_blocks: int, block_size: int, device: torch.device) -> None:
        shape = (num_blocks, block_size)
        if self.quantized is None:
            self.data = reserve((*shape, self.rank + self.rope_dim), self.dtype, device)
        else:
            self.data = reserve((*shape, self.rank), self.quantized, device)
            self.scales = reserve((*shape, self.groups), torch.float32, device)
            self.keys = reserve((*shape, self.rope_dim), self.dtype, device)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """data, and of a quantized cache scales and keys."""
        return _allocated(self.data) if self.quantized is None else _allocated(self.data, self.scales, self.keys)

    def bytes_per_token(self) -> int:
        if self.quantized is None:
            return (self.rank + self.rope_dim) * self.dtype.itemsize
        return self.rank + self.groups * torch.float32.itemsize + self.rope_dim * self.dtype.itemsize


@dataclass(slots=True, eq=False)
class IndexCache(LayerCache):
    """Keys of the lightning indexer (DeepSeek-V3.2), by which queries choose the tokens they attend to.

    keys: [num_blocks, block_size, head_dim]; with `quantized`, int8 or float8_e4m3fn, of that type, each key times its
    own scale, in scales [num_blocks, block_size] float32.
    """

    head_dim: int
    dtype: torch.dtype
    keys: torch.Tensor | None = None
    quantized: torch.dtype | None = None
    scales: torch.Tensor | None = None

    @property
    def kind(self) -> CacheKind:
        return "index"

    def allocate(self, num_blocks: int, block_size: int, device: torch.device) -> None:
        self.keys = reserve((num_blocks, block_size, self.head_dim), self.quantized or self.dtype, device)
        if self.quantized is not None:
            self.scales = reserve((num_blocks, block_size), torch.float32, device)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """keys, and of a quantized cache scales."""
        return _allocated(self.keys) if self.quantized is None else _allocated(self.keys, self.scales)

    def bytes_per_token(self) -> int:
        if self.quantized is None:
            return self.head_dim * self.dtype.itemsize
        return self.head_dim + torch.float32.itemsize


@dataclass(slots=True, eq=False)
class StateCache(LayerCache):
    """The state of a linear-attention layer, whose size does not depend on the context. A block is one whole state.

    conv: [num_blocks, taps, channels]: the last inputs of the causal convolution, oldest first.
    state: [num_blocks, heads, key_dim, value_dim] float32: the recurrent memory.
    A step reads a request's state from one block and writes it to the same or another one (AttentionBatch).
    """

    taps: int
    channels: int
    heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype  # of conv
    conv: torch.Tensor | None = None
    state: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of one state."""
        return self.heads, self.key_dim, self.value_dim

    @property
    def kind(self) -> CacheKind:
        return "recurrent state"

    def allocate(self, num_blocks: int, block_size: int, device: torch.device) -> None:
        self.conv = reserve((num_blocks, self.taps, self.channels), self.dtype, device)
        self.state = reserve((num_blocks, *self.shape), torch.float32, device)

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """conv and state."""
        conv, state = _allocated(self.conv, self.state)
        return conv, state

    def bytes_per_token(self) -> int:
        return 0

    def bytes_per_block(self, block_size: int) -> int:
        return self.taps * self.channels * self.dtype.itemsize + math.prod(self.shape) * torch.float32.itemsize
