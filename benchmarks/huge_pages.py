"""How fast this machine reads memory from small and from huge pages: why weights and KV cache ask for huge ones.

python benchmarks/huge_pages.py [--out benchmarks/results]

The two take turns; a figure is the median of the rounds, with the CPU kernels' own reading loop on all threads.
"""

from __future__ import annotations

import argparse
import json
import mmap
import statistics
import time
from pathlib import Path

import torch

from skyline.kernels.cpu import native
from skyline.kernels.cpu.isa import cpu_model
from skyline.ops.host_memory import HUGE_PAGE, reserve

BYTES = 512 << 20


def small_pages() -> torch.Tensor:
    memory = mmap.mmap(-1, BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.int64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    library, threads = native.library(), native.thread_count(None)
    native.start_threads(threads)
    memories = {"small": small_pages(), "huge": reserve((BYTES // 8,), torch.int64, torch.device("cpu"))}
    rates: dict[str, list[float]] = {name: [] for name in memories}
    for memory in memories.values():
        library.machine_fill(memory)
    for _ in range(arguments.rounds):
        for name, memory in memories.items():
            with native.step():
                began = time.perf_counter()
                total = library.machine_read(memory, True)
                rates[name].append(BYTES / (time.perf_counter() - began) / 1e9)
            assert total == BYTES // 8
    native.stop_threads()
    record = {
        "command": "python benchmarks/huge_pages.py",
        "date": time.strftime("%Y-%m-%d"),
        "cpu": cpu_model(),
        "threads": threads,
        "rounds": arguments.rounds,
        "huge_page_bytes": HUGE_PAGE,
        "transparent_huge_pages": Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text().strip(),
        "gb_per_s": {name: round(statistics.median(values), 1) for name, values in rates.items()},
        "ratio": round(statistics.median(h / s for h, s in zip(rates["huge"], rates["small"], strict=True)), 2),
    }
    print(json.dumps(record, indent=2))
    path = arguments.out / f"{record['date']}-huge-pages.json"
    path.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
