"""The engines that can be named in a suite."""

from __future__ import annotations

import difflib
from typing import Any

from skyline.bench.engines.base import Engine, EngineError
from skyline.bench.engines.llama_cpp import LlamaCpp
from skyline.bench.engines.sglang import Sglang
from skyline.bench.engines.skyline import Skyline
from skyline.bench.engines.tensorrt_llm import TensorrtLlm
from skyline.bench.engines.transformers import Transformers
from skyline.bench.engines.url import Url
from skyline.bench.engines.vllm import Vllm

ENGINES: dict[str, type[Engine]] = {
    engine.name: engine for engine in (Skyline, Vllm, Sglang, LlamaCpp, Transformers, TensorrtLlm, Url)
}


def get(name: str) -> Engine:
    """Raises EngineError with the known names, and the nearest of them."""
    if name in ENGINES:
        return ENGINES[name]()
    near = difflib.get_close_matches(name.lower().replace("_", "-"), ENGINES, n=2, cutoff=0.5)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    raise EngineError(f"there is no engine {name!r}, there are {', '.join(ENGINES)}{hint}")


def ways_to_ignore_eos() -> list[dict[str, Any]]:
    """The fields for it of all engines, each once."""
    found: list[dict[str, Any]] = []
    for engine in ENGINES.values():
        if engine.ignore_eos not in found:
            found.append(engine.ignore_eos)
    return found


def any_counters(metrics: str) -> tuple[int, int] | None:
    """Prefix cache counters of whichever engine these metrics are of."""
    found = (engine.cache_counters(metrics) for engine in ENGINES.values())
    return next((counters for counters in found if counters is not None), None)
