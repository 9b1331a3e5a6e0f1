"""What a run looks like in a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from skyline.cli import console

if TYPE_CHECKING:
    from skyline.bench.estimate import Estimate
    from skyline.bench.load.generator import Live
    from skyline.bench.results import AccuracyResult, PointResult
    from skyline.bench.suite import PointSpec


class RichReporter:
    """Progress on standard error: a line that lives, and one that stays for each finished point."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
        )
        self._task = self._progress.add_task("starting", total=None)
        self._label = ""

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def note(self, text: str) -> None:
        self._progress.update(self._task, description=text)
        if not self._console.is_terminal or "frontier" in text:
            self._console.print(text, style="dim", markup=False, soft_wrap=True)

    def begin(self, spec: PointSpec, number: int, total: int) -> None:
        self._label = spec.label
        self._progress.update(self._task, description=spec.label, completed=number - 1, total=total)

    def live(self, live: Live) -> None:
        from skyline.bench.wording import number_of

        state = f"{live.phase}, {number_of(live.ended, 'request')} ended, {live.under_way} under way"
        if live.failed:
            state += f", {live.failed} failed"
        self._progress.update(self._task, description=f"{self._label}  [dim]{state}[/dim]")

    def end(self, point: PointResult) -> None:
        self._console.print(line(point), markup=False, soft_wrap=True)


def line(point: PointResult) -> str:
    label = point.spec.label
    if point.status == "failed":
        return f"✗ {label}: {point.reason}"
    throughput, interactivity = point.value("output_throughput"), point.value("interactivity")
    ttft = point.value("ttft_p50")
    said = [f"{throughput:,.0f} tok/s" if throughput is not None else "no throughput"]
    if interactivity is not None:
        said.append(f"{interactivity:,.1f} tok/s/user")
    if ttft is not None:
        said.append(f"TTFT {1000 * ttft:,.0f} ms")
    remarks = [point.reason] if point.reason else []
    if point.client is not None and point.client.limited:
        remarks.append(point.client.reason)
    mark = "!" if point.status == "invalid" or remarks else "✓"
    return f"{mark} {label}: {', '.join(said)}" + (f" ({'; '.join(remarks)})" if remarks else "")


def summary(points: Sequence[PointResult], accuracy: Sequence[AccuracyResult]) -> None:
    """The frontier as a picture of characters and a table, on standard output."""
    from skyline.bench.standing import eligible
    from skyline.cli.bench.plot import scatter

    screen = console.screen()
    good = [point for point in points if eligible(point, accuracy) is None]
    places: dict[tuple[str, str], dict[str, list[tuple[float, float]]]] = {}
    for point in good:
        x, y = point.value("interactivity"), point.value("output_per_device")
        if x is not None and y is not None:
            panel = places.setdefault((point.spec.model.name, point.spec.workload.name), {})
            panel.setdefault(point.spec.engine.name, []).append((x, y))
    for (model, workload), series in places.items():
        screen.print(f"\n[bold]{model} · {workload}[/bold]")
        screen.print(scatter(series, "interactivity, tok/s/user", "output tok/s/device"), markup=False)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name, justify in (
        ("point", "left"),
        ("tok/s/device", "right"),
        ("tok/s/user", "right"),
        ("TTFT p50, s", "right"),
    ):
        table.add_column(name, justify="right" if justify == "right" else "left")
    for point in points:
        cells = [interval(point.metrics.get(key)) for key in ("output_per_device", "interactivity", "ttft_p50")]
        table.add_row(point.spec.label, *cells)
    screen.print(table)


def interval(estimate: Estimate | None) -> str:
    """Value and interval for people; a value whose interval was refused is not taken for an exact one."""
    if estimate is None or estimate.value is None:
        return "–"
    text = f"{estimate.value:,.4g}"
    if estimate.refused is not None:
        return f"{text} (no interval)"
    if estimate.low is not None and estimate.high is not None:
        text += f" ({estimate.low:,.4g}–{estimate.high:,.4g})"
    return text
