"""Skyline: LLM inference at the Pareto frontier of throughput and interactivity."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from skyline.engine.sampling_params import SamplingParams
    from skyline.frontend.async_llm import AsyncLLM
    from skyline.llm import LLM

__all__ = ["LLM", "AsyncLLM", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    # Lazily, so that `import skyline` and `skyline --help` stay instant.
    import importlib

    modules = {
        "LLM": "skyline.llm",
        "AsyncLLM": "skyline.frontend.async_llm",
        "SamplingParams": "skyline.engine.sampling_params",
    }
    if name not in modules:
        raise AttributeError(f"module 'skyline' has no attribute {name!r}")
    return getattr(importlib.import_module(modules[name]), name)
