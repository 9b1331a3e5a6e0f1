"""From a model's plain Python to a Program of bound kernel calls: capture, passes, lowering."""

from skyline.graph.capture import capture
from skyline.graph.passes import PASSES, run_passes
from skyline.graph.program import Call, Program, WeightUse, lower
from skyline.graph.quantize import quantize_linears

__all__ = ["PASSES", "Call", "Program", "WeightUse", "capture", "lower", "quantize_linears", "run_passes"]
