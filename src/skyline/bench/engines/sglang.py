"""SGLang. It was not run here, where there is no GPU: flags, counters and fields are those of the sources of 0.5.23
(srt/arg_groups/fields, srt/observability/metrics_collector.py, srt/entrypoints/openai/protocol.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from skyline.bench.engines.base import (
    Engine,
    EngineError,
    Installation,
    Job,
    Launch,
    counters_by_name,
    precision_flags,
)
from skyline.bench.engines.environments import Recipe, make, newest, program_of
from skyline.bench.hardware import uses_cuda
from skyline.bench.suite import EngineSpec

_PRECISIONS = {
    "bf16": ["--dtype", "bfloat16"],
    "fp16": ["--dtype", "float16"],
    "fp32": ["--dtype", "float32"],
    "fp8": ["--quantization", "fp8"],
}


class Sglang(Engine):
    name: ClassVar[str] = "sglang"

    def check(self, spec: EngineSpec) -> None:
        super().check(spec)
        if spec.version != "installed" and not uses_cuda(spec.env):
            raise EngineError(
                f"{spec.name}: the package sglang is built for NVIDIA GPUs, and none is visible here; "
                "for SGLang's CPU build, install it by its own instructions and give version: installed"
            )

    def install(self, spec: EngineSpec, folder: Path) -> Installation:
        if spec.version == "installed":
            python, packages = program_of(spec, "sglang", "sglang")
            return Installation((python, "-m", "sglang.launch_server"), packages.get("sglang"), packages)
        version = spec.version or newest("sglang", folder)
        environment = make(self.name, Recipe("sglang", version, module="sglang"), folder)
        program = (str(environment.python), "-m", "sglang.launch_server")
        return Installation(program, version, environment.versions())

    def launch(self, job: Job) -> Launch:
        spec = job.spec
        command = [*job.installation.program, "--model-path", job.source, "--host", "127.0.0.1"]
        command += ["--port", str(job.port), "--enable-metrics", *precision_flags(job, _PRECISIONS)]
        command += [] if job.cuda else ["--device", "cpu"]
        for flag, size in (
            ("--tp-size", spec.tensor_parallel),
            ("--dp-size", spec.data_parallel),
            ("--ep-size", spec.expert_parallel),
        ):
            command += [flag, str(size)] if size > 1 else []
        return Launch([*command, *spec.args])

    @staticmethod
    def cache_counters(metrics: str) -> tuple[int, int] | None:
        return counters_by_name(metrics, "sglang:prompt_tokens", "sglang:cached_tokens")
