"""What a worker of the load generator does: sends its share of the requests, by clients or when they are due, and notes
what comes back."""

from __future__ import annotations

import asyncio
import time
from array import array
from collections.abc import Callable
from time import perf_counter

import msgspec

from skyline.bench.load import messages
from skyline.bench.load.http import Address, Connection, Reply
from skyline.bench.load.prompts import PromptSource

_PROGRESS_S = 0.25
_LAG_S = 0.01
# Bodies made before the load begins, so that making them is not part of it.
_READY_BODIES = 2048
_READY_BYTES = 64 * 1024 * 1024
_PAUSE_AFTER_ERROR_S = 0.25

_json = msgspec.json.Encoder().encode


class Worker:
    def __init__(self, setup: messages.Setup, say: Callable[[object], None]) -> None:
        self._setup = setup
        self._say = say
        self._address = Address.of(setup.url, setup.path, setup.headers)
        self._prompts = PromptSource(setup.words, setup.overhead, setup.salt)
        self._made: dict[int, bytes] = {}
        self._loop = asyncio.get_running_loop()
        self._count = 0
        self._replies: list[Reply] = []
        self._ended = self._failed = self._tokens = 0
        self._last_error: str | None = None
        self._idle: list[Connection] = []
        self._stale = 0
        self._under_way: dict[Reply, Connection | None] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopping = False
        # The texts of every so manieth request are kept, and more seldom as they become many.
        self._stride = 1
        self._kept: list[Reply] = []
        self._lags = array("d")
        self._lag_times = array("d")
        self._cpu: list[tuple[float, float]] = []

    # bodies

    def prepare(self) -> None:
        """Makes the first bodies. Raises SuiteError if the asked lengths cannot be made."""
        if self._setup.turns > 1:
            self._prompts.content(0, self._setup.inputs[0])
            return
        expected = self._setup.clients * 64 if self._setup.starts is None else len(self._setup.starts)
        size = 0
        for k in range(min(max(expected, 1), _READY_BODIES)):
            index = self._index(k)
            self._made[index] = self._body(index)
            size += len(self._made[index])
            if size > _READY_BYTES:
                break

    def _index(self, k: int) -> int:
        return self._setup.worker + k * self._setup.workers

    def _lengths(self, index: int) -> tuple[int, int]:
        setup = self._setup
        return setup.inputs[index % len(setup.inputs)], setup.outputs[index % len(setup.outputs)]

    def _body(self, index: int) -> bytes:
        tokens, target = self._lengths(index)
        body = self._setup.body
        content = self._prompts.content(index, tokens).encode()
        return b"%b%b%b%d%b" % (body.head, content, body.middle, target, body.tail)

    # the load

    def begin(self, at: float) -> None:
        """`at` is on perf_counter's clock."""
        self._begin = at
        self._loop.call_later(max(0.0, at - perf_counter()), self._start)
        self._watch(self._loop.time() + _LAG_S)

    def _start(self) -> None:
        setup = self._setup
        if setup.starts is None:
            for _ in range(setup.clients):
                client = _Session(self) if setup.turns > 1 else _Client(self)
                client.next(self._begin)
        else:
            self._next_arrival()
        self._report_progress()

    def _next_arrival(self) -> None:
        """Sends what is due, then waits for the next."""
        starts = self._setup.starts
        assert starts is not None
        while not self._stopping and self._count < len(starts):
            due = self._begin + starts[self._count]
            wait = due - perf_counter()
            if wait > 0:
                self._loop.call_later(wait, self._next_arrival)
                return
            reply, body = self.next_request(due)
            self.send(reply, body, self._take_idle(), self._release)

    def _take_idle(self) -> Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.usable:
                return connection
        return None

    def _release(self, connection: Connection | None, reply: Reply) -> None:
        if connection is not None and connection.usable:
            self._idle.append(connection)

    def next_request(self, intended: float) -> tuple[Reply, bytes]:
        """The next request of this worker with a body of its own."""
        index = self._index(self._count)
        self._count += 1
        body = self._made.pop(index, None) or self._body(index)
        return Reply(index, intended, *self._lengths(index)), body

    def session_request(self, intended: float, history: list[dict[str, str]]) -> tuple[Reply, bytes]:
        """The next turn of a conversation: its user message is appended to `history`."""
        index = self._index(self._count)
        self._count += 1
        tokens, target = self._lengths(index)
        reply = Reply(index, intended, tokens, target)
        # What the template makes of earlier turns is not counted here.
        reply.planned = None if history else tokens + self._setup.opening_tokens
        history.append({"role": "user", "content": self._prompts.content(index, tokens)})
        body = _json({**self._setup.request, "messages": self._setup.opening + history, "max_tokens": target})
        return reply, body

    def send(
        self,
        reply: Reply,
        body: bytes,
        connection: Connection | None,
        done: Callable[[Connection | None, Reply], None],
    ) -> None:
        """Sends over `connection` if it is usable, else over a new one. `done` is called when the reply has ended."""
        self._replies.append(reply)
        # A server that says it keeps connections, and closes them after each answer all the same (as llama.cpp's does
        # after streams), costs each request a lost one.
        kept = self._stale <= 1 + self._ended // 10
        if connection is not None and connection.usable and kept:
            self._send_over(connection, reply, body, done)
        else:
            self._send_anew(reply, body, done)

    def _send_anew(self, reply: Reply, body: bytes, done: Callable[[Connection | None, Reply], None]) -> None:
        self._under_way[reply] = None
        task = self._loop.create_task(self._connect_and_send(reply, body, done))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _connect_and_send(
        self, reply: Reply, body: bytes, done: Callable[[Connection | None, Reply], None]
    ) -> None:
        connection = Connection(self._address, self._keep_text)
        try:
            await asyncio.wait_for(connection.connect(), self._setup.timeout_s)
        except (OSError, TimeoutError) as error:
            reply.start = reply.start or perf_counter()
            reply.end = perf_counter()
            reply.error = f"cannot connect to {self._setup.url}: {str(error) or 'timed out'}"
            self._ended_one(reply)
            done(None, reply)
            return
        self._send_over(connection, reply, body, done)

    def _send_over(
        self,
        connection: Connection,
        reply: Reply,
        body: bytes,
        done: Callable[[Connection | None, Reply], None],
    ) -> None:
        def finished(used: Connection, answered: Reply) -> None:
            timer.cancel()
            if used.stale and not self._stopping:
                self._stale += 1
                answered.end, answered.error = 0.0, None
                self._send_anew(answered, body, done)
                return
            self._ended_one(answered)
            if not self._stopping:
                done(used, answered)

        timeout = self._setup.timeout_s
        timer = self._loop.call_later(timeout, connection.abort, f"not finished after {timeout:g} s")
        self._under_way[reply] = connection
        connection.send(reply, body, finished)

    def _keep_text(self, reply: Reply) -> bool:
        """Whether the text of this reply, which is about to be sent, is kept; one that is too many is let go for it."""
        most = self._setup.keep_texts
        if most is None:
            return True
        if not self._in_sample(reply):
            return False
        self._kept.append(reply)
        if len(self._kept) > 2 * most:
            self._stride *= 2
            for other in self._kept:
                if not self._in_sample(other):
                    other.texts = []
            self._kept = [other for other in self._kept if self._in_sample(other)]
        return self._in_sample(reply)

    def _in_sample(self, reply: Reply) -> bool:
        return reply.index // self._setup.workers % self._stride == 0

    def _ended_one(self, reply: Reply) -> None:
        self._under_way.pop(reply, None)
        if self._stopping:
            return
        self._ended += 1
        if reply.error is not None:
            self._failed += 1
            self._last_error = reply.error
        self._tokens += len(reply.times)

    # watching itself

    def _watch(self, due: float) -> None:
        now = self._loop.time()
        if now >= due:
            self._lags.append(now - due)
            self._lag_times.append(perf_counter())
            due = now + _LAG_S
        self._loop.call_at(due, self._watch, due)

    def _report_progress(self) -> None:
        if self._stopping:
            return
        self._cpu.append((perf_counter(), time.process_time()))
        progress = messages.Progress(self._ended, self._failed, self._tokens, len(self._under_way), self._last_error)
        self._say(progress)
        self._loop.call_later(_PROGRESS_S, self._report_progress)

    # the end

    def stop(self) -> messages.Report:
        """Ends the load where it stands. Requests under way are reported without an end."""
        self._stopping = True
        self._cpu.append((perf_counter(), time.process_time()))
        for task in self._tasks:
            task.cancel()
        for reply, connection in list(self._under_way.items()):
            if connection is not None:
                connection.abort(None)
            reply.end = 0.0
        replies = [reply for reply in self._replies if reply.start > 0]
        times = array("d")
        for reply in replies:
            times.extend(reply.times)
        return messages.Report(
            index=[reply.index for reply in replies],
            intended=[reply.intended for reply in replies],
            start=[reply.start for reply in replies],
            end=[reply.end for reply in replies],
            finished=[reply.finished for reply in replies],
            planned=[reply.planned for reply in replies],
            input=[reply.input for reply in replies],
            target=[reply.target for reply in replies],
            output=[reply.output for reply in replies],
            cached=[reply.cached for reply in replies],
            error=[reply.error for reply in replies],
            events=[len(reply.times) for reply in replies],
            event_times=times.tobytes(),
            texts={
                position: "".join(reply.texts)
                for position, reply in enumerate(replies)
                if self._in_sample(reply) and reply.end > 0 and reply.error is None
            },
            lags=self._lags.tobytes(),
            lag_times=self._lag_times.tobytes(),
            cpu_times=self._cpu,
            repeated_prompts=self._prompts.repeated,
        )

    @property
    def pause_s(self) -> float:
        return self._setup.think_time_s

    @property
    def turns(self) -> int:
        return self._setup.turns

    def later(self, seconds: float, call: Callable[[float], None], intended: float) -> None:
        self._loop.call_later(seconds, call, intended)


