"""The JSON record and the Markdown table."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

from benchmarks.peers.engines import PEERS, ROOT
from benchmarks.peers.results import Results

LOWER_IS_BETTER = {"s", "ms", "MiB"}
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "avx_vnni", "amx_tile", "amx_int8", "amx_bf16")
NOTES = {
    "tokens": "output tokens/s of bN: N * (new - 1) / (t(new tokens) - t(1 token)), fresh random prompts, greedy, "
    "end of sequence ignored, no prefix cache",
    "peak_memory": "VmHWM summed over the processes of a contender after its offline cells: file-backed pages count, "
    "and count again in each process that maps them",
    "installed_size": "space taken by the contender's virtual environment, torch included where it needs it; skyline's "
    "is the environment that ran the benchmark, with its development tools",
    "first_token": "start of a fresh process to the first token of an offline generation; model files in the page "
    "cache; cold: without the engine's own caches (built kernels kept)",
}


def provenance(command: str, threads: int, lengths: dict[str, int], results: Results) -> dict[str, Any]:
    processor = Path("/proc/cpuinfo").read_text()
    pairs = (line.split(":", 1) for line in processor.splitlines() if ":" in line)
    lines = {key.strip(): value.strip() for key, value in pairs}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "command": command,
        "date": time.strftime("%Y-%m-%d"),
        "processor": lines.get("model name", platform.processor()),
        "flags": [flag for flag in FLAGS if flag in lines.get("flags", "").split()],
        "cores": os.cpu_count(),
        "memory_gib": round(memory, 1),
        "load_average_at_end": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "skyline_revision": _revision(),
        "threads": threads,
        **lengths,
        "layout": results.layout,
        "notes": NOTES,
        "engines": results.engines,
        "failures": results.failures,
    }


def write(folder: Path, stem: str, about: dict[str, Any], results: Results) -> tuple[Path, Path]:
    folder.mkdir(parents=True, exist_ok=True)
    record, table = folder / f"{stem}.json", folder / f"{stem}.md"
    record.write_text(json.dumps({"provenance": about, "rows": results.rows}, indent=1) + "\n")
    table.write_text(markdown(about, results))
    return record, table


def markdown(about: dict[str, Any], results: Results) -> str:
    names = [name for name in PEERS if any(row["engine"] == name for row in results.rows)]
    found = {(row["model"], row["format"], row["cell"], row["engine"]): row for row in results.rows}
    lines = [
        f"# Skyline and its peers on a CPU, {about['date']}",
        "",
        f"{about['processor']}, {about['cores']} cores, {about['memory_gib']} GiB, {about['threads']} threads each; "
        f"Skyline at {about['skyline_revision']}. Medians over rounds in which contenders took turns: read the ratios, "
        "the machine drifts. The last column is Skyline, its cache in bfloat16, against the best of the others, above "
        "1 when Skyline is better, whichever way the unit counts.",
        "",
        f"Made by `{about['command']}`; the JSON beside this file has versions and settings.",
        "",
        f"| model | format | cell | unit | {' | '.join(names)} | skyline : best peer |",
        f"|---|---|---|---|{'---:|' * (len(names) + 1)}",
    ]
    for model, kind, cell in dict.fromkeys((row["model"], row["format"], row["cell"]) for row in results.rows):
        rows = {name: found.get((model, kind, cell, name)) for name in names}
        unit = next(row["unit"] for row in rows.values() if row)
        shown = [f"{row['value']:g}" if row else "–" for row in rows.values()]
        lines.append(f"| {model} | {kind} | {cell} | {unit} | {' | '.join(shown)} | {_ratio(rows, unit)} |")
    lines += ["", "## What the formats mean", ""]
    for name in names:
        for kind, what in results.engines.get(name, {}).items():
            if "meaning" not in what:
                continue
            versions = ", ".join(f"{package} {version}" for package, version in what["versions"].items())
            lines.append(f"- **{name}, {kind}**: {what['meaning']}; KV {what['settings'].get('kv', '?')}; {versions}")
    if results.failures:
        lines += ["", "## Without a result", ""]
        for failure in results.failures:
            where = f"{failure['model']} {failure['format']} {failure['cell']}"
            reason = failure["reason"].replace("\n", " ")
            lines.append(f"- **{failure['engine']}**, {where}: {reason}")
    return "\n".join(lines) + "\n"


def _ratio(rows: dict[str, dict[str, Any] | None], unit: str) -> str:
    ours = rows.get("skyline")
    others = [row["value"] for name, row in rows.items() if row and not PEERS[name].ours]
    if not ours or not others or not ours["value"]:
        return "–"
    if unit in LOWER_IS_BETTER:
        return f"{min(others) / ours['value']:.2f}"
    return f"{ours['value'] / max(others):.2f}"


def _revision() -> str:
    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
        return done.stdout.strip()

    revision = git("rev-parse", "--short=12", "HEAD")
    if not revision:
        return "unknown"
    return revision + (" with changes" if git("status", "--porcelain", "--", "src") else "")
