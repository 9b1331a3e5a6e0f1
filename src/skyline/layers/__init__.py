"""Building blocks of models: parameters, where a checkpoint's tensors go in them, and which op they call."""

from skyline.layers.attention import Attention
from skyline.layers.basic import Embedding, LayerNorm, RMSNorm
from skyline.layers.context import LayerContext
from skyline.layers.latent_attention import LatentAttention
from skyline.layers.linear import Linear, MergedLinear
from skyline.layers.linear_attention import GatedDeltaNet
from skyline.layers.loading import destinations, ignorable, random_values, randomize
from skyline.layers.mlp import MLP
from skyline.layers.moe import Experts, MoE, Router
from skyline.layers.rotary import RotaryEmbedding

__all__ = [
    "MLP",
    "Attention",
    "Embedding",
    "Experts",
    "GatedDeltaNet",
    "LatentAttention",
    "LayerContext",
    "LayerNorm",
    "Linear",
    "MergedLinear",
    "MoE",
    "RMSNorm",
    "RotaryEmbedding",
    "Router",
    "destinations",
    "ignorable",
    "random_values",
    "randomize",
]
