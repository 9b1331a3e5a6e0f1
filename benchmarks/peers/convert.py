"""Makes the checkpoint and what each peer reads instead. Finished files are kept; failures are reported, not raised."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.peers.engines import HERE, PEERS, ROOT

CONVERTERS = HERE / "converters"
TO_GGUF = ROOT / "src/skyline/bench/engines/scripts/to_gguf.py"  # needs no more than numpy
Failures = dict[tuple[str, str], str]  # (engine, format) -> reason


def convert(work: Path, model: str, formats: Iterable[str], names: Iterable[str]) -> Failures:
    folder = work / "models" / model
    folder.mkdir(parents=True, exist_ok=True)
    convert_python = str(work / "venvs" / "convert" / "bin" / "python")
    checkpoint, gguf = folder / "hf", folder / "bf16.gguf"
    variables = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    failure = _make(work, checkpoint, [sys.executable, _script("make_checkpoint"), model, "{}"], variables)
    if failure:
        raise RuntimeError(f"the checkpoint of {model} could not be made: {failure}")
    failed: Failures = {}
    for name in names:
        for kind in formats:
            if kind not in PEERS[name].files:
                continue
            target = folder / PEERS[name].files[kind]
            if target == checkpoint:
                continue
            reason = None
            if target.suffix == ".gguf":
                reason = _make(work, gguf, [convert_python, str(TO_GGUF), str(checkpoint), "{}"])
                if kind != "bf16" and not reason:
                    quantize = [PEERS["llama.cpp"].python(work), _script("quantize_gguf")]
                    command = [*quantize, str(gguf), "{}", target.stem]
                    reason = _make(work, target, command)
            elif name == "vllm":
                script = _script("to_compressed_tensors")
                reason = _make(work, target, [convert_python, script, str(checkpoint), "{}", kind])
            elif name == "openvino":
                reason = _make(work, target, [convert_python, _script("to_openvino"), str(checkpoint), "{}", kind])
            if reason:
                failed[name, kind] = f"conversion: {reason}"
    return failed


def shape_of(work: Path, model: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((work / "models" / model / "hf" / "config.json").read_text())
    return config


def _script(name: str) -> str:
    return str(CONVERTERS / f"{name}.py")


def _make(work: Path, target: Path, command: list[str], variables: dict[str, str] | None = None) -> str | None:
    """Run a converter into a temporary place and rename, so that half a file is never taken for a whole one."""
    if target.exists():
        return None
    print(f"convert: {target.parent.name}/{target.name}", flush=True)
    partial = target.with_name(f"partial-{target.name}")
    if partial.is_dir():
        shutil.rmtree(partial)
    partial.unlink(missing_ok=True)
    log = work / "logs" / f"convert-{target.parent.name}-{target.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as out:
        try:
            done = subprocess.run(
                [part.replace("{}", str(partial)) for part in command],
                stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env=variables,
            )  # fmt: skip
        except OSError as error:
            return f"{error.strerror}: its environment is missing"
    if done.returncode != 0 or not partial.exists():
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        return f"{lines[-1][:300] if lines else 'no output'} (logs/{log.name})"
    partial.rename(target)
    return None
