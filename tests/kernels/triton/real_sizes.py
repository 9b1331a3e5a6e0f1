"""Compile products of FP8 weights in blocks, as large as models have them, for a GPU that is not there.

    TRITON_INTERPRET=0 python -m tests.kernels.triton.real_sizes 90

The cases of ops are small, and never take the tiles of large ones. Prints what `offline` prints.
"""

from __future__ import annotations

import sys
from typing import Any


def main() -> None:
    from tests.kernels.triton.offline import install

    driver = install(int(sys.argv[1]))
    import torch

    from skyline.kernels.triton import linear, moe_bytes
    from skyline.ops.fp8 import BLOCK, FP8, Fp8Weight

    def weight(*shape: int) -> Any:
        *lead, n, k = shape
        values = torch.zeros(shape, dtype=torch.uint8).view(FP8)
        return Fp8Weight(values, torch.ones((*lead, n // BLOCK, k // BLOCK)))

    experts, inner, hidden, top_k = 4, 256, 512, 2
    for tokens in (16, 32, 64, 96, 512):
        x, ids = torch.zeros((tokens, hidden), dtype=torch.bfloat16), torch.zeros((tokens, top_k), dtype=torch.int64)
        weights = torch.ones(ids.shape)
        for up_first in (False, True):
            gate_up, down = weight(experts, 2 * inner, hidden), weight(experts, hidden, inner)
            moe_bytes.moe_experts_fp8(x, gate_up, down, weights, ids, None, up_first)
        linear.linear_fp8(x, weight(2 * inner, hidden), None, True)
    for entry in driver.compiled:
        print(f"{entry['name']} {entry['REG']} registers {entry['STACK']} stack {entry['shared']} shared")


if __name__ == "__main__":
    main()
