"""Starts an engine process and talks to it. Imports no torch: the front end is up while the engine still loads."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import zmq
import zmq.asyncio

from skyline.engine.config import EngineConfig
from skyline.engine.messages import (
    AbortRequests,
    EngineFailed,
    EngineOutput,
    EngineReady,
    EngineRequest,
    EngineStats,
    ResetPrefixCache,
    Shutdown,
    StatsReport,
    StepOutputs,
    ToEngine,
)
from skyline.ipc.protocol import STATS_INTERVAL_S, Launch, encoder, from_engine_decoder
from skyline.ipc.spawn import ENGINE_COMMAND, start_engine

logger = logging.getLogger("skyline.client")

# Reports may be late on a busy machine; this many missed ones mean that the process is stuck.
_SILENCE_S = 30 * STATS_INTERVAL_S


class EngineDeadError(RuntimeError):
    """The engine process is gone, or could not start; the message says why."""


class RequestStream:
    """The outputs of one request. A reader that falls behind gets what has piled up as one output."""

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.finished = False
        self._pending: EngineOutput | None = None
        self._arrived = asyncio.Event()
        self._ended = asyncio.Event()

    def push(self, output: EngineOutput) -> None:
        pending = self._pending
        if pending is None:
            self._pending = output
        else:
            pending.token_ids += output.token_ids
            if output.logprobs is not None:
                pending.logprobs = (pending.logprobs or []) + output.logprobs
            pending.finish_reason, pending.stop_token = output.finish_reason, output.stop_token
            pending.error = output.error
        self.finished = output.finish_reason is not None
        self._arrived.set()
        if self.finished:
            self._ended.set()

    async def next(self) -> EngineOutput:
        """The next output; the one with a finish_reason is the last."""
        await self._arrived.wait()
        self._arrived.clear()
        output, self._pending = self._pending, None
        assert output is not None
        return output

    async def rest(self) -> EngineOutput:
        """All that is still to come as one output, for a reader who has no use for parts: it is woken once."""
        await self._ended.wait()
        return await self.next()


class EngineClient:
    """Use from one event loop. `start` returns at once; `wait_ready` when the model is loaded."""

    command: Sequence[str] = ENGINE_COMMAND

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.ready: EngineReady | None = None
        self.error: str | None = None  # set once the engine has failed; it never recovers
        self.stats = EngineStats()
        self._streams: dict[str, RequestStream] = {}
        self._folder = Path(tempfile.mkdtemp(prefix="skyline-"))  # mode 0700: only this user may connect
        self._sending: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._receiving = zmq.asyncio.Context()
        self._to_engine = self._sending.socket(zmq.PUSH)
        self._from_engine = self._receiving.socket(zmq.PULL)
        for socket in (self._to_engine, self._from_engine):
            socket.set_hwm(0)  # nothing blocks or is dropped: the front end bounds what is under way
            socket.linger = 0  # the interpreter's exit does not wait for an engine that is gone
        # This one connects, for a bound socket refuses to send while no engine is there (not yet, or no more).
        self._to_engine.connect(self._address("requests"))
        self._from_engine.bind(self._address("outputs"))
        self._ready_event = asyncio.Event()
        self._last_heard = time.monotonic()
        self._tasks: list[asyncio.Task[None]] = []
        self._process: subprocess.Popen[bytes] | None = None
        self._exited = asyncio.Event()
        self._closing = False

    def _address(self, name: str) -> str:
        return f"ipc://{self._folder / name}"

    async def start(self) -> None:
        self._process = start_engine(self.command)
        assert self._process.stdin is not None
        launch = Launch(self.config, self._address("requests"), self._address("outputs"))
        with contextlib.suppress(BrokenPipeError):  # it has ended already; `_watch` will say so
            self._process.stdin.write(msgspec.json.encode(launch) + b"\n")
        self._tasks = [asyncio.create_task(self._receive()), asyncio.create_task(self._watch())]
        threading.Thread(target=self._wait_for_exit, args=(asyncio.get_running_loop(),), daemon=True).start()

    def _wait_for_exit(self, loop: asyncio.AbstractEventLoop) -> None:
        assert self._process is not None
        self._process.wait()
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody wants to know any more
            loop.call_soon_threadsafe(self._exited.set)

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    async def wait_ready(self) -> EngineReady:
        """Raises EngineDeadError if the engine cannot start."""
        await self._ready_event.wait()
        if self.ready is None:
            raise EngineDeadError(self.error or "the engine was closed")
        return self.ready

    def health(self) -> str | None:
        """None if the engine makes progress, else what is wrong."""
        if self.error is not None:
            return self.error
        if self.ready is None:
            return "the engine is loading the model"
        silent = time.monotonic() - self._last_heard
        if silent > _SILENCE_S:
            return f"the engine has not been heard of for {silent:.0f} s"
        if self.stats.step_in_flight_s > self.config.stall_timeout:
            return f"a step has been running for {self.stats.step_in_flight_s:.0f} s"
        return None

    def submit(self, request: EngineRequest) -> RequestStream:
        """Send a request. Its stream ends with an output that has a finish_reason, also when the engine dies."""
        stream = RequestStream(request.request_id)
        if self.error is not None:
            stream.push(EngineOutput(request.request_id, finish_reason="error", error=self.error))
            return stream
        if request.request_id in self._streams:
            raise ValueError(f"request id {request.request_id!r} is already in use")
        self._send(request)  # first, since it raises for text that is not valid Unicode
        self._streams[request.request_id] = stream
        return stream

    def abort(self, request_ids: list[str]) -> None:
        """Stop requests and end their streams at once; ids that have ended are ignored."""
        known = []
        for request_id in request_ids:
            stream = self._streams.pop(request_id, None)
            if stream is not None:
                stream.push(EngineOutput(request_id, finish_reason="abort"))
                known.append(request_id)
        if known and self.error is None:
            self._send(AbortRequests(known))

    def reset_prefix_cache(self) -> None:
        self._send(ResetPrefixCache())

    @property
    def num_unfinished(self) -> int:
        return len(self._streams)

    async def close(self) -> None:
        """End the process; streams still open end with an error."""
        self._closing = True
        if self._process is not None and not self._exited.is_set():
            if self.ready is not None:
                self._send(Shutdown())
            else:
                self._process.kill()  # still loading: there is nothing to end in good order
            try:
                await asyncio.wait_for(self._exited.wait(), timeout=10)
            except TimeoutError:
                self._process.kill()
                await self._exited.wait()
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
        self._fail("the engine was shut down")
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._to_engine.close(linger=0)
        self._from_engine.close(linger=0)
        self._sending.term()
        self._receiving.term()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _send(self, message: ToEngine) -> None:
        self._to_engine.send(encoder.encode(message), zmq.NOBLOCK)

    async def _receive(self) -> None:
        try:
            await self._receive_forever()
        except (zmq.ZMQError, msgspec.MsgspecError) as error:
            self._fail(f"the connection to the engine broke: {error}")

    async def _receive_forever(self) -> None:
        while True:
            message = from_engine_decoder.decode(await self._from_engine.recv())
            self._last_heard = time.monotonic()
            if isinstance(message, StepOutputs):
                for output in message.outputs:
                    stream = self._streams.get(output.request_id)
                    if stream is not None:
                        if output.finish_reason is not None:
                            del self._streams[output.request_id]
                        stream.push(output)
            elif isinstance(message, StatsReport):
                self.stats = message.stats
            elif isinstance(message, EngineReady):
                self.ready = message
                self._ready_event.set()
            elif isinstance(message, EngineFailed):
                self._fail(message.error)

    async def _watch(self) -> None:
        await self._exited.wait()
        await asyncio.sleep(0.1)  # its last words may still be in the socket
        if not self._closing:
            assert self._process is not None
            code = self._process.returncode
            ended = f"signal {-code}" if code < 0 else f"exit code {code}"
            self._fail(f"the engine process ended unexpectedly ({ended}); see its log above")

    def _fail(self, error: str) -> None:
        if self.error is None:
            self.error = error
            if not self._closing:
                logger.error("engine failed: %s", error)
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.push(EngineOutput(stream.request_id, finish_reason="error", error=self.error))
        self._ready_event.set()
