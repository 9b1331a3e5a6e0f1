"""The processes that send requests, as the one that started them sees them."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator

from skyline.bench.load import messages

_READY_TIMEOUT_S = 120.0


class LoadError(RuntimeError):
    """The load could not be generated, or nothing came of it; the message says why and what to do."""


class WorkerProcess:
    """A worker and the last it said."""

    def __init__(self, process: asyncio.subprocess.Process, setup: messages.Setup) -> None:
        self._process = process
        self.progress = messages.Progress(0, 0, 0, 0)
        self._ready = asyncio.Event()
        self._report: asyncio.Future[messages.Report] = asyncio.get_running_loop().create_future()
        self.failure: str | None = None
        self.write(setup)
        self._reader = asyncio.create_task(self._read())

    def write(self, message: object) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(ConnectionError):
            self._process.stdin.write(messages.frame(message))

    async def _read(self) -> None:
        assert self._process.stdout is not None
        try:
            while True:
                match messages.decode_from_worker(await messages.read_frame(self._process.stdout)):
                    case messages.Ready():
                        self._ready.set()
                    case messages.Progress() as progress:
                        self.progress = progress
                    case messages.Report() as report:
                        self._report.set_result(report)
                        return
                    case messages.Failed(reason):
                        self._fail(reason)
                        return
        except asyncio.IncompleteReadError:
            assert self._process.stderr is not None
            said = (await self._process.stderr.read()).decode("utf-8", "replace").strip()
            self._fail(f"a worker of the load generator ended: {said[-2000:] or 'it said nothing'}")

    def _fail(self, reason: str) -> None:
        self.failure = reason
        self._ready.set()
        if not self._report.done():
            self._report.set_exception(LoadError(reason))
            self._report.exception()  # whoever asks for the report hears of it; nobody has to

    async def ready(self) -> None:
        try:
            await asyncio.wait_for(self._ready.wait(), _READY_TIMEOUT_S)
        except TimeoutError:
            raise LoadError(f"a worker of the load generator was not ready after {_READY_TIMEOUT_S:g} s") from None
        if self.failure is not None:
            raise LoadError(self.failure)

    async def report(self) -> messages.Report:
        return await self._report

    async def end(self) -> None:
        self._reader.cancel()
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()
        self._process._transport.close()  # type: ignore[attr-defined]  # pipes outlive the process otherwise


@contextlib.asynccontextmanager
async def started(setups: list[messages.Setup]) -> AsyncIterator[list[WorkerProcess]]:
    """A worker for each setup, ready for the load to begin; ended when the block is left. Raises LoadError."""
    processes: list[WorkerProcess] = []
    try:
        for setup in setups:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "skyline.bench.load.worker",
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                limit=2**30,
            )
            processes.append(WorkerProcess(process, setup))
        for worker in processes:
            await worker.ready()
        yield processes
    finally:
        for worker in processes:
            await worker.end()
