"""Building blocks of models: parameters, where a checkpoint's tensors go in them, and which op they call."""

from skyline.layers.attention import Attention
from skyline.layers.basic import Embedding, RMSNorm
from skyline.layers.context import LayerContext
from skyline.layers.linear import Linear, MergedLinear
from skyline.layers.loading import destinations, ignorable, random_values, randomize
from skyline.layers.mlp import MLP, Experts, MoE
from skyline.layers.rotary import RotaryEmbedding

__all__ = [
    "MLP",
    "Attention",
    "Embedding",
    "Experts",
    "LayerContext",
    "Linear",
    "MergedLinear",
    "MoE",
    "RMSNorm",
    "RotaryEmbedding",
    "destinations",
    "ignorable",
    "random_values",
    "randomize",
]
