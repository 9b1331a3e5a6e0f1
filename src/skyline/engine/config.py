"""The engine's settings: one struct, sent as JSON to the engine process."""

from __future__ import annotations

from typing import Literal

import msgspec

DType = Literal["auto", "bfloat16", "float16", "float32"]
LoadFormat = Literal["auto", "safetensors", "dummy"]
KVCacheDType = Literal["auto", "int8", "fp8"]
Quantization = Literal["none", "fp8", "mxfp4", "int8", "int8-weight-only", "int4"]
Provider = Literal["cpu", "triton", "flashinfer", "torch"]
QUANTIZATION_GROUPS = (32, 64, 128)


class EngineConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """None means: decide from the model and from the memory that is there."""

    model: str  # a local folder; hub ids are resolved to one before the engine starts
    dtype: DType = "auto"
    device: str = "cpu"
    load_format: LoadFormat = "auto"  # "dummy": random weights of the right shape, for measuring speed
    quantization: Quantization | None = None  # of the weights of linear layers, while they are read
    quantization_group: int = 64  # neighbours of a row that share a scale, with int4
    weight_cache: bool = False  # keep weights on disk as the CPU's kernels want them, for the next start
    max_model_len: int | None = None  # tokens of prompt and output together
    max_num_seqs: int = 256  # requests running at once
    max_num_batched_tokens: int = 2048  # token budget of a step
    block_size: int = 16  # tokens a KV block
    # "auto": of the activations; int8 has a scale for each token and head, fp8 (e4m3) the checkpoint's for each head.
    kv_cache_dtype: KVCacheDType = "auto"
    kv_cache_memory: int | None = None  # bytes
    num_kv_blocks: int | None = None  # overrides kv_cache_memory
    memory_fraction: float | None = None  # of what is free after loading, for the KV cache: GPU 0.9, CPU 0.5
    enable_prefix_caching: bool = True
    async_scheduling: bool = True
    cuda_graphs: bool = True  # on a GPU, record decode steps, and of others what can be, and replay them
    prefer_kernels: Provider | None = None  # go before others wherever they support the case
    batch_invariant: bool = False  # bitwise the same results whatever else is in the batch
    threads: int | None = None  # compute threads
    seed: int = 0  # of dummy weights, and of requests that bring no seed of their own
    stall_timeout: float = 120.0  # seconds without a finished step before /health reports the engine as stuck

    def validate(self) -> None:
        for name, low, high in (
            ("max_num_seqs", 1, 4096),
            ("max_num_batched_tokens", 1, 1 << 20),
            ("block_size", 1, 1024),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"{name} must be from {low} to {high}, not {value}")
        for name in ("max_model_len", "kv_cache_memory", "num_kv_blocks", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be positive, not {value}")
        if self.quantization_group not in QUANTIZATION_GROUPS:
            raise ValueError(f"quantization_group must be 32, 64 or 128, not {self.quantization_group}")
        if self.weight_cache and self.device.startswith("cuda"):
            raise ValueError("weight_cache is for the CPU's kernels; leave it out with device cuda")
        if self.weight_cache and self.load_format == "dummy":
            raise ValueError("weight_cache keeps a checkpoint's weights; leave it out with load_format dummy")
        if self.memory_fraction is not None and not 0.0 < self.memory_fraction <= 1.0:
            raise ValueError(f"memory_fraction must be above 0 and at most 1, not {self.memory_fraction}")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least max_num_seqs "
                f"({self.max_num_seqs}), so that every running request can take a step"
            )
