"""Whether Triton can compile and run anything here."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _one_kernel(x):
    tl.store(x, 1)


def run(device: torch.device) -> None:
    """Raises what Triton raises, or RuntimeError if what it made gives another result."""
    x = torch.zeros(1, dtype=torch.int32, device=device)
    if device.type == "cuda":
        with torch.cuda.device(device):
            _one_kernel[(1,)](x)
    else:  # in Triton's interpreter
        _one_kernel[(1,)](x)
    if x.item() != 1:
        raise RuntimeError("a kernel that stores 1 stored something else")
