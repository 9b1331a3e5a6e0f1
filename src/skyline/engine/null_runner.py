"""A runner without a model: every sampled token is the same. It measures what the engine itself costs."""

from __future__ import annotations

from dataclasses import dataclass

from skyline.engine.messages import StepCounts, StepOutput, StepPlan


@dataclass(slots=True)
class _Done:
    output: StepOutput

    def result(self) -> StepOutput:
        return self.output


class NullRunner:
    def __init__(self, token: int = 1) -> None:
        self._token = token

    def submit(self, plan: StepPlan) -> _Done:
        return _Done(StepOutput(plan.step, [self._token if sample else -1 for sample in plan.samples]))

    def idle(self) -> bool:
        return False

    def step_counts(self) -> StepCounts:
        return StepCounts()

    def close(self) -> None:
        pass
