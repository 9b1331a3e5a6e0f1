"""What the host takes to launch a step with a prompt, call by call and in recorded pieces. Needs no GPU.

    python -m gpu.launching --json ../benchmarks/results/FILE.json          (in benchmarks/)

Launches do nothing: a driver that only compiles takes the place of CUDA's (tests/kernels/triton/offline.py), products
of cuBLAS give memory as it is, and a replayed graph is a function that returns. So what is timed is Python, torch's
allocations and Triton's way to a launch, but not CUDA's, and on this machine's CPU. Models are real in what a layer
calls, and small in sizes, which make no difference to it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

CASES = (("Qwen3", None), ("Qwen3", "fp8"), ("Qwen3Moe", None), ("Qwen3Moe", "fp8"), ("DeepseekV3", None))
_LAYERS, _TOKENS, _BLOCK = 16, 300, 16
_SIZES = {
    "head_dim": 128,
    "hidden_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 256,
}
_MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128}


class _Graph:
    def replay(self) -> None: ...

    def pool(self) -> int:
        return 0


def _program(family: str, weights: str | None) -> Any:
    from skyline.checkpoint import load_config
    from skyline.engine.config import EngineConfig
    from skyline.kernels.gpu import GPUS
    from skyline.models import create_model, kv_caches
    from skyline.runner.loader import build_program
    from skyline.runner.weight_store import WeightStore
    from tests.models.families import FAMILIES
    from tests.models.harness import save_tiny

    settings: dict[str, Any] = dict(FAMILIES[family]) if family in FAMILIES else dict(_SIZES)
    settings |= _MOE if family == "Qwen3Moe" else {}
    with tempfile.TemporaryDirectory() as folder:
        save_tiny(Path(folder), family, **settings, num_hidden_layers=_LAYERS)
        config = load_config(Path(folder))
    cpu = torch.device("cpu")
    model = create_model(config, torch.bfloat16, cpu, allocate=False)
    asked = EngineConfig(model="", device="cuda", dtype="bfloat16", quantization=weights)  # type: ignore[arg-type]
    program = build_program(asked, model, torch.bfloat16, gpu=GPUS["h200"].without("flashinfer"))
    WeightStore(model, program, cpu)
    for cache in kv_caches(model):
        cache.allocate(-(-_TOKENS // _BLOCK) + 1, _BLOCK, cpu)
    return program


def _without_cuda() -> None:
    from skyline.runner import prompt_graphs
    from skyline.runner.recording import Recording
    from tests.kernels.triton.offline import install

    install(90).utils.load_binary = lambda *_: (1, 1, 0, 0, 1024)  # loaded once, and there
    torch.nn.functional.linear = lambda x, w, b=None: x.new_empty((x.shape[0], w.shape[0]))  # type: ignore[assignment]
    torch.addmm = lambda c, *_: c.new_empty(c.shape)  # type: ignore[assignment]
    torch._scaled_mm = lambda a, b, *_, out_dtype, **__: torch.empty((a.shape[0], b.shape[1]), dtype=out_dtype)  # type: ignore[assignment]
    prompt_graphs.record_part = lambda run, pool=None: Recording(_Graph(), run())  # type: ignore[arg-type]
    prompt_graphs.recording_stream = lambda device: contextlib.nullcontext()  # type: ignore[assignment, return-value]
    prompt_graphs.PromptGraphs._differs = lambda *_: False  # type: ignore[method-assign]


def measure(family: str, weights: str | None, rounds: int) -> dict[str, Any]:
    """Medians of rounds in turn, microseconds a layer."""
    from skyline.ops import AttentionBatch
    from skyline.runner.prompt_graphs import PromptGraphs

    program = _program(family, weights)
    graphs = PromptGraphs(program, torch.device("cpu"))
    ids, positions = torch.zeros(_TOKENS, dtype=torch.int64), torch.arange(_TOKENS)
    blocks = [list(range(-(-_TOKENS // _BLOCK)))]
    times: dict[str, list[float]] = {"call by call": [], "in pieces": []}
    with torch.inference_mode():

        def step(run: Any) -> float:
            batch = AttentionBatch.build(blocks, [0], [_TOKENS], _BLOCK, torch.device("cpu"))
            began = time.perf_counter()
            run(ids, positions, batch, positions[-1:])
            return time.perf_counter() - began

        step(program)
        step(graphs)
        graphs.record_next()
        for _ in range(rounds):
            times["call by call"].append(step(program))
            times["in pieces"].append(step(graphs))
            assert graphs.replayed
    each = {name: round(statistics.median(found) * 1e6 / _LAYERS, 1) for name, found in times.items()}
    row = {
        "model": family,
        "weights": weights or "bfloat16",
        "calls": sum(program.launches().values()),
        "us_a_layer": each,
    }
    return {**row, "share": round(each["in pieces"] / each["call by call"], 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    _without_cuda()
    from skyline.kernels.cpu.isa import cpu_model

    rows = [measure(family, weights, arguments.rounds) for family, weights in CASES]
    for row in rows:
        print(row)
    if arguments.json is not None:
        command = f"python -m gpu.launching --rounds {arguments.rounds} --json FILE"
        facts = {
            "command": command,
            "cpu": cpu_model(),
            "torch": torch.__version__,
            "layers": _LAYERS,
            "tokens": _TOKENS,
        }
        arguments.json.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
