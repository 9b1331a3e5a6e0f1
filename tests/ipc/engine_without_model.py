"""The engine process with the null runner in place of a model: everything of it but torch. Started by test_client.py.

`config.model` says how it behaves: "null" generates as fast as it can, "slow" waits 20 ms a step, "broken:N" fails
every step and "refuse:N" cannot start, both with an error of N bytes.
"""

from __future__ import annotations

import os
import sys
import time
import types

from skyline.engine.config import EngineConfig
from skyline.engine.messages import StepOutput, StepPlan
from skyline.engine.null_runner import NullRunner
from skyline.engine.scheduler import Limits


class _Handle:
    def __init__(self, plan: StepPlan, error: str) -> None:
        self._plan = plan
        self._error = error

    def result(self) -> StepOutput:
        if self._error:
            raise ValueError(self._error)
        time.sleep(0.02)
        return StepOutput(self._plan.step, [1 if samples else -1 for samples in self._plan.samples])


class _Runner(NullRunner):
    def __init__(self, behaviour: str) -> None:
        super().__init__()
        self._behaviour = behaviour

    def submit(self, plan: StepPlan):  # type: ignore[no-untyped-def, override]
        if self._behaviour == "null":
            return super().submit(plan)
        behaviour, _, count = self._behaviour.partition(":")
        return _Handle(plan, "the device is lost " + "!" * int(count) if behaviour == "broken" else "")


def load_model(config: EngineConfig) -> types.SimpleNamespace:
    behaviour, _, count = config.model.partition(":")
    if behaviour == "refuse":
        raise ValueError("no room for this model " + "!" * int(count))
    return types.SimpleNamespace(
        runner=_Runner(config.model),
        limits=Limits(num_blocks=256, block_size=16, max_num_seqs=8, max_num_batched_tokens=64, max_model_len=4096),
        eos_token_ids=frozenset(),
        vocab_size=100,
        report={"model": "none"},
    )


if __name__ == "__main__":
    loader = types.ModuleType("skyline.runner.loader")
    loader.load_model = load_model  # type: ignore[attr-defined]
    sys.modules["skyline.runner.loader"] = loader
    from skyline.ipc.engine_process import main

    code = main()
    sys.stderr.flush()
    os._exit(code)  # as the engine process itself does
