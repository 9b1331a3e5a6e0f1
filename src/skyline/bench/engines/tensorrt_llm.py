"""TensorRT-LLM's `trtllm-serve`. It was not run here, where there is no GPU: flags are those of
tensorrt_llm/commands/serve.py, counters those of tensorrt_llm/metrics/collector.py of 1.2 and later. Versions without
the counter of cached prompt tokens have no counters here.

It counts only with `return_perf_metrics`, which is an option of its configuration file and no flag: the file is written
beside the log, unless `args` names one.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from skyline.bench.engines import http
from skyline.bench.engines.base import (
    Engine,
    EngineError,
    Installation,
    Job,
    Launch,
    precision_flags,
)
from skyline.bench.engines.environments import Recipe, make, newest, program_of
from skyline.bench.hardware import uses_cuda
from skyline.bench.suite import EngineSpec

_CONFIG_FLAGS = ("--config", "--extra_llm_api_options")


class TensorrtLlm(Engine):
    name: ClassVar[str] = "tensorrt-llm"
    metrics: ClassVar[str | None] = "/prometheus/metrics"
    parallelism: ClassVar[dict[str, int]] = {"data_parallel": 1}

    def check(self, spec: EngineSpec) -> None:
        super().check(spec)
        if spec.version != "installed" and not uses_cuda(spec.env):
            raise EngineError(f"{spec.name}: TensorRT-LLM needs an NVIDIA GPU, and none is visible here")

    def install(self, spec: EngineSpec, folder: Path) -> Installation:
        if spec.version == "installed":
            python, packages = program_of(spec, "trtllm-serve", "tensorrt_llm")
            return Installation(_program(python), packages.get("tensorrt-llm"), packages)
        version = spec.version or newest("tensorrt-llm", folder)
        environment = make(self.name, Recipe("tensorrt-llm", version, module="tensorrt_llm"), folder)
        return Installation(_program(str(environment.python)), version, environment.versions())

    def launch(self, job: Job) -> Launch:
        spec = job.spec
        command = [*job.installation.program, job.source, "--host", "127.0.0.1", "--port", str(job.port)]
        # The type of computation is the checkpoint's.
        precision_flags(job, {"bf16": [], "fp16": []})
        command += ["--tp_size", str(spec.tensor_parallel)] if spec.tensor_parallel > 1 else []
        command += ["--ep_size", str(spec.expert_parallel)] if spec.expert_parallel > 1 else []
        if not any(argument.split("=")[0] in _CONFIG_FLAGS for argument in spec.args):
            config = job.log.with_suffix(".trtllm.yaml")
            config.write_text("return_perf_metrics: true\n")
            command += ["--extra_llm_api_options", str(config)]
        return Launch([*command, *spec.args])

    @staticmethod
    def cache_counters(metrics: str) -> tuple[int, int] | None:
        total = http.counter(metrics, "trtllm_prompt_tokens")
        cached = http.counter(metrics, "trtllm_prompt_cached_tokens")
        return None if total is None or cached is None else (int(total), int(cached))


def _program(python: str) -> tuple[str, ...]:
    return (str(Path(python).with_name("trtllm-serve")),)
