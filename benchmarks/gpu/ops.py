"""Every op's kernel for this device against the op's reference in float32 on the CPU."""

from __future__ import annotations

import dataclasses
import multiprocessing
import time
from typing import Any

import torch


def check(processes: int, seed: int, most: int, seconds: float, names: list[str] | None = None) -> list[dict[str, Any]]:
    """A row for each op and dtype: the worst relative error ‖out − ref‖ / ‖ref‖ of its cases, on fresh inputs.

    most: of cases, about; an op's are then thinned out evenly. Most of the time goes into compiling, which the
    processes do side by side; what they do not reach in `seconds` is said to be unknown.
    """
    from skyline.ops import OPS

    if unknown := set(names or ()) - set(OPS):
        raise ValueError(f"no such ops: {', '.join(sorted(unknown))}")
    jobs = {(name, dtype): (name, dtype, seed, most) for name in names or OPS for dtype in ("bfloat16", "float32")}
    rows: list[dict[str, Any]] = []
    until = time.monotonic() + seconds
    # References run on the CPU: a thread each, or they would wait for each other.
    with multiprocessing.get_context("spawn").Pool(processes, torch.set_num_threads, (1,)) as pool:
        results = pool.imap_unordered(_check, jobs.values())
        while len(rows) < len(jobs):
            try:
                rows.append(results.next(max(0.1, until - time.monotonic())))
            except multiprocessing.TimeoutError:
                break
    for row in rows:
        del jobs[row["op"], row["dtype"]]
    return rows + [{"op": name, "dtype": dtype, "ok": None, "error": "not reached"} for name, dtype in jobs]


def _check(job: tuple[str, str, int, int]) -> dict[str, Any]:
    from skyline.kernels import Request, choose, triton
    from skyline.kernels.gpu import detect
    from skyline.ops import OPS

    triton.FALLS_BACK = False
    name, dtype_name, seed, most = job
    op, dtype = OPS[name], getattr(torch, dtype_name)
    row: dict[str, Any] = {"op": name, "dtype": dtype_name}
    try:
        kernel = choose(Request(op, "cuda", dtype, gpu=detect())).kernel
        row["provider"] = kernel.provider
        worst, label, wrong, count = 0.0, "", 0, 0
        rtol, atol = op.tolerance[dtype]
        cases = list(op.cases(dtype, torch.Generator().manual_seed(seed)))
        for case in cases[:: max(1, len(cases) // most)]:
            expected = _results(op.reference, tuple(_wide(value, op.rounds) for value in case.args))
            actual = _results(kernel.run, tuple(_moved(value) for value in case.args))
            for want, got in zip(expected, actual, strict=True):
                want, got = want.double(), got.double().cpu()
                error = float((got - want).norm() / want.norm().clamp_min(1e-12))
                count += 1
                wrong += not torch.allclose(got, want, rtol=rtol, atol=atol)
                if not error <= worst:  # NaN counts as worst
                    worst, label = error, case.label
        return {**row, "outputs": count, "worst": worst, "case": label, "ok": wrong == 0}
    except Exception as error:
        return {**row, "ok": False, "error": f"{type(error).__name__}: {str(error)[:300]}"}


def _results(run: Any, arguments: tuple[Any, ...]) -> list[torch.Tensor]:
    from skyline.ops import LayerCache

    result = run(*arguments)
    cached = [part for value in arguments if isinstance(value, LayerCache) for part in value.tensors]
    return [*(result if isinstance(result, tuple) else () if result is None else (result,)), *cached]


def _fields(value: Any) -> dict[str, Any] | None:
    """Of what holds tensors: caches, batches and quantized weights."""
    return (
        None
        if not dataclasses.is_dataclass(value)
        else {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    )


def _moved(value: Any) -> Any:
    """A copy on the device."""
    if isinstance(value, torch.Tensor):
        return value.to("cuda", copy=True)
    if isinstance(value, tuple):
        return tuple(map(_moved, value))
    fields = _fields(value)
    return value if fields is None else type(value)(**{name: _moved(part) for name, part in fields.items()})


def _wide(value: Any, as_it_is: bool = False) -> Any:
    """A copy, for kernels write into some arguments, whose plain floats are float32, or as they are."""
    from skyline.ops import LayerCache

    if isinstance(value, torch.Tensor):
        plain = value.is_floating_point() and value.dtype.itemsize > 1 and not as_it_is
        return value.to(torch.float32 if plain else value.dtype, copy=True)
    if isinstance(value, LayerCache):
        fields = _fields(value) or {}
        wide = {name: _wide(part) for name, part in fields.items()}
        return type(value)(**{**wide, "dtype": torch.float32})
    return value
