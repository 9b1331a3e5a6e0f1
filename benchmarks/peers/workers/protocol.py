"""How a worker talks to the coordinator: one JSON object a line on standard input, one a line back.

    {"do": "load", "model": PATH, "threads": 2, "settings": {}} ->  {"ok": true, "versions": {...}, "settings": {...}}
    {"do": "generate", "prompts": [[ids]], "new_tokens": 128}    ->  {"ok": true, "seconds": 1.5, "counts": [128]}
    {"do": "quit"}

A refusal is {"ok": false, "error": "..."}. The file runs in each engine's own environment: standard library only.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from importlib.metadata import PackageNotFoundError, version
from typing import Any


class Engine:
    """What a worker implements."""

    packages: tuple[str, ...] = ()

    def load(self, model: str, threads: int, settings: dict[str, Any]) -> dict[str, Any]:
        """Make ready to generate; returns the settings that matter to a reader of the result."""
        raise NotImplementedError

    def prepare(self, batch: int, total: int) -> None:
        """Called before the clock starts, with the number of requests and the tokens of each, prompt and output."""

    def generate(self, prompts: list[list[int]], new_tokens: int) -> list[int]:
        raise NotImplementedError

    def close(self) -> None:
        pass


def serve(engine: Engine) -> None:
    """Answer the coordinator until it says quit or goes away. Whatever libraries print goes to standard error."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        message = json.loads(line)
        try:
            if message["do"] == "quit":
                engine.close()
                break
            reply = _answer(engine, message)
        except BaseException as error:
            traceback.print_exc()
            text = str(error).strip()
            reply = {"ok": False, "error": f"{type(error).__name__}: {text[:500]}"}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def _answer(engine: Engine, message: dict[str, Any]) -> dict[str, Any]:
    if message["do"] == "load":
        settings = engine.load(message["model"], message["threads"], message["settings"])
        return {"ok": True, "settings": settings, "versions": {name: _version(name) for name in engine.packages}}
    prompts, new = message["prompts"], message["new_tokens"]
    engine.prepare(len(prompts), len(prompts[0]) + new)
    began = time.perf_counter()
    counts = engine.generate(prompts, new)
    return {"ok": True, "seconds": time.perf_counter() - began, "counts": counts}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
