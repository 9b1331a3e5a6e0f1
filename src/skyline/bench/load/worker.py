"""One process of the load generator: a Worker with pipes to the generator.

The generator starts it as `python -m skyline.bench.load.worker`, writes a Setup and, when all workers are ready, the
time to begin at. A second number ends the load; then the worker writes its Report. It ends with its standard input.
"""

from __future__ import annotations

import asyncio
import gc
import sys

from skyline.bench.load import messages
from skyline.bench.load.sending import Worker
from skyline.bench.suite import SuiteError


class _Output(asyncio.Protocol):
    """Standard output; `closed` is set when all that was written has left."""

    def __init__(self, closed: asyncio.Future[None]) -> None:
        self._closed = closed

    def connection_lost(self, error: Exception | None) -> None:
        if not self._closed.done():
            self._closed.set_result(None)


async def _main() -> None:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=2**30)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin.buffer)
    closed = loop.create_future()
    out, _ = await loop.connect_write_pipe(lambda: _Output(closed), sys.stdout.buffer)

    def say(message: object) -> None:
        out.write(messages.frame(message))

    async def say_last(message: object) -> None:
        say(message)
        out.write_eof()
        await closed

    try:
        worker = Worker(messages.decode_setup(await messages.read_frame(reader)), say)
        worker.prepare()
    except (SuiteError, ValueError) as error:
        await say_last(messages.Failed(str(error)))
        return
    # Replies are kept until the end; looking through them again and again would be felt as lag.
    gc.collect()
    gc.freeze()
    gc.disable()
    say(messages.Ready())
    try:
        worker.begin(messages.decode_begin(await messages.read_frame(reader)))
        await messages.read_frame(reader)
    except asyncio.IncompleteReadError:
        return  # the generator has gone
    await say_last(worker.stop())


def main() -> None:
    import uvloop

    uvloop.run(_main())


if __name__ == "__main__":
    main()
