"""transformers as the peer that is there: the same shape with random weights, in its fastest ways to decode."""

from __future__ import annotations

import gc
import statistics
import time
from typing import Any

import torch
from shapes import SHAPES

CONTEXT, TOKENS = 1024, 32


def measure(shape: str, batches: tuple[int, ...], compiled: bool) -> list[dict[str, Any]]:
    """Milliseconds a decode step, as the difference of generating TOKENS + 1 tokens and one.

    compiled: with a static cache, for which transformers compiles the model and records CUDA graphs.
    """
    import transformers

    fields = {key: value for key, value in SHAPES[shape].items() if key not in ("architectures", "torch_dtype")}
    config = transformers.AutoConfig.for_model(**fields)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
    torch.set_default_dtype(torch.float32)
    rows = []
    for batch in batches:
        ids = torch.randint(1, 1000, (batch, CONTEXT), device="cuda")
        row: dict[str, Any] = {"model": shape, "requests": batch, "cache": "static" if compiled else "dynamic"}
        options: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
        if compiled:
            options["cache_implementation"] = "static"
        try:
            times: dict[int, list[float]] = {1: [], TOKENS + 1: []}
            for turn in range(3):
                for count, seen in times.items():
                    torch.cuda.synchronize()
                    began = time.perf_counter()
                    model.generate(ids, min_new_tokens=count, max_new_tokens=count, **options)
                    torch.cuda.synchronize()
                    if turn:  # the first compiles
                        seen.append(time.perf_counter() - began)
            step = (statistics.median(times[TOKENS + 1]) - statistics.median(times[1])) / TOKENS
            rows.append({**row, "ms": step * 1e3, "tokens_per_s": batch / step})
        except Exception as error:
            rows.append({**row, "error": f"{type(error).__name__}: {str(error)[:300]}"})
    del model
    gc.collect()
    torch.cuda.empty_cache()
    return [{**row, "transformers": transformers.__version__} for row in rows]


def continuous(shape: str, requests: int) -> dict[str, Any]:
    """transformers' continuous batching over `requests` prompts of CONTEXT tokens, TOKENS out each."""
    import transformers

    fields = {key: value for key, value in SHAPES[shape].items() if key not in ("architectures", "torch_dtype")}
    config = transformers.AutoConfig.for_model(**fields)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    torch.set_default_dtype(torch.float32)
    row: dict[str, Any] = {"model": shape, "requests": requests, "cache": "continuous batching"}
    try:
        prompts = [[(number * 31 + place) % 1000 + 1 for place in range(CONTEXT)] for number in range(requests)]
        times = []
        for count in (1, TOKENS + 1):
            settings = transformers.GenerationConfig(
                max_new_tokens=count, do_sample=False, eos_token_id=-1, pad_token_id=0
            )
            began = time.perf_counter()
            model.generate_batch(inputs=prompts, generation_config=settings)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
        step = (times[1] - times[0]) / TOKENS
        row |= {"ms": step * 1e3, "tokens_per_s": requests / step}
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {str(error)[:300]}"
    del model
    gc.collect()
    torch.cuda.empty_cache()
    return {**row, "transformers": transformers.__version__}
