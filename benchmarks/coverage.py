"""How often the benchmark's 95 % intervals hold the truth, on simulated servers where it is known.

python -m benchmarks.coverage benchmarks/results/DATE-bench-coverage.json [--trials 1000] [--servers N]

The servers, sizes and seeds of tests/bench/stats/test_coverage.py, whose slow test asks for the same. It takes 20 to 30
minutes on one core; FILE is written after each server, and one that is there goes on with those it lacks, of which
`--servers` takes so many at a time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from pathlib import Path
from typing import Any

from tests.bench.stats.test_coverage import GRID, SIZES, Server, measured

LEAST, MOST = 0.93, 0.97


def cells(server: Server, trials: int) -> list[dict[str, Any]]:
    """Of each size and statistic: the share of intervals that held the truth among those given, the share of runs that
    gave one, and the intervals' mean width over that of 95 % of the runs' own values (None where those are all one)."""
    return [
        {
            "server": server.name,
            "requests": n,
            "statistic": row.name,
            "covered": round(row.covered, 4),
            "reported": round(row.reported, 4),
            "width": None if math.isnan(row.width) else round(row.width, 3),
        }
        for n in SIZES
        for row in measured(server, n, trials)
        if row.reported > 0
    ]


def summary(found: list[dict[str, Any]]) -> dict[str, int]:
    """Of the cells where at least half of the runs give an interval. Left out are shares, which have none of the
    requests' latencies to judge memory by, and medians that half of the answers equal."""
    counted = [
        cell
        for cell in found
        if cell["reported"] >= 0.5
        and cell["statistic"] != "share"
        and not (cell["statistic"] == "p50" and cell["server"] in ("M/D/1, load 0.3", "M/D/1, load 0.5"))
    ]
    below = sum(cell["covered"] < LEAST for cell in counted)
    above = sum(cell["covered"] > MOST for cell in counted)
    return {"cells": len(counted), "within": len(counted) - below - above, "below": below, "above": above}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--servers", type=int, default=len(GRID))
    arguments = parser.parse_args()
    found: list[dict[str, Any]] = []
    if arguments.file.exists():
        kept = json.loads(arguments.file.read_text())
        if kept["trials"] != arguments.trials:
            parser.error(f"{arguments.file} holds {kept['trials']} trials a cell")
        found = kept["coverage"]
    there = {cell["server"] for cell in found}
    for server in itertools.islice((one for one in GRID if one.name not in there), arguments.servers):
        found += cells(server, arguments.trials)
        head = {"what": "coverage of 95 % intervals, 93 to 97 % asked for", "trials": arguments.trials}
        rows = ",\n  ".join(json.dumps(cell, ensure_ascii=False) for cell in found)
        text = json.dumps({**head, **summary(found)}, indent=1)[:-2]
        arguments.file.write_text(f'{text},\n "coverage": [\n  {rows}\n ]\n}}\n')
        print(server.name, summary(found), flush=True)


if __name__ == "__main__":
    main()
