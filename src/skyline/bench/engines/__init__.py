"""Engines as the benchmark sees them: installed into environments of their own, started, watched and stopped.

    check(spec)
    installation = install(spec, folder)
    with serve(spec, model, folder=folder, log=log) as endpoint:
        endpoint.url, endpoint.model ...

    base.py     what an adapter is           serving.py       check, install, serve
    process.py  a server and its supervisor  environments.py  virtual environments with pip
One file an engine: skyline.py, vllm.py, sglang.py, llama_cpp.py, transformers.py, tensorrt_llm.py, url.py.
"""

from skyline.bench.engines.base import Endpoint, Engine, EngineError, Installation
from skyline.bench.engines.registry import ENGINES, get
from skyline.bench.engines.serving import DEFAULT_FOLDER, check, install, serve

__all__ = [
    "DEFAULT_FOLDER",
    "ENGINES",
    "Endpoint",
    "Engine",
    "EngineError",
    "Installation",
    "check",
    "get",
    "install",
    "serve",
]
