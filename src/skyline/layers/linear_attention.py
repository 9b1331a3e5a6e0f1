"""Linear attention with a recurrent state: Gated DeltaNet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from skyline import ops
from skyline.checkpoint.config import ModelConfig
from skyline.checkpoint.weights import Destination
from skyline.layers.basic import RMSNorm
from skyline.layers.context import LayerContext
from skyline.layers.linear import Linear, MergedLinear
from skyline.ops import AttentionBatch, StateCache


class GatedDeltaNet(nn.Module):
    """x [T, hidden] -> [T, hidden] (https://arxiv.org/abs/2412.06464), as Qwen3-Next and Qwen3.5 have it.

    q, k and v go through a short causal convolution and the gated delta rule; z gates the result. `grouped`: the
    checkpoint's rows are sorted by key head, as in Qwen3-Next, rather than by what they are.
    """

    def __init__(self, config: ModelConfig, context: LayerContext, grouped: bool) -> None:
        super().__init__()
        fields = config.fields()
        self.key_heads = fields.integer("linear_num_key_heads", 1, 2**12)
        heads = fields.integer("linear_num_value_heads", 1, 2**12)
        key_dim = fields.integer("linear_key_head_dim", 1, 2**14)
        value_dim = fields.integer("linear_value_head_dim", 1, 2**14)
        taps = fields.integer("linear_conv_kernel_dim", 2, 64)
        if heads % self.key_heads:
            raise fields.error("linear_num_value_heads", f"({heads}) must be a multiple of {self.key_heads} key heads")
        keys, values = self.key_heads * key_dim, heads * value_dim
        channels = 2 * keys + values
        self.sizes = (channels, values)
        self.heads = heads
        hidden = config.hidden_size
        qkvz, ba = {"in_proj_qkv": channels, "in_proj_z": values}, {"in_proj_b": heads, "in_proj_a": heads}
        places: dict[str, Mapping[str, Sequence[tuple[int, int]]]] = {"qkvz": {}, "ba": {}}
        if grouped:
            share = heads // self.key_heads
            runs = [(0, key_dim), (keys, key_dim), (2 * keys, share * value_dim), (channels, share * value_dim)]
            qkvz, ba = {"in_proj_qkvz": channels + values}, {"in_proj_ba": 2 * heads}
            places["qkvz"] = {
                "in_proj_qkvz": [(start + h * size, size) for h in range(self.key_heads) for start, size in runs]
            }
            places["ba"] = {
                "in_proj_ba": [(start + h * share, share) for h in range(self.key_heads) for start in (0, heads)]
            }
        self.qkvz_proj = MergedLinear(context, hidden, qkvz, places=places["qkvz"])
        self.ba_proj = MergedLinear(context, hidden, ba, places=places["ba"])
        self.conv1d = _Taps(context, channels, taps)
        self.dt_bias = context.parameter(heads)
        self.A_log = context.parameter(heads)
        self.norm = RMSNorm(context, value_dim, config.rms_norm_eps, per_head=True)
        self.out_proj = Linear(context, values, hidden)
        self.cache = StateCache(taps - 1, channels, heads, key_dim, value_dim, context.dtype)

    def forward(self, x: Tensor, positions: Tensor, batch: AttentionBatch, rope_table: Tensor) -> Tensor:
        qkv, z = ops.split(self.qkvz_proj(x), self.sizes)
        b, a = ops.split(self.ba_proj(x), (self.heads, self.heads))
        qkv = ops.causal_conv(qkv, self.conv1d.weight, self.cache, batch)
        read = ops.gated_delta_rule(qkv, b, a, self.A_log, self.dt_bias, self.key_heads, self.cache, batch)
        mixed: Tensor = self.out_proj(ops.gated_rms_norm(read, z, self.norm.weight, self.norm.eps))
        return mixed


class _Taps(nn.Module):
    """`weight` [channels, taps], which checkpoints hold as that of a torch convolution, [channels, 1, taps]."""

    def __init__(self, context: LayerContext, channels: int, taps: int) -> None:
        super().__init__()
        self.weight = context.parameter(channels, taps)

    def checkpoint_tensors(self, path: str) -> dict[str, Destination]:
        return {f"{path}.weight": Destination(self.weight, lambda stored: stored.squeeze(1))}
