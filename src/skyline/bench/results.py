"""What was measured: one versioned schema for the store, JSON files, the dashboard and importers.

A `Run` is one execution of a suite; a `PointResult` is one of its points with everything it takes to judge and to
repeat it.
"""

from __future__ import annotations

import datetime
import uuid
from typing import Literal

import pydantic
from pydantic import Field

from skyline.bench.estimate import Estimate
from skyline.bench.suite import PointSpec, Suite

SCHEMA_VERSION = 1

Floats = list[float | None]


def new_id() -> str:
    return uuid.uuid4().hex


def now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


class Record(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Verdict(Record):
    """`status` in one word, and how it came about in a sentence."""

    status: Literal["valid", "invalid", "unknown"]
    reason: str


class Hardware(Record):
    """The machine that served. `name` is what results are grouped by: the accelerators, or the CPU with its cores."""

    name: str
    cpu: str = ""
    cores: int = 0
    memory_bytes: int = 0
    flags: list[str] = []
    accelerators: list[str] = []
    driver: str | None = None
    system: str = ""


class Provenance(Record):
    """Where a result comes from. `command` repeats it."""

    skyline_version: str
    python_version: str
    hardware: Hardware
    engine_version: str | None = None
    # The command line that was started, with its environment variables in front.
    engine_command: str | None = None
    # Versions of the packages in the engine's environment that speed depends on, torch's among them.
    engine_packages: dict[str, str] = {}
    command: str | None = None
    suite_hash: str | None = None
    # Tool and file of an imported result; measured here if None.
    imported_from: str | None = None


class ServerFacts(Record):
    """Seconds from process start to the first answered request, and the most memory the processes held (sum of PSS or
    RSS, bytes; what was sampled is said)."""

    startup_s: float | None = None
    peak_memory_bytes: int | None = None
    memory_method: str | None = None


class RequestTable(Record):
    """The requests of a point by columns, in order of sending. Times are seconds since the load began.

    `error` is None where the request ended well. `output` is what usage reports where it does, else counted from text.
    """

    intended: Floats = []
    start: Floats = []
    first: Floats = []
    last: Floats = []
    end: Floats = []
    input: list[int] = []
    output: list[int] = []
    error: list[str | None] = []

    def __len__(self) -> int:
        return len(self.start)


class Timeline(Record):
    """What arrived when: output tokens and requests under way in consecutive bins of `bin_s` seconds since the load
    began.

    `running` is the mean number of requests under way in the bin."""

    bin_s: float
    tokens: list[float]
    running: list[float]


class Window(Record):
    """The measured part of the load, in its seconds.

    `truncated_s` is what MSER cut beyond the planned warm-up; `little` is L / (λ·W) of Little's law over the window,
    1 in a steady state; `steady` says whether it is within tolerance."""

    begin_s: float
    end_s: float
    truncated_s: float
    little: float | None
    steady: bool
    reason: str | None = None

    @property
    def seconds(self) -> float:
        return self.end_s - self.begin_s


class ClientHealth(Record):
    """The load generator's own part in the numbers.

    `loop_lag_*`: lateness of a timer on the workers' event loops. `schedule_delay_p99_s`: lateness of sent
    requests against their intended start. `cpu_share`: the busiest worker's CPU time by wall time. `null_*`: what the
    same workers get from a server that does nothing, and `headroom` = null output throughput / measured output
    throughput."""

    workers: int
    loop_lag_mean_s: float
    loop_lag_p99_s: float
    schedule_delay_p99_s: float
    cpu_share: float
    null_output_throughput: float | None = None
    null_ttft_p50_s: float | None = None
    headroom: float | None = None
    limited: bool
    reason: str


class TokenCheck(Record):
    """Output counted twice over a sample of the requests that ended: `usage` as the server reports it, `text` by the
    tokenizer from the text that arrived. Either is None where there is none; without `text`, `usage` is of all.

    `events` is how many stream events of all requests held text. `tokens_per_event`, by text where it was counted,
    above 1 means that tokens came bundled, so ITL is of bundles. `without_text` is the share of tokens that came
    without text, as those after an ignored end token do. `mismatch` says why the two counts cannot both be right.
    `input_error` is the mean of (usage's prompt tokens − tokens meant to be sent), of first turns where there are
    sessions."""

    usage: int | None
    text: int | None
    events: int
    tokens_per_event: float | None
    bundled: bool
    without_text: float | None = None
    mismatch: str | None = None
    input_error: float | None = None
    # Requests that generated another number of tokens than asked for.
    wrong_length: int = 0


class Energy(Record):
    """Joules over the window and what they cover. `verdict` says whether they may be compared."""

    joules: float | None
    source: str | None
    verdict: Verdict


class AccuracyResult(Record):
    """`exact_match` with its binomial standard error, of `total` questions asked through the endpoint."""

    id: str = Field(default_factory=new_id)
    run: str
    engine: str
    model: str
    task: str
    exact_match: float | None
    standard_error: float | None
    total: int
    at_least: float
    passed: bool
    reason: str | None = None
    finished: datetime.datetime = Field(default_factory=now)


class PointResult(Record):
    """One measured point. `metrics` is keyed as `skyline.bench.metrics.keys()` says; a metric that does not apply is
    not there.

    `status`: ok; failed (nothing was measured, `reason` says why); invalid (measured, but a check failed, `reason` says
    which: such a point is shown and never on the frontier)."""

    schema_version: int = SCHEMA_VERSION
    id: str = Field(default_factory=new_id)
    run: str
    key: str
    spec: PointSpec
    status: Literal["ok", "failed", "invalid"]
    reason: str | None = None
    started: datetime.datetime
    finished: datetime.datetime
    provenance: Provenance
    metrics: dict[str, Estimate] = {}
    window: Window | None = None
    server: ServerFacts | None = None
    client: ClientHealth | None = None
    cache: Verdict | None = None
    tokens: TokenCheck | None = None
    energy: Energy | None = None
    requests: RequestTable | None = None
    timeline: Timeline | None = None

    def value(self, key: str) -> float | None:
        """The metric's value, or None where it is missing or refused."""
        estimate = self.metrics.get(key)
        return None if estimate is None else estimate.value


class Run(Record):
    """One execution of a suite. `status` is running until it ended; a killed run stays so and can be resumed."""

    schema_version: int = SCHEMA_VERSION
    id: str = Field(default_factory=new_id)
    suite: Suite
    suite_hash: str
    # Free text to tell runs apart, as a branch or a commit.
    label: str | None = None
    status: Literal["running", "finished", "failed"] = "running"
    started: datetime.datetime = Field(default_factory=now)
    finished: datetime.datetime | None = None
    provenance: Provenance


class Export(Record):
    """A JSON file of results: what `skyline bench store export` writes and `import` reads."""

    schema_version: int = SCHEMA_VERSION
    runs: list[Run]
    points: list[PointResult]
    accuracy: list[AccuracyResult] = []
