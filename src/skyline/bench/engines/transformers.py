"""`transformers serve`, run here with 5.24 on a CPU.

It answers one request after the other unless `args` has --continuous-batching. It refuses fields that it does not know,
ignore_eos among them, but takes a generation config as JSON, where an end token that no token has means the same.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

from skyline.bench.engines.base import (
    Engine,
    Installation,
    Job,
    Launch,
    precision_flags,
)
from skyline.bench.engines.environments import TORCH, Recipe, make, newest, program_of
from skyline.bench.suite import EngineSpec

_PRECISIONS = {
    "bf16": ["--dtype", "bfloat16"],
    "fp16": ["--dtype", "float16"],
    "fp32": ["--dtype", "float32"],
}


class Transformers(Engine):
    name: ClassVar[str] = "transformers"
    metrics: ClassVar[str | None] = None
    parallelism: ClassVar[dict[str, int]] = {"tensor_parallel": 1, "data_parallel": 1, "expert_parallel": 1}
    ignore_eos: ClassVar[dict[str, Any]] = {"generation_config": json.dumps({"eos_token_id": -1})}

    def install(self, spec: EngineSpec, folder: Path) -> Installation:
        if spec.version == "installed":
            python, packages = program_of(spec, "transformers", "transformers")
            return Installation(_program(python), packages.get("transformers"), packages)
        version = spec.version or newest("transformers", folder)
        recipe = Recipe("transformers[serving]", version, first=(TORCH,), module="transformers")
        environment = make(self.name, recipe, folder)
        return Installation(_program(str(environment.python)), version, environment.versions())

    def launch(self, job: Job) -> Launch:
        command = [*job.installation.program, "serve", job.source, "--host", "127.0.0.1", "--port", str(job.port)]
        command += ["--device", "cuda" if job.cuda else "cpu", *precision_flags(job, _PRECISIONS)]
        variables = {} if job.cuda else {"OMP_NUM_THREADS": str(job.threads)}
        return Launch([*command, *job.spec.args], variables)


def _program(python: str) -> tuple[str, ...]:
    return (str(Path(python).with_name("transformers")),)
