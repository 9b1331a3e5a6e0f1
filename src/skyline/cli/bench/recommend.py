from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from skyline.cli import console
from skyline.cli.bench.options import StoreOption, opened

if TYPE_CHECKING:
    from skyline.bench.recommend import Candidate


def recommend(
    slo: Annotated[str, typer.Option(help="As in ttft=500ms,tpot=50ms; a bare name is its p90.")],
    model: Annotated[str | None, typer.Option(help="Only results of this model.")] = None,
    scenario: Annotated[str | None, typer.Option(help="Only results of this scenario.")] = None,
    run: Annotated[str | None, typer.Option(help="Only this run.", show_default="all runs")] = None,
    confidence: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Least probability that the objective is kept.")
    ] = 0.5,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    store: StoreOption = None,
) -> None:
    """Name the measured configuration with the most throughput that keeps an objective, and the command to start it."""
    import json

    from skyline.bench.recommend import parse_objective
    from skyline.bench.recommend import recommend as choose

    with opened(store) as results:
        objective = parse_objective(slo)
        points = results.points(None if run is None else results.run(run).id, model=model, workload=scenario)
        keeping, others = choose(points, results.accuracy(), objective, confidence)
    places = sorted({(c.point.spec.model.name, c.point.spec.workload.name) for c in [*keeping, *others]})
    if not places:
        console.fail("the store holds no valid result for this; measure with `skyline bench run quick`")
    if len(places) > 1:
        named = "; ".join(f"--model {m!r} --scenario {w!r}" for m, w in places)
        console.fail(f"results of several models or scenarios cannot be ranked together; choose one: {named}")

    def described(candidate: Candidate) -> dict[str, object]:
        point = candidate.point
        return {
            "point": point.id,
            "configuration": candidate.label,
            "hardware": point.provenance.hardware.name,
            "replicates": candidate.replicates,
            "output_per_device": candidate.throughput.model_dump(exclude_none=True),
            "probability": candidate.probability,
            "best": candidate.best,
            "missing": candidate.missing,
            "by_value": candidate.by_value,
            "command": point.provenance.engine_command,
            "measure_again": point.provenance.command,
        }

    if as_json:
        typer.echo(
            json.dumps({"recommended": [described(c) for c in keeping], "others": [described(c) for c in others]})
        )
        raise typer.Exit(0 if keeping else 1)
    _print(keeping, others, ", ".join(limit.text for limit in objective))
    raise typer.Exit(0 if keeping else 1)


def _print(keeping: list[Candidate], others: list[Candidate], wanted: str) -> None:
    screen = console.screen()
    if not keeping:
        screen.print(f"Nothing that was measured is known to keep {wanted}. Nearest:", markup=False)
        for candidate in others[:3]:
            why = f"kept with probability {candidate.probability:.0%}"
            if candidate.missing is not None:
                how = "kept by its values, how surely is unknown" if candidate.by_value else "cannot be judged"
                why = f"{how} ({candidate.missing})"
            screen.print(f"  {candidate.label}: {_throughput(candidate)}, {why}", markup=False, soft_wrap=True)
        return
    best, *rest = keeping
    screen.print(f"[bold]{best.label}[/bold]")
    screen.print(f"  {_throughput(best)}", markup=False)
    screen.print(f"  {_standing(best, len(keeping))}", markup=False)
    screen.print(f"  {wanted}, with probability {best.probability:.0%}", markup=False)
    replicates = f", {best.replicates} replicates" if best.replicates > 1 else ""
    screen.print(f"  on {best.point.provenance.hardware.name}{replicates}", markup=False)
    if best.point.provenance.engine_command:
        screen.print(f"\nStart it:\n  {best.point.provenance.engine_command}", markup=False, soft_wrap=True)
    if best.point.provenance.command:
        screen.print(f"Measure it again:\n  {best.point.provenance.command}", markup=False)
    if rest:
        screen.print("\nNext:")
        for candidate in rest[:3]:
            kept = f"kept with probability {candidate.probability:.0%}"
            chance = "unknown" if candidate.best is None else f"{candidate.best:.0%}"
            screen.print(
                f"  {candidate.label}: {_throughput(candidate)}, {kept}, the most with probability {chance}",
                markup=False,
                soft_wrap=True,
            )


def _throughput(candidate: Candidate) -> str:
    from skyline.cli.bench.progress import interval

    unit = "output tok/s/device"
    throughput = candidate.throughput
    known = throughput.refused is None and throughput.low is not None
    return f"{interval(throughput)} {unit}" + (" (95 %)" if known else "")


def _standing(best: Candidate, keeping: int) -> str:
    if keeping == 1:
        return "the only one that keeps the objective"
    most = f"the most of {keeping} that keep the objective"
    if best.best is None:
        return f"{most}; how surely is unknown: {best.throughput.refused}"
    return f"{most}, with probability {best.best:.0%}"
