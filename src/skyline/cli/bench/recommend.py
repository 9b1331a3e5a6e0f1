from __future__ import annotations

from typing import Annotated

import typer

from skyline.cli import console
from skyline.cli.bench.options import StoreOption, opened


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

    from skyline.bench.recommend import Candidate, parse_objective
    from skyline.bench.recommend import recommend as choose
    from skyline.cli.bench.progress import interval

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
            "configuration": point.spec.label,
            "hardware": point.provenance.hardware.name,
            "output_per_device": candidate.throughput.model_dump(exclude_none=True),
            "probability": candidate.probability,
            "missing": candidate.missing,
            "command": point.provenance.engine_command,
            "measure_again": point.provenance.command,
        }

    if as_json:
        typer.echo(
            json.dumps({"recommended": [described(c) for c in keeping], "others": [described(c) for c in others]})
        )
        raise typer.Exit(0 if keeping else 1)
    screen = console.screen()
    wanted = ", ".join(limit.text for limit in objective)
    if not keeping:
        screen.print(f"Nothing that was measured keeps {wanted}. Nearest:", markup=False)
        for candidate in others[:3]:
            why = candidate.missing or f"kept with probability {candidate.probability:.0%}"
            screen.print(f"  {candidate.point.spec.label}: {why}", markup=False)
        raise typer.Exit(1)
    best = keeping[0]
    screen.print(f"[bold]{best.point.spec.label}[/bold]")
    screen.print(
        f"  {interval(best.point, 'output_per_device')} output tok/s/device (95 %), most of {len(keeping)} that keep"
    )
    screen.print(f"  {wanted}, with probability {best.probability:.0%}", markup=False)
    screen.print(f"  on {best.point.provenance.hardware.name}", markup=False)
    if best.point.provenance.engine_command:
        screen.print(f"\nStart it:\n  {best.point.provenance.engine_command}", markup=False, soft_wrap=True)
    screen.print(f"Measure it again:\n  {best.point.provenance.command}", markup=False)
    if keeping[1:]:
        screen.print("\nNext:")
        for candidate in keeping[1:4]:
            screen.print(
                f"  {candidate.point.spec.label}: {interval(candidate.point, 'output_per_device')} tok/s/device, "
                f"probability {candidate.probability:.0%}",
                markup=False,
            )
