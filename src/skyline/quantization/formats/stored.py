"""One weight of a quantized checkpoint, whatever the format: what it stands for, and which kernels take it as it is."""

from __future__ import annotations

from typing import Protocol

import torch

from skyline.checkpoint.weights import Weights as TensorSource
from skyline.ops import Fp4Weight, QuantizedWeight
from skyline.ops.formats import IntegerFormat
from skyline.ops.fp8 import Fp8Rows
from skyline.ops.quantized import ByteRows

__all__ = ["IntegerFormat", "Stored", "TensorSource"]


class Stored(Protocol):
    """One weight. Nothing is read from the checkpoint before `read` or `levels` are called; any thread may call them.

    shape: of the plain tensor that it stands for, as an unquantized checkpoint of the same model would hold it:
    [N, K], or [E, ...] where all experts are one tensor.
    parts: the names of the checkpoint's tensors it is made of.
    format: for people, as in "fp8, blocks of 128x128".
    exact: whether every value is a bfloat16 (else rounding it to one is the only loss).
    integers: how it can be handed to kernels, its scales rounded to float16 at most; None if only as plain values.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def parts(self) -> tuple[str, ...]: ...
    @property
    def format(self) -> str: ...
    @property
    def exact(self) -> bool: ...
    @property
    def integers(self) -> IntegerFormat | None: ...

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Entries start to stop of the first dimension, dequantized: float32 [stop - start, *shape[1:]].

        Raises CheckpointError naming the tensor if a scale is NaN, infinite or missing.
        """
        ...

    def levels(self, start: int, stop: int) -> QuantizedWeight | ByteRows | Fp8Rows | Fp4Weight:
        """The same rows of a matrix [N, K] as integers, bytes, FP8 or FP4, as `integers` says."""
        ...
