"""Skyline's own server. Without a version it is the one of this environment, which is what a developer measures."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import ClassVar

from skyline.bench.engines.base import (
    Engine,
    Installation,
    Job,
    Launch,
    counters_by_name,
    precision_flags,
)
from skyline.bench.engines.environments import Recipe, make, reported
from skyline.bench.suite import EngineSpec

PACKAGE = "skyline-llm"

_PRECISIONS = {
    "bf16": ["--dtype", "bfloat16"],
    "fp16": ["--dtype", "float16"],
    "fp32": ["--dtype", "float32"],
    "int8": ["--quantization", "int8"],
    "int4": ["--quantization", "int4"],
}


class Skyline(Engine):
    name: ClassVar[str] = "skyline"
    parallelism: ClassVar[dict[str, int]] = {"tensor_parallel": 1, "data_parallel": 1, "expert_parallel": 1}

    def install(self, spec: EngineSpec, folder: Path) -> Installation:
        if spec.version in (None, "installed"):
            try:
                found: str | None = version(PACKAGE)
            except PackageNotFoundError:
                found = None
            return Installation((sys.executable, "-m", "skyline"), found, reported())
        assert spec.version is not None
        environment = make(self.name, Recipe(PACKAGE, spec.version, module="skyline"), folder)
        return Installation((str(environment.python), "-m", "skyline"), spec.version, environment.versions())

    def launch(self, job: Job) -> Launch:
        command = [*job.installation.program, "serve", job.source, "--host", "127.0.0.1", "--port", str(job.port)]
        command += ["--device", "cuda"] if job.cuda else ["--threads", str(job.threads)]
        command += precision_flags(job, _PRECISIONS)
        return Launch([*command, *job.spec.args])

    @staticmethod
    def cache_counters(metrics: str) -> tuple[int, int] | None:
        return counters_by_name(metrics, "skyline_prefix_cache_queried_tokens", "skyline_prefix_cache_hit_tokens")
