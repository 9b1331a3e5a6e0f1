"""Output tokens per second of Skyline and of Hugging Face transformers on the same checkpoint, in the same run.

    python benchmarks/shapes.py qwen3-0.6b FOLDER
    python benchmarks/against_transformers.py FOLDER --json benchmarks/results/NAME.json

Contenders take turns within each round; medians over rounds. Both compute in the checkpoint's bfloat16 with the same
number of threads, greedily, from random prompts of 128 tokens to 32 new tokens; prefill is one new token after 512.
Skyline runs as users run it, with the engine in its own process. transformers runs `generate` with its defaults.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

NEW = 32
BATCHES = (1, 4, 8, 16, 32)
VOCAB = 2000  # ids that every tokenizer here has

Generate = Callable[[list[list[int]], int], None]


def skyline(folder: str, batch_invariant: bool = False) -> Generate:
    from skyline import LLM, SamplingParams

    llm = LLM(folder, enable_prefix_caching=False, max_model_len=1024, max_num_seqs=64, batch_invariant=batch_invariant)

    def generate(prompts: list[list[int]], new: int) -> None:
        llm.generate(prompts, SamplingParams(temperature=0, max_tokens=new, ignore_eos=True), progress=False)

    return generate


def transformers(folder: str) -> Generate:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()

    def generate(prompts: list[list[int]], new: int) -> None:
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), min_new_tokens=new, max_new_tokens=new, do_sample=False
            )
        assert out.shape == (len(prompts), len(prompts[0]) + new)

    return generate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--batches", type=int, nargs="*", default=BATCHES)
    parser.add_argument("--batch-invariant", action="store_true", help="measure that mode as a contender too")
    parser.add_argument("--svg", type=Path, help="draw the frontier here")
    arguments = parser.parse_args()
    cells = {"prefill 512": (1, 512, 1), **{f"batch {batch}": (batch, 128, NEW) for batch in arguments.batches}}
    contenders = {"skyline": skyline(arguments.folder), "transformers": transformers(arguments.folder)}
    if arguments.batch_invariant:
        contenders["skyline --batch-invariant"] = skyline(arguments.folder, batch_invariant=True)
    draw = random.Random(0)
    seconds: dict[tuple[str, str], list[float]] = {}
    for turn in range(arguments.rounds + 1):
        for cell, (batch, length, new) in cells.items():
            if turn == 0 and batch > 1:
                continue  # the first turn is a warm-up
            prompts = [[draw.randrange(VOCAB) for _ in range(length)] for _ in range(batch)]
            for name, generate in contenders.items():
                began = time.perf_counter()
                generate(prompts, new)
                if turn:
                    seconds.setdefault((cell, name), []).append(time.perf_counter() - began)
    rows: list[dict[str, Any]] = []
    for cell, (batch, length, new) in cells.items():
        tokens = length if new == 1 else batch * new
        values = {name: tokens / statistics.median(seconds[cell, name]) for name in contenders}
        for name, value in values.items():
            rows.append(
                {"model": Path(arguments.folder).name, "format": "bf16", "cell": cell, "engine": name,
                 "value": round(value, 1), "unit": "tok/s", "reps": arguments.rounds}
            )  # fmt: skip
        ratio = values["skyline"] / values["transformers"]
        print(f"{cell:>12}: " + ", ".join(f"{k} {v:.1f} tok/s" for k, v in values.items()) + f", ratio {ratio:.2f}")
    if arguments.svg:
        arguments.svg.write_text(_frontier(rows, list(contenders), arguments.batches))
    if arguments.json:
        arguments.json.write_text(json.dumps({"provenance": _provenance(), "rows": rows}, indent=1) + "\n")


def _frontier(rows: list[dict[str, Any]], names: list[str], batches: list[int]) -> str:
    """Throughput of all requests together against that of each one, as an SVG picture."""
    curves = {
        name: [(row["value"] / batch, row["value"]) for batch in batches for row in rows
               if row["engine"] == name and row["cell"] == f"batch {batch}"]
        for name in names
    }  # fmt: skip
    widest = max(x for curve in curves.values() for x, _ in curve) * 1.1
    highest = max(y for curve in curves.values() for _, y in curve) * 1.15
    width, height, left, bottom = 640, 380, 70, 50

    def place(x: float, y: float) -> tuple[float, float]:
        return left + x / widest * (width - left - 20), height - bottom - y / highest * (height - bottom - 20)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        'font-size="13"><rect width="100%" height="100%" fill="white"/>'
    ]
    for step in range(5):
        x, y = widest * step / 4, highest * step / 4
        (px, _), (_, py) = place(x, 0), place(0, y)
        parts.append(f'<line x1="{left}" x2="{width - 20}" y1="{py:.1f}" y2="{py:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 8}" y="{py + 4:.1f}" text-anchor="end">{y:.0f}</text>')
        parts.append(f'<text x="{px:.1f}" y="{height - bottom + 20}" text-anchor="middle">{x:.0f}</text>')
    colours = ("#0b6bcb", "#c4622d", "#3d8b40")
    for number, ((name, curve), colour) in enumerate(zip(curves.items(), colours, strict=False)):
        parts.append(f'<text x="{width - 200}" y="{44 + 20 * number}" fill="{colour}" font-weight="bold">{name}</text>')
        points = [place(x, y) for x, y in curve]
        parts.append(
            f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}" fill="none" stroke="{colour}" '
            'stroke-width="2"/>'
        )
        for (x, y), batch in zip(points, batches, strict=True):
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>')
            parts.append(f'<text x="{x + 7:.1f}" y="{y - 5:.1f}" fill="{colour}" font-size="11">{batch}</text>')
    parts.append(f'<text x="{width / 2}" y="{height - 8}" text-anchor="middle">tokens/s of each request</text>')
    parts.append(
        f'<text transform="translate(16 {height / 2}) rotate(-90)" text-anchor="middle">tokens/s of all requests</text>'
    )
    return "\n".join([*parts, "</svg>\n"])


def _provenance() -> dict[str, Any]:
    from importlib.metadata import version

    return {
        "command": "python benchmarks/against_transformers.py <folder>",
        "date": time.strftime("%Y-%m-%d"),
        "cores": os.cpu_count(),
        "processor": next(
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "skyline-llm")},
    }


if __name__ == "__main__":
    main()
