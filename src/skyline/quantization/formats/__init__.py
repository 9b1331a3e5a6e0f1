"""Quantized checkpoint formats: how to recognise them, and what their tensors stand for."""

from skyline.checkpoint.errors import CheckpointError
from skyline.quantization.formats.stored import Stored, TensorSource

__all__ = ["Stored", "TensorSource", "detect"]


def detect(config, source):  # type: ignore
    if config is not None:
        raise CheckpointError(f"{source.folder}: quantized checkpoints cannot be read by this version")
    return None
