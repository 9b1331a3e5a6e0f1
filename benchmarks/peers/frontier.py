"""Draw the frontier of records: throughput of all requests together against that of each one, batches 1, 8 and 32.

python -m benchmarks.peers.frontier benchmarks/results/NAME.json... docs/frontier.svg [--model qwen3-0.6b]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

BATCHES = (1, 8, 32)
FORMATS = ("bf16", "int8", "int4")  # a picture each
COLOURS = {
    "skyline": "#0b6bcb",
    "skyline-kv8": "#5aa9e6",
    "openvino": "#c4622d",
    "vllm": "#3d8b40",
    "llama.cpp": "#8a4fbf",
    "transformers": "#777",
}
WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 330, 340, 52, 46, 34  # of one format's picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", type=Path, nargs="+")
    parser.add_argument("svg", type=Path)
    parser.add_argument("--model", default="qwen3-0.6b")
    arguments = parser.parse_args()
    rows = [row for record in arguments.records for row in json.loads(record.read_text())["rows"]]
    arguments.svg.write_text(draw([row for row in rows if row["model"] == arguments.model]))


def draw(rows: list[dict[str, Any]]) -> str:
    """rows: of one model's record. An engine without all three batches of a format is not drawn there."""
    values = {(row["format"], row["engine"], row["cell"]): row["value"] for row in rows}
    formats = [kind for kind in FORMATS if any(row["format"] == kind for row in rows)]
    curves: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for kind in formats:
        for name in COLOURS:
            points = [values.get((kind, name, f"b{batch}")) for batch in BATCHES]
            if None not in points:
                curve = [(value / batch, value) for value, batch in zip(points, BATCHES, strict=True)]
                curves.setdefault(kind, {})[name] = curve
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH * len(curves)} {HEIGHT}" '
        'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>'
    ]
    for number, (kind, of_format) in enumerate(curves.items()):
        parts += [f'<g transform="translate({WIDTH * number} 0)">', *_picture(kind, of_format), "</g>"]
    return "\n".join([*parts, "</svg>\n"])


def _picture(kind: str, curves: dict[str, list[tuple[float, float]]]) -> list[str]:
    widest = max(x for curve in curves.values() for x, _ in curve) * 1.15
    highest = max(y for curve in curves.values() for _, y in curve) * 1.15

    def place(x: float, y: float) -> tuple[float, float]:
        return LEFT + x / widest * (WIDTH - LEFT - 16), HEIGHT - BOTTOM - y / highest * (HEIGHT - BOTTOM - TOP)

    parts = [f'<text x="{WIDTH / 2}" y="20" text-anchor="middle" font-weight="bold">{kind}</text>']
    for step in range(5):
        x, y = widest * step / 4, highest * step / 4
        (px, _), (_, py) = place(x, 0), place(0, y)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - 16}" y1="{py:.1f}" y2="{py:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{py + 4:.1f}" text-anchor="end">{y:.0f}</text>')
        parts.append(f'<text x="{px:.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{x:.0f}</text>')
    for number, (name, curve) in enumerate(curves.items()):
        colour, points = COLOURS[name], [place(x, y) for x, y in curve]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for (x, y), batch in zip(points, BATCHES, strict=True):
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>')
            parts.append(f'<text x="{x + 6:.1f}" y="{y - 4:.1f}" fill="{colour}" font-size="10">{batch}</text>')
        where = f'x="{WIDTH - 20}" y="{TOP + 14 + 17 * number}" text-anchor="end"'
        parts.append(f'<text {where} fill="{colour}" font-weight="bold">{name}</text>')
    parts.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 8}" text-anchor="middle">tokens/s of each request</text>')
    turned = f'transform="translate(13 {HEIGHT / 2}) rotate(-90)" text-anchor="middle"'
    parts.append(f"<text {turned}>tokens/s of all requests</text>")
    return parts


if __name__ == "__main__":
    main()
