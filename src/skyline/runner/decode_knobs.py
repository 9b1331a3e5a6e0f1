"""What `skyline tune` found about a model's decode steps on a GPU, by number of requests, kept on disk."""

from __future__ import annotations

import hashlib
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec
import torch

from skyline.checkpoint.cache import cache_folder
from skyline.checkpoint.config import ModelConfig
from skyline.engine.config import EngineConfig
from skyline.kernels import gpu
from skyline.kernels.triton.knobs import Knobs


class DecodeKnobs(msgspec.Struct):
    """`sizes`: for each number of requests that was measured the fastest knobs; others go by the next larger one."""

    measured_on: str
    sizes: dict[int, Knobs] = {}

    def of(self, requests: int) -> Knobs:
        larger = [size for size in self.sizes if size >= requests]
        if larger:
            return self.sizes[min(larger)]
        return self.sizes[max(self.sizes)] if self.sizes else Knobs()


def kept(config: EngineConfig, model: ModelConfig) -> tuple[Path, DecodeKnobs]:
    """The file for this model and these options, and what was measured with this GPU, driver and these libraries."""
    options = f"{config.quantization} {config.quantization_group} {config.kv_cache_dtype} {config.dtype}"
    options += f" {config.prefer_kernels}"
    name = hashlib.blake2b(f"{model} {options}".encode(), digest_size=8).hexdigest()
    device = gpu.detect(torch.device(config.device).index or 0)
    libraries = f"torch {torch.__version__}, triton {_version('triton')}"
    nothing = DecodeKnobs(f"{device.name}, driver {_driver()}, {libraries}")
    file = cache_folder() / f"decode-{name}.json"
    try:
        found = msgspec.json.decode(file.read_bytes(), type=DecodeKnobs)
    except (OSError, msgspec.DecodeError):  # none yet, or of another version
        return file, nothing
    return file, found if found.measured_on == nothing.measured_on else nothing


def tactics_file(file: Path) -> Path:
    """Where FlashInfer's autotuner keeps what it found for the model whose knobs are in `file`."""
    return file.with_name(file.name.replace("decode-", "flashinfer-"))


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "none"


def _driver() -> str:
    """The version that the kernel's module tells; "unknown" where it does not."""
    try:
        found = re.search(r"Module\s+(?:for \S+\s+)?(\d+[.\d]*)", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        return "unknown"
    return found[1] if found else "unknown"
