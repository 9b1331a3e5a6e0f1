"""The engine as a whole on the device: right answers, a frontier at 1k/1k, and the time to a first token."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def answer_problems(count: int = 200) -> dict[str, Any]:
    """Exact match of the embedded model, bf16 and greedy, through scheduler, runner and sampler."""
    from skyline.checkpoint import Tokenizer
    from skyline.checkpoint.chat_template import load_chat_template
    from skyline.demo import DEMO_PATH, HELDOUT_PATH
    from skyline.demo.problems import extract_answer
    from skyline.engine.config import EngineConfig
    from skyline.engine.core import EngineCore
    from skyline.engine.messages import EngineRequest
    from skyline.engine.sampling_params import SamplingParams
    from skyline.runner.loader import load_model

    tokenizer = Tokenizer(DEMO_PATH)
    template = load_chat_template(tokenizer)
    assert template is not None
    problems = [json.loads(line) for line in HELDOUT_PATH.read_text().splitlines()[:count]]
    prompts = [
        tokenizer.encode(template.render([{"role": "user", "content": problem["question"]}]), add_special_tokens=False)
        for problem in problems
    ]
    found: dict[str, Any] = {"problems": count}
    for name, changes in {
        "bfloat16": {},
        "call by call": {"cuda_graphs": False},
        "fp8": {"quantization": "fp8"},
        "fp8 KV": {"kv_cache_dtype": "fp8"},
        "int8": {"quantization": "int8"},
        "int4": {"quantization": "int4"},
        "temperature": {},
    }.items():
        try:
            config = EngineConfig(model=str(DEMO_PATH), device="cuda", kv_cache_memory=1 << 28, **changes)  # type: ignore[arg-type]
            loaded = load_model(config)
            core = EngineCore(loaded.limits, loaded.runner, eos_token_ids=loaded.eos_token_ids)
            heat = 0.2 if name == "temperature" else 0.0
            for number, prompt in enumerate(prompts):
                params = SamplingParams(temperature=heat, top_p=0.9 if heat else 1.0, max_tokens=256)
                core.add(EngineRequest(str(number), prompt, params))
            answers: dict[str, list[int]] = {str(number): [] for number in range(count)}
            began = time.perf_counter()
            while core.has_work:
                for output in core.step():
                    answers[output.request_id] += output.token_ids
            seconds = time.perf_counter() - began
            loaded.runner.close()
            right = [
                extract_answer(tokenizer.decode(answers[str(number)])) == problem["answer"]
                for number, problem in enumerate(problems)
            ]
            found[name] = {"exact_match": sum(right) / count, "tokens_per_s": sum(map(len, answers.values())) / seconds}
            found[name]["graphs"] = loaded.runner.recorded_sizes
        except Exception as error:
            found[name] = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
    return found


def frontier(model: Any, levels: tuple[int, ...], lengths: tuple[int, int] = (1024, 1024)) -> list[dict[str, Any]]:
    """Closed loops of one wave: each request `lengths` tokens in and out; rates count from the first token on."""
    from skyline.engine.core import EngineCore
    from skyline.engine.messages import EngineRequest
    from skyline.engine.sampling_params import SamplingParams

    rows = []
    for level in levels:
        core = EngineCore(model.limits, model.runner)
        params = SamplingParams(temperature=0, max_tokens=lengths[1], ignore_eos=True)
        for number in range(level):
            prompt = [(number * 7919 + place * 31) % 100_000 + 1 for place in range(lengths[0])]
            core.add(EngineRequest(str(number), prompt, params))
        first: dict[str, float] = {}
        last: dict[str, float] = {}
        tokens = 0
        began = time.perf_counter()
        while core.has_work:
            for output in core.step():
                now = time.perf_counter()
                first.setdefault(output.request_id, now)
                last[output.request_id] = now
                tokens += len(output.token_ids)
        seconds = time.perf_counter() - began
        each = [(last[name] - first[name]) / (lengths[1] - 1) for name in first]
        rows.append(
            {
                "concurrency": level,
                "isl": lengths[0],
                "osl": lengths[1],
                "output_tokens_per_s": tokens / seconds,
                "interactivity": 1 / statistics.median(each),
                "tpot_ms": statistics.median(each) * 1e3,
                "ttft_ms": (statistics.median(first.values()) - began) * 1e3,
            }
        )
    return rows


_FIRST_TOKEN = """
import sys, time
sys.path.insert(0, {source!r})
from skyline.engine.config import EngineConfig
from skyline.engine.core import EngineCore
from skyline.engine.messages import EngineRequest
from skyline.engine.sampling_params import SamplingParams
from skyline.runner.loader import load_model
imported = time.time()
loaded = load_model(EngineConfig(model={folder!r}, device="cuda", max_model_len=4096))
ready = time.time()
core = EngineCore(loaded.limits, loaded.runner)
core.add(EngineRequest("0", list(range(1, 101)), SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)))
stamps = []
while core.has_work:
    if core.step():
        stamps.append(time.time())
print("STAMPS", imported, ready, *stamps, flush=True)
loaded.runner.close()
"""


def first_token(shape: str, checkpoint: Path | None, repeats: int = 2) -> dict[str, Any]:
    """Seconds from the start of a process to its first token, of a checkpoint in the page cache."""
    from shapes import write_checkpoint

    with tempfile.TemporaryDirectory() as folder:
        path = checkpoint or write_checkpoint(shape, Path(folder))
        for file in path.glob("*.safetensors"):
            with file.open("rb") as stream:
                while stream.read(1 << 26):  # into the page cache
                    pass
        found: dict[str, Any] = {"model": shape, "runs": []}
        script = _FIRST_TOKEN.format(source=str(Path(__file__).resolve().parents[2] / "src"), folder=str(path))
        for _ in range(repeats):
            began = time.time()
            run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
            line = next((line for line in run.stdout.splitlines() if line.startswith("STAMPS")), None)
            if line is None:
                found["runs"].append({"error": run.stderr[-1500:]})
                continue
            imported, ready, first, *_ = (float(word) - began for word in line.split()[1:])
            found["runs"].append({"imported_s": imported, "loaded_s": ready, "first_token_s": first})
    return found
