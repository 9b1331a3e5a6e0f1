"""What GPUs there are and what they can do, so that kernels can be chosen for one that is not there.

Rates are the vendors' dense peaks of the SXM or flagship form, from their data sheets: for choosing and for estimates.
Claims of speed go by what is measured on the device itself (benchmarks/gpu_check.py).
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from dataclasses import dataclass, field, replace

import torch

LIBRARIES = frozenset({"triton", "flashinfer"})
OLDEST = (8, 0)  # compute capability that Triton's and FlashInfer's kernels here are for

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU as far as kernels and their choice have to know it.

    capability: NVIDIA's compute capability (9, 0) and so on. flops: dense peak FLOP/s by format, where the hardware has
    that format. libraries: which of LIBRARIES can be used where the kernels run.
    """

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    memory: int  # bytes
    bandwidth: float  # bytes a second
    shared_memory: int  # bytes that one block can have
    flops: dict[str, float] = field(hash=False)
    libraries: frozenset[str] = LIBRARIES

    def without(self, library: str) -> Gpu:
        return replace(self, libraries=self.libraries - {library})

    @property
    def fp8(self) -> bool:
        """Whether its matrix units multiply float8_e4m3fn."""
        return self.capability >= (8, 9)

    @property
    def fp4(self) -> bool:
        """Whether its matrix units multiply MXFP4 and NVFP4."""
        return self.capability >= (10, 0)


_GIB, _T = 1 << 30, 1e12
_SHARED = {(8, 0): 166_912, (8, 9): 101_376, (9, 0): 232_448, (10, 0): 232_448, (12, 0): 101_376}


def _gpu(
    name: str, capability: tuple[int, int], sms: int, gib: float, tb_s: float, bf16: float, fp8: float, fp4: float
) -> Gpu:
    rates = {"bfloat16": bf16 * _T, "float8": fp8 * _T, "float4": fp4 * _T}
    flops = {name: rate for name, rate in rates.items() if rate}
    return Gpu(name, capability, sms, int(gib * _GIB), tb_s * _T, _SHARED[capability], flops)


GPUS: dict[str, Gpu] = {
    key: gpu
    for key, gpu in {
        "a100": _gpu("NVIDIA A100 80GB", (8, 0), 108, 80, 2.04, 312, 0, 0),
        "l4": _gpu("NVIDIA L4", (8, 9), 58, 24, 0.3, 121, 242, 0),
        "h100": _gpu("NVIDIA H100", (9, 0), 132, 80, 3.35, 989, 1979, 0),
        "h200": _gpu("NVIDIA H200", (9, 0), 132, 141, 4.8, 989, 1979, 0),
        "b200": _gpu("NVIDIA B200", (10, 0), 148, 180, 8.0, 2250, 4500, 9000),
        "gb200": _gpu("NVIDIA GB200", (10, 0), 152, 186, 8.0, 2500, 5000, 10000),
        "rtx-blackwell": _gpu("NVIDIA RTX PRO 6000 Blackwell", (12, 0), 188, 96, 1.79, 504, 1008, 2015),
    }.items()
}


@functools.cache
def detect(index: int = 0) -> Gpu:
    """The CUDA device of that index. Its rates are those of the nearest known one, for it does not tell them.

    One line is logged if Skyline's kernels cannot run there.
    """
    properties = torch.cuda.get_device_properties(index)
    capability = (properties.major, properties.minor)
    named = [gpu for key, gpu in GPUS.items() if key.upper() in properties.name.upper()]
    alike = named or [gpu for gpu in GPUS.values() if gpu.capability <= capability] or [GPUS["a100"]]
    found = replace(
        alike[-1],
        name=properties.name,
        capability=capability,
        multiprocessors=properties.multi_processor_count,
        memory=properties.total_memory,
        shared_memory=getattr(properties, "shared_memory_per_block_optin", alike[-1].shared_memory),
        libraries=frozenset(name for name in LIBRARIES if importlib.util.find_spec(name) is not None),
    )
    if capability < OLDEST:
        _LOG.warning(
            "%s is too old for Skyline's kernels: its compute capability is %d.%d, they need %d.%d. torch computes "
            "every op, which is far slower",
            *(found.name, *capability, *OLDEST),
        )
    elif "triton" in found.libraries and (why_not := _triton_fails(index)) is not None:
        _LOG.warning("Triton cannot compile here, so torch computes what its kernels would, far slower: %s", why_not)
        return found.without("triton")
    return found


def _triton_fails(index: int) -> str | None:
    """Compile and run the smallest of kernels: there may be no compiler of C, or no right one."""
    from skyline.kernels.triton import probe

    try:
        probe.run(torch.device("cuda", index))
    except Exception as error:  # whatever it is, every other kernel would meet it as well
        return f"{type(error).__name__}: {error}"
    return None
