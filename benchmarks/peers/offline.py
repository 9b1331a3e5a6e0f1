"""Prefill and static batches, through each engine's own Python interface; peak memory; time to the first token."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.peers.convert import shape_of
from benchmarks.peers.engines import PEERS, kv_token_bytes
from benchmarks.peers.processes import Worker, WorkerError
from benchmarks.peers.results import Results
from benchmarks.peers.turns import Turns, fits, need_mib

VOCABULARY = 2000  # ids that every tokenizer here has


@dataclass(frozen=True)
class Plan:
    """What is common to all measurements of a run."""

    work: Path
    threads: int
    rounds: int
    prompt: int  # tokens
    new: int
    prefill: int
    anew: bool = False  # contenders are started in each round even if they all fit into memory

    def together(self, needs: Iterable[float]) -> bool:
        """Whether all contenders, which need so many MiB each, are to be loaded at once."""
        return not self.anew and fits(needs)

    def prompts(self, count: int, length: int) -> list[list[int]]:
        """Fresh ones every time, so that no cache helps anybody."""
        return [[random.randrange(VOCABULARY) for _ in range(length)] for _ in range(count)]

    def kv_tokens(self, batches: Sequence[int]) -> int:
        most = max(self.prefill + 128, *(batch * (self.prompt + self.new) for batch in batches), 2048)
        return -(-most * 5 // 4 // 256) * 256

    def settings(self, model: str, kind: str, batches: Sequence[int]) -> dict[str, Any]:
        """What is the same for all contenders."""
        return {
            "format": kind,
            "max_model_len": max(self.prefill + 128, self.prompt + self.new + 128),
            "max_num_seqs": max(64, *batches),
            "kv_tokens": self.kv_tokens(batches),
            "kv_token_bytes": kv_token_bytes(shape_of(self.work, model)),
        }

    def files(self, model: str, kind: str, name: str) -> Path:
        return self.work / "models" / model / PEERS[name].files[kind]


def batch_of(cell: str) -> int:
    return 1 if cell == "prefill" else int(cell.removeprefix("b"))


def measure_batches(
    plan: Plan, results: Results, model: str, kind: str, names: Sequence[str], cells: Sequence[str], memory: bool
) -> None:
    """The cells prefill, b1, b8 … and peak_memory of one model in one format."""
    batches = [batch_of(cell) for cell in cells] or [1]
    settings = plan.settings(model, kind, batches)
    values: dict[tuple[str, str], list[float]] = {}
    peaks: dict[str, list[float]] = {}

    def start(name: str) -> Worker:
        worker = Worker(PEERS[name], plan.work, plan.threads, f"{model}-{kind}")
        try:
            reply = worker.load(plan.files(model, kind, name), settings)
        except BaseException:
            worker.close()
            raise
        _describe(results, name, kind, reply)
        return worker

    def take(worker: Worker, name: str, cell: str, number: int) -> None:
        if cell == "prefill":
            seconds = worker.generate(plan.prompts(1, plan.prefill), 1)
            value = plan.prefill / seconds
        else:
            batch = batch_of(cell)
            first = worker.generate(plan.prompts(batch, plan.prompt), 1)
            whole = worker.generate(plan.prompts(batch, plan.prompt), plan.new)
            if number and whole <= first:
                raise WorkerError(f"{plan.new} tokens took {whole:.3f} s and one took {first:.3f} s: no rate")
            value = batch * (plan.new - 1) / max(whole - first, 1e-9)
        if number:
            values.setdefault((cell, name), []).append(value)

    def finish(worker: Worker, name: str) -> None:
        peaks[name] = [worker.peak_mib()]

    def failed(name: str, cell: str | None, error: Exception) -> None:
        results.fail(model, kind, cell or "offline", name, str(error))

    token_bytes = settings["kv_token_bytes"]
    room = settings["kv_tokens"] * token_bytes
    together = plan.together(need_mib(plan.files(model, kind, name), room) for name in names)
    results.layout[f"{model} {kind} offline"] = "all loaded, taking turns" if together else "started anew in each round"
    Turns(start, take, finish, failed).run(names, cells, plan.rounds, together)
    for cell in cells:
        for name in names:
            results.add(model, kind, cell, name, values.get((cell, name), []), "tok/s")
    for name in names if memory else ():
        results.add(model, kind, "peak_memory", name, peaks.get(name, []), "MiB")


def measure_first_token(
    plan: Plan, results: Results, model: str, kind: str, names: Sequence[str], cells: Sequence[str]
) -> None:
    """Seconds from the start of a fresh process to the first token of its first prompt.

    Warm: an untimed run came before. Cold: the caches the engine wrote for itself are removed first (vLLM's compiled
    graphs; the others have none by default). Model files are in the page cache in both.
    """
    settings = plan.settings(model, kind, [1])
    values: dict[tuple[str, str], list[float]] = {}

    def once(name: str) -> float:
        _read(plan.files(model, kind, name))
        worker = Worker(PEERS[name], plan.work, plan.threads, f"first-{model}-{kind}")
        try:
            reply = worker.load(plan.files(model, kind, name), settings)
            worker.generate(plan.prompts(1, 16), 1)
            seconds = time.perf_counter() - worker.began
            if kind not in results.engines.get(name, {}):
                _describe(results, name, kind, reply)
            return seconds
        finally:
            worker.close()

    alive = list(names)
    for number in range(plan.rounds + 1):
        for name in list(alive):
            try:
                if number == 0:
                    once(name)
                    continue
                if "first_token_warm" in cells:
                    values.setdefault(("first_token_warm", name), []).append(once(name))
                if "first_token_cold" in cells:
                    shutil.rmtree(PEERS[name].caches(plan.work), ignore_errors=True)
                    values.setdefault(("first_token_cold", name), []).append(once(name))
            except WorkerError as error:
                alive.remove(name)
                results.fail(model, kind, "first_token", name, str(error))
    for cell in cells:
        for name in names:
            results.add(model, kind, cell, name, values.get((cell, name), []), "s")


def _describe(results: Results, name: str, kind: str, reply: dict[str, Any]) -> None:
    what = {"meaning": PEERS[name].formats[kind], "versions": reply["versions"], "settings": reply["settings"]}
    results.describe(name, kind, what)


def _read(path: Path) -> None:
    """Into the page cache."""
    for file in (entry for entry in (path.rglob("*") if path.is_dir() else [path]) if entry.is_file()):
        with file.open("rb", buffering=0) as data:
            while data.read(1 << 24):
                pass
