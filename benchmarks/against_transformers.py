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

CELLS = {"prefill 512": (1, 512, 1), "batch 1": (1, 128, 32), "batch 8": (8, 128, 32), "batch 32": (32, 128, 32)}
VOCAB = 2000  # ids that every tokenizer here has

Generate = Callable[[list[list[int]], int], None]


def skyline(folder: str) -> Generate:
    from skyline import LLM, SamplingParams

    llm = LLM(folder, enable_prefix_caching=False, max_model_len=1024, max_num_seqs=64)

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
    arguments = parser.parse_args()
    contenders = {"skyline": skyline(arguments.folder), "transformers": transformers(arguments.folder)}
    draw = random.Random(0)
    seconds: dict[tuple[str, str], list[float]] = {}
    for turn in range(arguments.rounds + 1):  # the first is a warm-up
        for cell, (batch, length, new) in CELLS.items():
            prompts = [[draw.randrange(VOCAB) for _ in range(length)] for _ in range(batch)]
            for name, generate in contenders.items():
                began = time.perf_counter()
                generate(prompts, new)
                if turn:
                    seconds.setdefault((cell, name), []).append(time.perf_counter() - began)
    rows = []
    for cell, (batch, length, new) in CELLS.items():
        tokens = length if new == 1 else batch * new
        values = {name: tokens / statistics.median(seconds[cell, name]) for name in contenders}
        for name, value in values.items():
            rows.append(
                {"model": Path(arguments.folder).name, "format": "bf16", "cell": cell, "engine": name,
                 "value": round(value, 1), "unit": "tok/s", "reps": arguments.rounds}
            )  # fmt: skip
        ratio = values["skyline"] / values["transformers"]
        print(f"{cell:>12}: " + ", ".join(f"{k} {v:.1f} tok/s" for k, v in values.items()) + f", ratio {ratio:.2f}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"provenance": _provenance(), "rows": rows}, indent=1) + "\n")


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
