"""The whole engine in one process, and the naive loop that it must agree with."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from skyline.checkpoint.config import load_config
from skyline.checkpoint.weights import SafetensorsWeights, load
from skyline.engine.config import EngineConfig
from skyline.engine.core import EngineCore
from skyline.engine.messages import EngineOutput, EngineRequest
from skyline.engine.sampling_params import SamplingParams
from skyline.models import create_model, destinations, ignorable, kv_caches
from skyline.ops import AttentionBatch
from skyline.runner.loader import load_model


@dataclasses.dataclass
class Job:
    """A request, when it arrives, and when (in steps) it is aborted."""

    name: str
    prompt: list[int]
    params: SamplingParams
    arrives: int = 0
    aborted_at: int | None = None
    priority: int = 0


@dataclasses.dataclass
class Result:
    token_ids: list[int] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None
    outputs: list[EngineOutput] = dataclasses.field(default_factory=list)


def run_engine(folder: Path, jobs: list[Job], **settings: Any) -> tuple[dict[str, Result], EngineCore]:
    """Run the jobs to their ends, checking the ownership of every KV block after every step."""
    loaded = load_model(EngineConfig(model=str(folder), threads=1, **settings))
    core = EngineCore(
        loaded.limits,
        loaded.runner,
        eos_token_ids=loaded.eos_token_ids,
        async_scheduling=settings.get("async_scheduling", True),
    )
    results = {job.name: Result() for job in jobs}

    def take(outputs: list[EngineOutput]) -> None:
        for output in outputs:
            result = results[output.request_id]
            result.outputs.append(output)
            result.token_ids += output.token_ids
            result.finish_reason = output.finish_reason or result.finish_reason

    step = 0
    while core.has_work or any(job.arrives >= step for job in jobs):
        for job in jobs:
            if job.arrives == step:
                refused = core.add(EngineRequest(job.name, job.prompt, job.params, job.priority))
                take([refused] if refused else [])
            if job.aborted_at == step:
                take(core.abort([job.name]))
        take(core.step())
        core.scheduler.check()
        step += 1
        assert step < 5000, "the engine makes no progress"
    assert core.stats().blocks_held == 0
    loaded.runner.close()
    return results, core


class NaiveModel:
    """Greedy decoding the slow way: every token recomputes its whole context, alone, in one piece."""

    def __init__(self, folder: Path) -> None:
        self.model = create_model(load_config(folder), torch.float32, "cpu")
        with SafetensorsWeights(folder) as weights:
            load(weights, destinations(self.model), ignore=ignorable(self.model))
        for cache in kv_caches(self.model):
            cache.allocate(1, 256, torch.device("cpu"))

    @torch.inference_mode()
    def logits(self, tokens: list[int]) -> torch.Tensor:
        """[len(tokens), vocab]"""
        batch = AttentionBatch.build([[0]], [0], [len(tokens)], 256, torch.device("cpu"))
        rows = torch.arange(len(tokens))
        return self.model(torch.tensor(tokens), rows, batch, rows).float()

    def generate(self, prompt: list[int], count: int, stop: frozenset[int] = frozenset()) -> list[int]:
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(int(self.logits(tokens)[-1].argmax()))
            if tokens[-1] in stop:
                break
        return tokens[len(prompt) :]