class _Client:
    """A closed loop of single requests. The next one is due when the answer before has ended (and been thought
    about)."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._connection: Connection | None = None

    def next(self, intended: float) -> None:
        reply, body = self._worker.next_request(intended)
        self._worker.send(reply, body, self._connection, self._ended)

    def _ended(self, connection: Connection | None, reply: Reply) -> None:
        self._connection = connection
        # A server that refuses at once is not asked a thousand times a second.
        pause = self._worker.pause_s if reply.error is None else max(self._worker.pause_s, _PAUSE_AFTER_ERROR_S)
        if pause:
            self._worker.later(pause, self.next, reply.end + pause)
        else:
            self.next(reply.end)


class _Session(_Client):
    """A closed loop of conversations: after the last turn, or a failure, the next conversation begins."""

    def __init__(self, worker: Worker) -> None:
        super().__init__(worker)
        self._history: list[dict[str, str]] = []

    def next(self, intended: float) -> None:
        if len(self._history) >= 2 * self._worker.turns:
            self._history = []
        reply, body = self._worker.session_request(intended, self._history)
        self._worker.send(reply, body, self._connection, self._ended)

    def _ended(self, connection: Connection | None, reply: Reply) -> None:
        if reply.error is None:
            self._history.append({"role": "assistant", "content": "".join(reply.texts)})
        else:
            self._history = []
        super()._ended(connection, reply)
