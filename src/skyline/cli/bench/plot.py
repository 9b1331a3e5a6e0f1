"""A scatter plot of characters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

_MARKS = "●▲■◆○△□◇"


def scatter(
    series: Mapping[str, Sequence[tuple[float, float]]], x_title: str, y_title: str, width: int = 64, height: int = 14
) -> str:
    """Points of each series under a mark of its own; the skyline of all of them as a line. Axes begin at 0."""
    points = [(x, y, number) for number, values in enumerate(series.values()) for x, y in values]
    if not points:
        return "(nothing to draw)"
    right = max(x for x, _, _ in points) * 1.05 or 1.0
    top = max(y for _, y, _ in points) * 1.1 or 1.0
    cells = [[" "] * width for _ in range(height)]

    def column(x: float) -> int:
        return min(width - 1, int(x / right * width))

    def row(y: float) -> int:
        return min(height - 1, max(0, height - 1 - int(y / top * height)))

    for at in range(width):
        above = [y for x, y, _ in points if column(x) >= at]
        if above:
            cells[row(max(above))][at] = "─"
    for x, y, number in points:
        cells[row(y)][column(x)] = _MARKS[number % len(_MARKS)]
    label = max(len(f"{top:,.0f}"), len("0"))
    lines = [y_title]
    for index, line in enumerate(cells):
        value = f"{top:,.0f}" if index == 0 else "0" if index == height - 1 else ""
        lines.append(f"{value:>{label}} ┤{''.join(line).rstrip()}")
    lines.append(" " * label + " └" + "─" * width)
    lines.append(" " * (label + 2) + "0" + f"{right:,.0f}".rjust(width - 1))
    lines.append(" " * (label + 2) + x_title)
    lines.append("   ".join(f"{_MARKS[i % len(_MARKS)]} {name}" for i, name in enumerate(series)))
    return "\n".join(lines)
