"""Suites: what to measure, as YAML, and the points that follow from it.

    name: quick
    models:    [{name: demo, source: demo}]
    engines:   [{engine: skyline}, {engine: llama.cpp, args: ["--threads", "2"]}]
    scenarios: [{name: 1k/1k, input: 1024, output: 1024, load: {kind: closed, concurrency: [1, 2, 4, 8]}}]

A point is one engine serving one model under one load; `Suite.points()` lists them in the order in which they are run.
Everything a point depends on is in its `PointSpec`, whose `key` is a hash of it: the same key is the same measurement.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import pydantic
import yaml
from pydantic import Field, model_validator

from skyline.bench.loads import Level, Load, Name, Seconds, Spec, Tokens

SHIPPED = Path(__file__).parent / "suites"


class SuiteError(ValueError):
    """The suite cannot be used; the message says where it is wrong and what would be right."""


class ModelSpec(Spec):
    """`source` is what engines are given: a folder, a name on the hub, or "demo", the model inside the package."""

    name: Name
    source: str
    # Where prompts are made of exact numbers of tokens; the source by default.
    tokenizer: str | None = None
    # Per engine where it needs another file, as llama.cpp does: {llama.cpp: /models/model.gguf}.
    sources: dict[str, str] = {}

    def source_for(self, engine: str) -> str:
        return self.sources.get(engine, self.source)


class EngineSpec(Spec):
    """One way to start one engine. `name` labels it in results; two entries of a suite differ in it."""

    engine: Name
    name: Name = ""
    # What is installed: a version, "installed" (found on PATH or in this environment), or the newest where it is left
    # out.
    version: str | None = None
    args: list[str] = []
    env: dict[str, str] = {}
    # An endpoint that already runs; nothing is installed, started or stopped then.
    url: str | None = None
    api_key_env: str | None = Field(None, description="Name of the variable that holds the endpoint's key")
    served_model: str | None = Field(
        None, description="The model's name at the endpoint; the first it lists by default"
    )
    # What serves at the endpoint, as in "8x NVIDIA H100": it cannot be seen from here.
    hardware: Name | None = None
    precision: str = "bf16"
    speculation: str = "none"
    tensor_parallel: Annotated[int, Field(ge=1, le=4096)] = 1
    data_parallel: Annotated[int, Field(ge=1, le=4096)] = 1
    expert_parallel: Annotated[int, Field(ge=1, le=4096)] = 1
    # Accelerators in use (a CPU machine is one): throughput is divided by it.
    devices: Annotated[int, Field(ge=1, le=100_000)] = 1
    start_timeout_s: Seconds = 600.0

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("engine"), str):
            data = dict(data)
            data.setdefault("name", data["engine"])
            if "devices" not in data:
                sizes = [data.get("tensor_parallel", 1), data.get("data_parallel", 1)]
                if all(isinstance(size, int) for size in sizes):
                    data["devices"] = math.prod(sizes)
        return data

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.engine == "url" and self.url is None:
            raise ValueError("engine url needs `url`, the address of an OpenAI-compatible endpoint")
        if self.hardware is not None and self.url is None:
            raise ValueError("hardware is for an endpoint at a `url`; that of this machine is read from it")
        if self.url is not None and (self.args or self.env or self.version):
            raise ValueError("args, env and version are for a server that is started here; leave them out beside `url`")
        return self


class Sessions(Spec):
    """Conversations: each request repeats the session's turns so far and adds `input` new tokens. All sessions begin
    with the same `shared_prefix` tokens, as under one system prompt. A prefix cache is meant to be hit here."""

    turns: Annotated[int, Field(ge=2, le=1000)]
    shared_prefix: Annotated[int, Field(ge=0, le=1_000_000)] = 0


class Scenario(Spec):
    """Lengths in tokens. With `ratio` r < 1 a request's lengths are uniform in [r·length, length], as InferenceMAX has
    them (there r = 0.8); output lengths are asked for with ignore_eos where an engine knows it."""

    name: Name
    input: Tokens
    output: Tokens
    ratio: Annotated[float, Field(gt=0, le=1)] = 1.0
    # Through the chat endpoint, with the chat template's tokens counted as input; else through /v1/completions.
    chat: bool = True
    sessions: Sessions | None = None
    load: Load

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.sessions is not None and not self.chat:
            raise ValueError("sessions are conversations: leave out `chat: false`")
        if self.sessions is not None and self.load.kind != "closed":
            raise ValueError("sessions need a closed load: a turn waits for the answer before it")
        return self


class Workload(Spec):
    """A scenario without its ladder: what each request of a point looks like."""

    name: Name
    input: Tokens
    output: Tokens
    ratio: float
    chat: bool
    sessions: Sessions | None


class Measure(Spec):
    """How long a point is measured. It ends when it has lasted `min_s` and as many requests have ended as asked for,
    and after `max_s` in any case; a ramp only then, and a trace when all of its requests have ended. The warm-up before
    is at least `warmup_s` long and flows into the measurement."""

    warmup_s: Annotated[float, Field(ge=0, le=3600)] = 5.0
    min_s: Seconds = 20.0
    max_s: Seconds = 300.0
    requests: Annotated[int, Field(ge=1, le=10_000_000)] = 64
    # As many requests as this for each of the clients of a closed load, if that is more (InferenceMAX has ten).
    requests_per_client: Annotated[int, Field(ge=0, le=1000)] = 4
    replicates: Annotated[int, Field(ge=1, le=100)] = 1
    # A request is given up after that long.
    request_timeout_s: Seconds = 600.0
    # Processes that send requests: chosen by the load where it is left out.
    workers: Annotated[int, Field(ge=1, le=256)] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.max_s < self.min_s:
            raise ValueError(f"max_s ({self.max_s:g}) must not be below min_s ({self.min_s:g})")
        return self


class Slo(Spec):
    """What each request must keep to count for goodput. In seconds."""

    ttft_s: Seconds | None = None
    tpot_s: Seconds | None = None
    e2e_s: Seconds | None = None


class Accuracy(Spec):
    """An exact-match task asked through the same endpoint. Below `at_least` a configuration leaves the frontier.

    demo: the embedded model's held-out word problems. jsonl: lines of {"question", "answer"} in `file`, the answer
    being what follows the last ####, GSM8K's format. lm-eval: a task of lm-evaluation-harness, in an environment of
    its own.
    """

    task: str = "demo"
    file: str | None = None
    limit: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    at_least: Annotated[float, Field(ge=0, le=1)]
    concurrency: Annotated[int, Field(ge=1, le=1000)] = 8
    max_tokens: Tokens = 256
    # Models of the suite that the task is for; all by default.
    models: list[str] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.task == "jsonl") != (self.file is not None):
            raise ValueError("`file` goes with task jsonl, and with no other")
        if self.task not in ("demo", "jsonl") and not self.task.startswith("lm-eval:"):
            raise ValueError(f"unknown accuracy task {self.task!r}: demo, jsonl or lm-eval:TASK, as in lm-eval:gsm8k")
        return self


class PointSpec(Spec):
    """All that one measurement depends on, and so what it takes to repeat it."""

    engine: EngineSpec
    model: ModelSpec
    workload: Workload
    level: Level
    measure: Measure
    slo: Slo | None = None
    replicate: int = 0
    seed: int = 0

    @property
    def key(self) -> str:
        return _hash(self.model_dump(mode="json"))

    @property
    def label(self) -> str:
        parts = [self.engine.name, self.model.name, self.workload.name, self.level.label]
        if self.measure.replicates > 1:
            parts.append(f"replicate {self.replicate + 1}")
        return " · ".join(parts)

    def expected_seconds(self) -> tuple[float, float]:
        """The least and the most that measuring may take, without starting the engine. How long a trace is stands in
        its file, which is not read for this: it may end right after the warm-up."""
        least = {"ramp": self.measure.max_s, "trace": 0.0}.get(self.level.kind, self.measure.min_s)
        return self.measure.warmup_s + least, self.measure.warmup_s + self.measure.max_s


class Suite(Spec):
    """Every engine × model × scenario × step of its ladder × replicate."""

    name: Name
    description: str = ""
    models: Annotated[list[ModelSpec], Field(min_length=1)]
    engines: Annotated[list[EngineSpec], Field(min_length=1)]
    scenarios: Annotated[list[Scenario], Field(min_length=1)]
    measure: Measure = Measure()
    slo: Slo | None = None
    accuracy: Accuracy | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    # {engine: ..., model: ..., scenario: ...}: combinations to leave out; what is not named matches all.
    exclude: list[dict[Literal["engine", "model", "scenario"], str]] = []

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for what, names in (
            ("models", [model.name for model in self.models]),
            ("engines", [engine.name for engine in self.engines]),
            ("scenarios", [scenario.name for scenario in self.scenarios]),
        ):
            twice = {name for name in names if names.count(name) > 1}
            if twice:
                raise ValueError(
                    f"{what}: {', '.join(sorted(twice))} stands there twice; give each a `name` of its own"
                )
        known = {
            "engine": {engine.name for engine in self.engines},
            "model": {model.name for model in self.models},
            "scenario": {scenario.name for scenario in self.scenarios},
        }
        for rule in self.exclude:
            for what, name in rule.items():
                if name not in known[what]:
                    raise ValueError(f"exclude: there is no {what} {name!r}")
        for name in (self.accuracy.models or []) if self.accuracy else []:
            if name not in known["model"]:
                raise ValueError(f"accuracy: there is no model {name!r}")
        return self

    @property
    def hash(self) -> str:
        return _hash(self.model_dump(mode="json"))

    def points(self) -> Iterator[PointSpec]:
        """Engine by engine, so that each is started once; within it model, replicate, scenario and level.

        All replicates of a ladder are run before the next of its repetition, so that drift of the machine is spread.
        """
        for engine in self.engines:
            for model in self.models:
                for replicate in range(self.measure.replicates):
                    for scenario in self.scenarios:
                        if self._excluded(engine.name, model.name, scenario.name):
                            continue
                        fields = {name: getattr(scenario, name) for name in Workload.model_fields}
                        workload = Workload(**fields)
                        for level in scenario.load.levels():
                            yield PointSpec(
                                engine=engine,
                                model=model,
                                workload=workload,
                                level=level,
                                measure=self.measure,
                                slo=self.slo,
                                replicate=replicate,
                                seed=self.seed + replicate,
                            )

    def _excluded(self, engine: str, model: str, scenario: str) -> bool:
        names = {"engine": engine, "model": model, "scenario": scenario}
        return any(all(names[what] == name for what, name in rule.items()) for rule in self.exclude)


def single(spec: PointSpec, accuracy: Accuracy | None = None) -> Suite:
    """The suite of this one point, to measure it again; `accuracy` is the gate of the suite that it was of."""
    if accuracy is not None and spec.model.name not in (accuracy.models or [spec.model.name]):
        accuracy = None
    return Suite.model_validate(
        {
            "name": "rerun",
            "models": [spec.model.model_dump()],
            "engines": [spec.engine.model_dump()],
            "scenarios": [{**spec.workload.model_dump(), "load": spec.level.load()}],
            "measure": {**spec.measure.model_dump(), "replicates": 1},
            "slo": None if spec.slo is None else spec.slo.model_dump(),
            "accuracy": None if accuracy is None else {**accuracy.model_dump(), "models": None},
            "seed": spec.seed,
        }
    )


def load_suite(name_or_path: str) -> Suite:
    """A suite that ships with the package (quick, inferencemax), or a YAML file. Raises SuiteError."""
    path = Path(name_or_path)
    if not path.suffix and (SHIPPED / f"{name_or_path}.yaml").is_file():
        path = SHIPPED / f"{name_or_path}.yaml"
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        shipped = ", ".join(sorted(file.stem for file in SHIPPED.glob("*.yaml")))
        raise SuiteError(f"cannot read the suite {name_or_path} ({error}); shipped suites: {shipped}") from None
    return parse_suite(text, str(path))


def parse_suite(text: str, where: str = "the suite") -> Suite:
    """The suite in this YAML text. Raises SuiteError with one line for each thing that is wrong."""
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SuiteError(f"{where} is not valid YAML: {error}") from None
    if not isinstance(data, dict):
        raise SuiteError(f"{where} must be a mapping with name, models, engines and scenarios")
    try:
        return Suite.model_validate(data)
    except pydantic.ValidationError as error:
        lines = [f"  {'.'.join(map(str, item['loc'])) or 'suite'}: {item['msg']}" for item in error.errors()]
        raise SuiteError(f"{where} is wrong:\n" + "\n".join(lines)) from None


def _hash(data: object) -> str:
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
