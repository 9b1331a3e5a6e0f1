"""Quantization while loading: the formulas, and which ops a scheme puts in the place of `linear`."""

from skyline.quantization.quantize import quantize_int4, quantize_int8
from skyline.quantization.schemes import GROUPS, SCHEMES, Scheme

__all__ = ["GROUPS", "SCHEMES", "Scheme", "quantize_int4", "quantize_int8"]
