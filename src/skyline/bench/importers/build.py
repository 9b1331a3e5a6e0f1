"""From drafts to a run with its points."""

from __future__ import annotations

import hashlib
import platform
from importlib.metadata import version
from typing import Any

import pydantic

from skyline.bench.importers.draft import Draft, Facts
from skyline.bench.importers.fields import ResultFileError
from skyline.bench.loads import Level
from skyline.bench.results import Export, Hardware, PointResult, Provenance, Run
from skyline.bench.suite import EngineSpec, Measure, ModelSpec, PointSpec, Suite, Workload

_DAY_S = 24 * 3600.0


def build(tool: str, file: str, content: bytes, drafts: list[Draft], facts: Facts) -> Export:
    """Ids follow from the file's content: to import it again, perhaps with better facts, replaces what it gave."""
    run = hashlib.sha256(b"imported run\0" + content).hexdigest()[:32]
    try:
        drafts = [_corrected(draft, facts) for draft in drafts]
        specs = _specs(drafts, facts)
        points = [
            _point(draft, spec, run, hashlib.sha256(f"{run} {index}".encode()).hexdigest()[:32], f"{tool}: {file}")
            for index, (draft, spec) in enumerate(zip(drafts, specs, strict=True))
        ]
        suite = _suite(f"imported: {_plain(file)}"[:100], specs)
        record = Run(
            id=run,
            suite=suite,
            suite_hash=suite.hash,
            label=facts.label or file,
            status="finished",
            started=min(draft.started for draft in drafts),
            finished=max(draft.finished for draft in drafts),
            provenance=points[0].provenance.model_copy(update={"suite_hash": suite.hash}),
        )
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ResultFileError(f"{file}: what it holds is out of range ({place}: {first['msg']})") from None
    return Export(runs=[record], points=points)


def _corrected(draft: Draft, facts: Facts) -> Draft:
    for name in ("engine", "engine_version", "model", "hardware", "devices", "precision", "speculation"):
        given = getattr(facts, name)
        if given is not None:
            setattr(draft, name, given)
    draft.input, draft.output = facts.input or draft.input, facts.output or draft.output
    draft.complete(draft.devices or 1)
    return draft


def _specs(drafts: list[Draft], facts: Facts) -> list[PointSpec]:
    engines = [_engine(draft) for draft in drafts]
    distinct = [engine.name for number, engine in enumerate(engines) if engine not in engines[:number]]
    crowded = {name for name in distinct if distinct.count(name) > 1}
    specs: list[PointSpec] = []
    seen: dict[str, int] = {}
    for draft, engine in zip(drafts, engines, strict=True):
        if engine.name in crowded:
            engine = engine.model_copy(update={"name": _detailed(engine)})
        spec = PointSpec(
            engine=engine,
            model=ModelSpec(name=draft.model, source=draft.model),
            workload=_workload(draft, facts),
            level=draft.level,
            measure=_measure(draft),
        )
        # What a file holds twice under the same configuration is a repetition.
        replicate = seen.get(spec.key, 0)
        seen[spec.key] = replicate + 1
        specs.append(spec.model_copy(update={"replicate": replicate, "seed": replicate}))
    return specs


def _engine(draft: Draft) -> EngineSpec:
    return EngineSpec(
        engine=draft.engine,
        name=draft.engine,
        api_key_env=None,
        served_model=None,
        precision=draft.precision,
        speculation=draft.speculation,
        tensor_parallel=draft.tensor_parallel,
        expert_parallel=draft.expert_parallel,
        devices=draft.devices or 1,
    )


def _detailed(engine: EngineSpec) -> str:
    """A name that tells the configurations of one file apart."""
    parts = [engine.engine, f"×{engine.devices}", f"tp{engine.tensor_parallel}", f"ep{engine.expert_parallel}"]
    parts += [text for text in (engine.precision, engine.speculation) if text not in ("unknown", "none")]
    return " ".join(parts)[:100]


def _workload(draft: Draft, facts: Facts) -> Workload:
    def short(tokens: int) -> str:
        return f"{tokens // 1024}k" if tokens >= 1024 and tokens % 1024 == 0 else str(tokens)

    name = f"{short(draft.input)}/{short(draft.output)}"
    ratio = facts.ratio or 1.0
    return Workload(name=name, input=draft.input, output=draft.output, ratio=ratio, chat=draft.chat, sessions=None)


def _measure(draft: Draft) -> Measure:
    """These tools send a number of requests without a warm-up of their own, however long it takes."""
    if draft.sent is None:
        return Measure(warmup_s=0.0)
    return Measure(warmup_s=0.0, min_s=1.0, max_s=_DAY_S, requests=draft.sent, requests_per_client=0)


def _point(draft: Draft, spec: PointSpec, run: str, id_: str, imported_from: str) -> PointResult:
    hardware = Hardware(name=draft.hardware, accelerators=draft.accelerators)
    failed = draft.nothing is not None
    return PointResult(
        id=id_,
        run=run,
        key=spec.key,
        spec=spec,
        status="failed" if failed else "invalid" if draft.wrong else "ok",
        reason=draft.nothing or draft.wrong,
        started=draft.started,
        finished=draft.finished,
        provenance=Provenance(
            skyline_version=version("skyline-llm"),
            python_version=platform.python_version(),
            hardware=hardware,
            engine_version=draft.engine_version,
            imported_from=imported_from,
        ),
        metrics={} if failed else draft.metrics,
        window=None if failed else draft.window,
        energy=None if failed else draft.energy,
        requests=draft.table,
    )


def _suite(name: str, specs: list[PointSpec]) -> Suite:
    """All of the points' engines, models and loads; the points themselves say which belong together."""
    loads: dict[str, tuple[Workload, list[Level]]] = {}
    for spec in specs:
        level = spec.level
        shape = (spec.workload.name, level.kind, level.cv, level.kind == "ramp" and (level.rate, level.end_rate))
        levels = loads.setdefault(repr(shape), (spec.workload, []))[1]
        if level not in levels:
            levels.append(level)
    names = [workload.name for workload, _ in loads.values()]
    scenarios = []
    for number, (workload, levels) in enumerate(loads.values()):
        alone = names.count(workload.name) == 1
        fields = workload.model_dump() | {"load": _load(levels)}
        scenarios.append(fields if alone else fields | {"name": f"{workload.name} {levels[0].kind} {number + 1}"})
    return Suite.model_validate(
        {
            "name": name,
            "models": list({spec.model.name: spec.model.model_dump() for spec in specs}.values()),
            "engines": list({spec.engine.name: spec.engine.model_dump() for spec in specs}.values()),
            "scenarios": scenarios,
            "measure": specs[0].measure.model_dump(),
        }
    )


def _load(levels: list[Level]) -> dict[str, Any]:
    first = levels[0]
    match first.kind:
        case "closed":
            return {"kind": "closed", "concurrency": list(dict.fromkeys(level.concurrency for level in levels))}
        case "ramp":
            return {"kind": "ramp", "start": first.rate, "end": first.end_rate}
        case _:
            rates = list(dict.fromkeys(level.rate for level in levels))
            return {"kind": first.kind, "rate": rates, "cv": first.cv}


def _plain(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)
