"""Compile Triton kernels for a GPU that is not there, as they are really called.

    TRITON_INTERPRET=0 python -m tests.kernels.triton.offline 90 rms_norm paged_attention
    TRITON_INTERPRET=0 python -m tests.kernels.triton.offline 120 --most 2

A driver that knows a target, and launches nothing, takes the place of CUDA's: calling a kernel on tensors of the CPU
then goes through Triton's own specialisation and NVIDIA's assembler. Prints a line for each compiled kernel: its name,
registers a thread, bytes spilled, and shared memory. Ends with 1 if something did not compile or does not fit.
"""

from __future__ import annotations

import argparse
import sys
from types import SimpleNamespace
from typing import Any

SHARED_MEMORY = {80: 166_912, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}


class OfflineDriver:
    """The part of triton.backends.driver.GPUDriver that compiling and launching ask for."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("cuda", capability, 32)
        self.compiled: list[dict[str, Any]] = []
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {
                "max_shared_mem": SHARED_MEMORY[capability],
                "multiprocessor_count": 132,
                "max_num_regs": 65536,
                "warpSize": 32,
            },
            load_binary=self._load,
        )

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return lambda *arguments: None

    def _load(self, name: str, cubin: bytes, shared: int, device: int) -> tuple[Any, ...]:
        self.compiled.append({"name": name, "shared": shared, **_resources(cubin)})
        return None, None, 0, 0, 1024


def _resources(cubin: bytes) -> dict[str, int]:
    """Registers a thread and bytes of the stack frame, which is where spilled registers go."""
    import re
    import subprocess
    import tempfile

    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = knobs.nvidia.cuobjdump.path
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {key: int(re.search(rf"{key}:(\d+)", text)[1]) for key in ("REG", "STACK")}  # type: ignore[index]


def by_capability(capability: int) -> Any:
    from skyline.kernels.gpu import GPUS

    return next(gpu for gpu in GPUS.values() if gpu.capability == divmod(capability, 10))


def install(capability: int) -> OfflineDriver:
    """Before kernels' modules are imported, which ask `skyline.kernels.triton.device` for what they run on."""
    import triton

    from skyline.kernels.triton import device as devices

    devices.capability = lambda device: divmod(capability, 10)  # type: ignore[assignment]
    devices.shared_memory = lambda device: SHARED_MEMORY[capability]
    devices.overlaps = lambda device: capability >= 90
    devices.has_assembly = lambda device: True
    devices.multiplies_fp4 = lambda device: capability >= 100
    driver = OfflineDriver(capability)
    triton.runtime.driver.set_active(driver)
    return driver


def _caches_fp8(arguments: tuple[Any, ...]) -> bool:
    import torch

    from skyline.ops import LayerCache

    caches = [argument for argument in arguments if isinstance(argument, LayerCache)]
    return any(part.dtype == torch.float8_e4m3fn for cache in caches for part in cache.tensors)


def main() -> int:
    import torch

    from skyline.kernels import Request, candidates
    from skyline.kernels import triton as provider
    from skyline.kernels.triton import PROVIDER
    from skyline.ops import OPS

    parser = argparse.ArgumentParser()
    parser.add_argument("capability", type=int, choices=SHARED_MEMORY)
    parser.add_argument("names", nargs="*", metavar="op", help="all of them by default")
    parser.add_argument("--most", type=int, default=1000, help="cases of an op and dtype, thinned out evenly")
    arguments = parser.parse_args()
    capability, names = arguments.capability, arguments.names
    provider.FALLS_BACK = False
    driver = install(capability)
    failed = 0
    for op in OPS.values():
        kernel = next((k for k in candidates(op.name) if k.provider == PROVIDER), None)
        if kernel is None or (names and op.name not in names):
            continue
        if kernel.supports(Request(op, "cuda", torch.bfloat16, gpu=by_capability(capability))) is not None:
            continue  # FP8, where there is none
        before = len(driver.compiled)
        for dtype in (torch.bfloat16, torch.float32):
            cases = list(op.cases(dtype, torch.Generator().manual_seed(0)))
            for case in cases[:: -(-len(cases) // arguments.most)]:
                if not by_capability(capability).fp8 and _caches_fp8(case.args):
                    continue
                try:
                    kernel.run(*case.args)
                except Exception as error:
                    failed += 1
                    print(f"FAILED {op.name} {dtype} {case.label}: {type(error).__name__}: {str(error)[:2000]}")
                    break
        for entry in driver.compiled[before:]:
            print(f"{op.name} {entry['name']} {entry['REG']} registers {entry['STACK']} stack {entry['shared']} shared")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
