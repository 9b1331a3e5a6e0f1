"""Nothing in a step waits for the device: no value of a tensor is looked at on the host.

Without a GPU that is told by the ops of aten that would wait there, with Triton's kernels launched as on one, but
computing nothing. With one, torch itself raises where something waits.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

from skyline.engine.messages import EngineRequest, StepPlan
from skyline.engine.sampling_params import SamplingParams
from skyline.runner.model_runner import ModelRunner
from skyline.runner.sampling import choose
from tests.runner.test_decode_graphs import engine
from tests.tiny import make_tiny_checkpoint

# Ops that give numbers, or tensors whose size depends on numbers.
WAITING = {
    "aten::_local_scalar_dense",
    "aten::equal",
    "aten::is_nonzero",
    "aten::item",
    "aten::masked_select",
    "aten::nonzero",
    "aten::repeat_interleave",
    "aten::_unique",
    "aten::_unique2",
    "aten::unique_dim",
}

PARAMS = {
    "greedy": SamplingParams(temperature=0, max_tokens=5),
    "top-p": SamplingParams(temperature=0.7, top_p=0.9, max_tokens=5),
    "top-k": SamplingParams(temperature=0.7, top_k=7, min_p=0.1, max_tokens=5),
    "large top-k": SamplingParams(temperature=0.7, top_k=400, max_tokens=5),
    "logprobs": SamplingParams(temperature=0, logprobs=3, max_tokens=5),
    "penalties": SamplingParams(
        temperature=0.7, frequency_penalty=0.3, presence_penalty=0.1, repetition_penalty=1.2, max_tokens=5
    ),
    "rules": SamplingParams(
        temperature=0.7,
        logit_bias={5: 1.0},
        min_tokens=2,
        stop_token_ids=[9],
        bad_words_token_ids=[[1, 2], [7]],
        allowed_token_ids=[3, 4, 5, 7],
        max_tokens=5,
    ),
}


class _Watch(TorchDispatchMode):
    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self._seen = seen

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = op._schema.name
        masked = name in ("aten::index", "aten::index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if name in WAITING or masked:
            frames = [frame for frame in traceback.extract_stack() if "/skyline/" in frame.filename]
            self._seen.append(f"{name} in {Path(frames[-1].filename).name}:{frames[-1].lineno}")
        return op(*args, **(kwargs or {}))


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[SamplingParams], list[str]]:
    """What waits in steps of three requests with the same parameters."""
    folder, seen = make_tiny_checkpoint(tmp_path / "tiny", "qwen3"), list[str]()
    compute, empty = ModelRunner._compute, torch.empty
    if not torch.cuda.is_available():
        monkeypatch.setattr(interpreter, "GridExecutor", lambda *_: lambda *_, **__: None)
        monkeypatch.setattr(choose, "is_native", lambda logits: False)
        monkeypatch.setattr(choose, "is_triton", lambda logits: True)
        # What no kernel writes has to be in range: tokens are embedded.
        monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).zero_())

    def watched(self: ModelRunner, plan: StepPlan) -> Any:
        if not torch.cuda.is_available():
            with _Watch(seen):
                return compute(self, plan)
        torch.cuda.set_sync_debug_mode("error")
        try:
            return compute(self, plan)
        except RuntimeError as error:
            seen.append(str(error))
            raise  # which fails the step
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(ModelRunner, "_compute", watched)

    def run(params: SamplingParams) -> list[str]:
        core, runner = engine(folder, False, "cuda")
        for number in range(3):
            prompt = [(number * 37 + place) % 500 + 1 for place in range(5)]
            assert core.add(EngineRequest(str(number), prompt, params)) is None
        steps = 0
        while core.has_work and steps < 12:
            core.step()
            steps += 1
        runner.close()
        assert seen or core.stats().generated_tokens >= 3 * 4
        return seen

    return run


@pytest.mark.parametrize("kind", PARAMS)
def test_no_step_waits_for_the_device(kind: str, waits: Callable[[SamplingParams], list[str]]) -> None:
    assert waits(PARAMS[kind]) == []


@pytest.mark.parametrize(
    "look", [lambda ids: ids[0, 0].item(), lambda ids: ids[ids > 3], lambda ids: bool((ids == 0).all())]
)
def test_what_waits_is_seen(
    look: Callable[[torch.Tensor], object],
    waits: Callable[[SamplingParams], list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    apply = ModelRunner._apply

    def looking(self: ModelRunner, plan: StepPlan) -> None:
        apply(self, plan)
        look(self._token_ids)

    monkeypatch.setattr(ModelRunner, "_apply", looking)
    assert waits(PARAMS["greedy"])
