from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from skyline.cli import console
from skyline.cli.bench.options import FolderOption, StoreOption, bench_folder, opened, suite_of

if TYPE_CHECKING:
    from pathlib import Path

    from skyline.bench.results import PointResult
    from skyline.bench.stats.compare import Comparison
    from skyline.bench.store import Store

PAIRS = 5
SAID = {
    "better": "[bold]better[/bold] than",
    "worse": "[bold]worse[/bold] than",
    "same": "[bold]the same[/bold] as",
    "undecided": "[bold]undecided[/bold] against",
}


def compare(
    a: Annotated[
        str,
        typer.Argument(help="The baseline: an engine of --suite, or a stored run (id or label), or RUN:ENGINE of it."),
    ],
    b: Annotated[str, typer.Argument(help="What is compared with it, named the same way.")],
    suite: Annotated[
        str | None,
        typer.Option(help="Measure A and B in turns over this suite's ladder.", show_default="compare stored runs"),
    ] = None,
    pairs: Annotated[
        int | None, typer.Option(min=4, help="How often both are measured.", show_default=str(PAIRS))
    ] = None,
    engine: Annotated[str | None, typer.Option(help="Engine to look at, where stored runs hold several.")] = None,
    margin: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            max=0.5,
            help="Smaller differences do not count.",
            show_default="the noise floor, at least 2 % and at most 5 %",
        ),
    ] = None,
    metric: Annotated[
        list[str] | None, typer.Option(help="Metrics to compare.", show_default="throughput, interactivity, TTFT")
    ] = None,
    label: Annotated[str | None, typer.Option(help="Tells this run apart.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the last of these comparisons that was cut short.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    store: StoreOption = None,
    folder: FolderOption = None,
) -> None:
    """Compare two configurations over a whole frontier. Exit code 0: not worse; 1: worse; 3: cannot be told yet.

    With --suite both are measured in turns (A B B A …), so that drift of the machine takes both alike, and neighbours
    of one side say how far it disagrees with itself.
    """
    from skyline.bench.comparison import (
        DEFAULT_METRICS,
        beyond_reach,
        counted,
        default_margin,
        pairs_of,
        self_pairs,
    )
    from skyline.bench.metrics import metric_of
    from skyline.bench.stats.compare import compare as judge
    from skyline.bench.stats.compare import noise_floor

    metrics = metric or list(DEFAULT_METRICS)
    for name in metrics:
        try:
            metric_of(name)
        except KeyError as error:
            console.fail(str(error.args[0]))
    measuring = {"--pairs": pairs, "--label": label, "--folder": folder, "--resume": resume or None}
    given = [name for name, value in measuring.items() if value is not None]
    if suite is None and given:
        console.fail(f"{' and '.join(given)} are about measuring; name a --suite, or leave them out for stored runs")
    with opened(store) as results:
        if suite is not None:
            if engine is not None:
                console.fail("--engine is for stored runs; with --suite, A and B name its engines")
            left, right = _measured(a, b, suite, pairs or PAIRS, label, resume, results, folder)
        else:
            left, right = _stored(results, a, engine), _stored(results, b, engine)
        gates = results.accuracy()
    (left, lost_left), (right, lost_right) = counted(left, gates), counted(right, gates)
    found, missing = pairs_of(left, right, metrics)
    if not found:
        # Points of one side are mostly lost for the same reason.
        why = "; ".join([*lost_left[:1], *lost_right[:1], *missing[:2]])
        console.fail("the two have no level in common that both measured" + (f": {why}" if why else ""))
    missing = [*lost_left, *lost_right, *missing]
    floors: dict[str, float | None] = {}
    if suite is not None:
        compared = {pair.name for pair in found}
        itself = {name: [p for p in self_pairs(left, right, name) if p.name in compared] for name in metrics}
        floors = {name: noise_floor(pairs) for name, pairs in itself.items()}
        b = right[0].spec.engine.name  # another than A's, where A is compared with itself
    floor_of = {pair.name: floors.get(pair.name.rpartition(" · ")[2], 0.0) for pair in found}
    comparison = judge(
        found,
        margin={name: default_margin(floor) if margin is None else margin for name, floor in floor_of.items()},
        floor={name: floor or 0.0 for name, floor in floor_of.items()} if margin is None else 0.0,
    )
    comparison = beyond_reach(comparison, left, right)
    _print(comparison, a, b, floors, missing, as_json)
    raise typer.Exit(comparison.exit_code)


def _measured(
    a: str, b: str, suite: str, pairs: int, label: str | None, resume: bool, results: Store, folder: Path | None
) -> tuple[list[PointResult], list[PointResult]]:
    from skyline.bench import runner
    from skyline.bench.comparison import in_turns, paired_suite
    from skyline.cli.bench.progress import RichReporter
    from skyline.cli.bench.run import begun, stoppable

    spec = paired_suite(suite_of(suite), a, b, pairs)
    run = begun(spec, results, label, resume)
    with stoppable(), RichReporter() as reporter:
        runner.execute(run, results, reporter, bench_folder(folder), order=in_turns)
    names = [engine.name for engine in spec.engines]
    points = results.points(run.id)
    left, right = ([point for point in points if point.spec.engine.name == name] for name in names)
    return left, right


def _stored(results: Store, run: str, engine: str | None) -> list[PointResult]:
    """Of one engine of a stored run, which may be named RUN:ENGINE."""
    from skyline.bench.store import StoreError

    try:
        points = results.points(results.run(run).id)
    except StoreError:
        before, colon, after = run.partition(":")
        if not colon or engine is not None:
            raise
        return _stored(results, before, after)
    names = sorted({point.spec.engine.name for point in points})
    if engine is not None:
        points = [point for point in points if point.spec.engine.name == engine]
        if not points:
            console.fail(f"run {run} holds no engine {engine!r}; it has {', '.join(names)}")
    elif len(names) > 1:
        ways = ", ".join(f"{run}:{name}" for name in names)
        console.fail(f"run {run} holds several engines; choose one by {ways}, or for both sides with --engine")
    return points


def _print(
    comparison: Comparison, a: str, b: str, floors: dict[str, float | None], missing: list[str], as_json: bool
) -> None:
    import dataclasses
    import json

    from rich.markup import escape
    from rich.table import Table

    if as_json:
        found = dataclasses.asdict(comparison)
        typer.echo(
            json.dumps(
                {**found, "exit_code": comparison.exit_code, "noise_floors": floors, "missing": missing}, default=str
            )
        )
        return
    screen = console.screen()
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("level and metric")
    for column in (escape(f"{b} / {a}"), "95 %", "p (Holm)", "margin", "verdict"):
        table.add_column(column, justify="right")
    for row in comparison.rows:
        ratio = row.ratio
        between = f"{ratio.low:.3f}–{ratio.high:.3f}" if ratio.low is not None and ratio.high is not None else "–"
        value = "–" if ratio.value is None else f"{ratio.value:.3f}"
        table.add_row(escape(row.name), value, between, f"{row.p_adjusted:.3g}", f"{row.margin:.1%}", row.verdict)
    screen.print(table)
    screen.print(f"{escape(b)} is {SAID[comparison.verdict]} {escape(a)}; differences within the margin do not count")
    if floors:
        noise = ", ".join(f"{name} {'unknown' if floor is None else f'{floor:.1%}'}" for name, floor in floors.items())
        screen.print(f"noise floor (what one side shows against itself; nothing below it counts): {noise}")
    for text in missing:
        screen.print(f"not compared: {text}", style="dim", markup=False, soft_wrap=True)
    if comparison.advice:
        screen.print(comparison.advice, markup=False, soft_wrap=True)
