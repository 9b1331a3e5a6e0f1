"""Starts the null server in a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator


@contextlib.asynccontextmanager
async def null_server(*arguments: str) -> AsyncIterator[str]:
    """Its address, until the end of the block. `arguments`: see `python -m skyline.bench.load.null_server --help`."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "skyline.bench.load.null_server",
        *arguments,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        line = await process.stdout.readline()
        if not line:
            raise OSError(f"the null server did not start (exit code {await process.wait()})")
        yield line.decode().strip()
    finally:
        process.stdin.close()
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        await process.wait()
