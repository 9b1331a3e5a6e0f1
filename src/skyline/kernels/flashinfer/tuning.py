"""FlashInfer's own autotuner: it times the tactics of its products and mixtures on the shapes that it is shown.

`skyline tune` shows it a model's steps and keeps what it found; a start reads that. Without, its kernels take the
tactics that the library thinks best, so nothing is timed before a first token.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from skyline.kernels.flashinfer import PROVIDER, calls
from skyline.kernels.registry import Kernel

_TUNED = frozenset({"moe_experts", "fused_experts", "linear_nvfp4", "fused_linear_nvfp4"})


def has_tactics(kernel: Kernel) -> bool:
    return kernel.provider == PROVIDER and kernel.op in _TUNED


def tuning(file: Path) -> AbstractContextManager[Any]:
    """What runs inside is timed with every tactic, and the fastest ones are kept in the file."""
    import flashinfer

    context: AbstractContextManager[Any] = flashinfer.autotune(**calls.autotune(file))
    return context


def read(file: Path) -> bool:
    """Use what is kept, from now on; False if nothing is, or if it was found with another GPU or other versions."""
    if not file.exists():
        return False
    from flashinfer.autotuner import AutoTuner

    return bool(AutoTuner.get().load_configs(str(file)))
