"""Providers of ops. Importing this package registers them, in order of preference."""

from skyline.kernels import cpu  # noqa: F401  isort: skip
from skyline.kernels import triton  # noqa: F401  isort: skip
from skyline.kernels import flashinfer  # noqa: F401  isort: skip
from skyline.kernels import torch_invariant  # noqa: F401  isort: skip
from skyline.kernels import torch_quantized  # noqa: F401  isort: skip
from skyline.kernels import torch_reference  # noqa: F401  isort: skip
from skyline.kernels.registry import (
    Choice,
    Kernel,
    Layout,
    NoKernelError,
    Request,
    candidates,
    choose,
    finish_weight,
    others,
)

__all__ = [
    "Choice",
    "Kernel",
    "Layout",
    "NoKernelError",
    "Request",
    "candidates",
    "choose",
    "finish_weight",
    "others",
]
