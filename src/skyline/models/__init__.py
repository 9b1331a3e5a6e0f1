"""One file an architecture. `create_model` makes the one that a config names."""

from skyline.layers.loading import destinations, ignorable, randomize
from skyline.models.mtp import PredictionModule, prediction_modules
from skyline.models.registry import MODELS, UnsupportedModelError, create_model, kv_caches, resolve

__all__ = [
    "MODELS",
    "PredictionModule",
    "UnsupportedModelError",
    "create_model",
    "destinations",
    "ignorable",
    "kv_caches",
    "prediction_modules",
    "randomize",
    "resolve",
]
