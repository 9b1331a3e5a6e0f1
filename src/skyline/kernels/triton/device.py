"""What a launch has to know about the device. Where tensors are on the CPU, in tests, the answer is that of an H200."""

from __future__ import annotations

import torch

from skyline.kernels.gpu import GPUS, detect


def multiprocessors(device: torch.device) -> int:
    return detect(device.index or 0).multiprocessors if device.type == "cuda" else GPUS["h200"].multiprocessors


def capability(device: torch.device) -> tuple[int, int]:
    return detect(device.index or 0).capability if device.type == "cuda" else GPUS["h200"].capability


def shared_memory(device: torch.device) -> int:
    """Bytes that one block can have."""
    return detect(device.index or 0).shared_memory if device.type == "cuda" else GPUS["h200"].shared_memory


def overlaps(device: torch.device) -> bool:
    """Whether a launch may begin before the one ahead of it has ended (programmatic dependent launch, from Hopper on).

    A kernel that is launched so touches nothing before its `gdc_wait` that the launch ahead of it may still write, or
    read and it writes. What launches before that one wrote is there: all wait before they let the next one begin, so
    that one began after they had ended (tests/kernels/triton/test_provider.py looks at the order).
    """
    return device.type == "cuda" and capability(device) >= (9, 0)


def has_assembly(device: torch.device) -> bool:
    """Whether kernels may hold PTX, which Triton's interpreter does not know."""
    return device.type == "cuda"


def multiplies_fp4(device: torch.device) -> bool:
    """Whether there are matrix units for FP4; elsewhere its kernels multiply in float32."""
    return device.type == "cuda" and capability(device) >= (10, 0)


def reads_whole(count: int, *rows: torch.Tensor) -> bool:
    """Whether threads may load `count` bfloat16 numbers of these rows [.., K] at once, in PTX.

    All rows must begin at, and have, a multiple of so many.
    """
    return all(
        has_assembly(each.device)
        and each.dtype == torch.bfloat16
        and each.data_ptr() % (2 * count) == 0
        and each.shape[-1] % count == 0
        and all(stride % count == 0 for stride in each.stride()[:-1])
        for each in rows
    )
