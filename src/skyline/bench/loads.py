"""The loads of a suite, and the levels that are the steps of their ladders."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

import pydantic
from pydantic import Field, model_validator

Name = Annotated[str, Field(min_length=1, max_length=100, pattern=r"^[^\x00-\x1f]+$")]
Tokens = Annotated[int, Field(ge=1, le=10_000_000)]
Rate = Annotated[float, Field(gt=0, le=1_000_000)]
Seconds = Annotated[float, Field(gt=0, le=7 * 24 * 3600)]


class Spec(pydantic.BaseModel):
    """Frozen, and nothing is accepted that is not used."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Closed(Spec):
    """Each of `concurrency` clients sends its next request when the last has ended."""

    kind: Literal["closed"]
    concurrency: Annotated[list[Annotated[int, Field(ge=1, le=100_000)]], Field(min_length=1)]
    think_time_s: Annotated[float, Field(ge=0, le=3600)] = 0.0

    def levels(self) -> list[Level]:
        return [Level(kind="closed", concurrency=n, think_time_s=self.think_time_s) for n in self.concurrency]


class Open(Spec):
    """Requests start when they are due, whatever became of those before. Gaps are constant or random with mean 1/rate.

    poisson: exponential gaps. gamma: gaps with coefficient of variation `cv`; below 1 is smoother than Poisson, above 1
    burstier (https://arxiv.org/abs/2307.04180 and vLLM's `--burstiness`, which is 1/cv²).
    """

    kind: Literal["constant", "poisson", "gamma"]
    rate: Annotated[list[Rate], Field(min_length=1)]
    cv: Annotated[float, Field(gt=0, le=100)] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.kind == "gamma") != (self.cv is not None):
            raise ValueError("`cv` (the gaps' coefficient of variation) goes with kind gamma, and with no other")
        return self

    def levels(self) -> list[Level]:
        return [Level(kind=self.kind, rate=rate, cv=self.cv) for rate in self.rate]


class Ramp(Spec):
    """Poisson arrivals whose rate grows linearly from `start`, when the load begins, to `end`, `max_s` after the
    warm-up."""

    kind: Literal["ramp"]
    start: Rate
    end: Rate

    def levels(self) -> list[Level]:
        return [Level(kind="ramp", rate=self.start, end_rate=self.end)]


class Trace(Spec):
    """Replays a file of JSON lines {"timestamp": ms, "input_length": n, "output_length": n}, as Mooncake publishes them
    (https://github.com/kvcache-ai/Mooncake), at each of `speed` times its own pace. Lengths are the trace's.
    """

    kind: Literal["trace"]
    file: str
    speed: Annotated[list[Rate], Field(min_length=1)] = [1.0]

    def levels(self) -> list[Level]:
        return [Level(kind="trace", trace=self.file, rate=speed) for speed in self.speed]


Load = Annotated[Closed | Open | Ramp | Trace, Field(discriminator="kind")]


class Level(Spec):
    """One step of the ladder. `rate` is in requests/s, or the speed of a trace."""

    kind: Literal["closed", "constant", "poisson", "gamma", "ramp", "trace"]
    concurrency: int | None = None
    think_time_s: float = 0.0
    rate: float | None = None
    end_rate: float | None = None
    cv: float | None = None
    trace: str | None = None

    @property
    def label(self) -> str:
        match self.kind:
            case "closed":
                return f"concurrency {self.concurrency}"
            case "ramp":
                return f"ramp {self.rate:g} to {self.end_rate:g} req/s"
            case "trace":
                return f"trace at {self.rate:g}x"
            case _:
                return f"{self.kind} {self.rate:g} req/s"

    def load(self) -> dict[str, Any]:
        """The load, as a suite has it, that has this step only."""
        match self.kind:
            case "closed":
                only: dict[str, Any] = {"concurrency": [self.concurrency], "think_time_s": self.think_time_s}
            case "ramp":
                only = {"start": self.rate, "end": self.end_rate}
            case "trace":
                only = {"file": self.trace, "speed": [self.rate]}
            case _:
                only = {"rate": [self.rate], "cv": self.cv}
        return {"kind": self.kind, **only}
