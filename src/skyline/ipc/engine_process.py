"""The engine process: `python -m skyline.ipc.engine_process`, started by `skyline.ipc.client`."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import sys
import threading
import time

import msgspec
import zmq

from skyline.engine.core import EngineCore
from skyline.engine.messages import (
    AbortRequests,
    EngineFailed,
    EngineOutput,
    EngineReady,
    EngineRequest,
    FromEngine,
    ResetPrefixCache,
    Shutdown,
    StatsReport,
    StepOutputs,
)
from skyline.ipc.protocol import STATS_INTERVAL_S, Launch, encoder, to_engine_decoder
from skyline.ipc.torch_import import import_torch

logger = logging.getLogger("skyline.engine")

_PAUSE_MS = 50  # without work, before something is done in advance: a client's next request may be on its way


class EngineServer:
    """Feeds an EngineCore from a socket and sends out what it produces."""

    def __init__(self, core: EngineCore, requests: zmq.Socket[bytes], outputs: zmq.Socket[bytes]) -> None:
        self._core = core
        self._requests = requests
        self._outputs = outputs

    def run(self) -> None:
        """Until a Shutdown message. Raises what the core raises when it cannot go on."""
        while True:
            outputs: list[EngineOutput] = []
            if not self._take_messages(outputs, wait=not self._core.has_work):
                return
            if self._core.has_work:
                outputs += self._core.step()
            if outputs:
                self._outputs.send(encoder.encode(StepOutputs(outputs)))

    def _take_messages(self, outputs: list[EngineOutput], wait: bool) -> bool:
        # While nobody asks for anything, what saves time later is done bit by bit.
        more = True
        while wait and not self._requests.poll(_PAUSE_MS if more else None):
            more = self._core.idle()
        while True:
            try:
                message = to_engine_decoder.decode(self._requests.recv(zmq.NOBLOCK))
            except zmq.Again:
                return True
            if isinstance(message, EngineRequest):
                refused = self._core.add(message)
                if refused is not None:
                    outputs.append(refused)
            elif isinstance(message, AbortRequests):
                outputs += self._core.abort(message.request_ids)
            elif isinstance(message, ResetPrefixCache):
                self._core.reset_prefix_cache()
            elif isinstance(message, Shutdown):
                return False


def _report_stats(core: EngineCore, address: str) -> None:
    """A thread with a socket of its own, so that a long step does not keep it from showing that the process lives."""
    socket = zmq.Context().socket(zmq.PUSH)  # and its own context, so that `main` can terminate its one
    socket.connect(address)
    while True:
        socket.send(encoder.encode(StatsReport(core.stats())))
        time.sleep(STATS_INTERVAL_S)


def _exit_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(0)


def _use_huge_pages() -> None:
    """Once the first request has had its chance, and in time that no step needs."""
    from skyline.ops.host_memory import use_huge_pages

    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)  # Linux: of this thread alone
    time.sleep(2.0)
    use_huge_pages()


def main() -> int:
    # Signals reach the whole process group; the front end decides what they mean, and this process ends with it.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    logging.basicConfig(level=os.environ.get("SKYLINE_LOG_LEVEL", "INFO"), format="%(levelname)s %(name)s: %(message)s")
    gc.disable()  # nothing that is made while loading is garbage; looking for some takes a fifth of the time
    began = time.perf_counter()
    import_error: Exception | None = None
    try:  # before the settings, which may not be known yet
        import_torch()
        from skyline.runner.loader import load_model
    except Exception as error:
        import_error = error
    import_seconds = time.perf_counter() - began
    line = sys.stdin.buffer.readline()
    if not line:
        return 0  # started ahead of time, and not needed after all
    launch = msgspec.json.decode(line, type=Launch)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    requests, outputs = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    requests.bind(launch.requests_address)
    outputs.connect(launch.outputs_address)

    def send(message: FromEngine) -> None:
        outputs.send(encoder.encode(message))

    try:
        if import_error is not None:
            raise import_error
        loaded = load_model(launch.config)
        loaded.report["import"] = f"{import_seconds:.2f} s torch and kernels"
        core = EngineCore(
            loaded.limits,
            loaded.runner,
            eos_token_ids=loaded.eos_token_ids,
            async_scheduling=launch.config.async_scheduling,
            seed=launch.config.seed,
        )
        gc.freeze()
        gc.enable()
        threading.Thread(target=_report_stats, args=(core, launch.outputs_address), daemon=True).start()
        limits = loaded.limits
        send(EngineReady(limits.max_model_len, loaded.vocab_size, limits.num_blocks, limits.block_size, loaded.report))
        threading.Thread(target=_use_huge_pages, daemon=True).start()
        EngineServer(core, requests, outputs).run()
        loaded.runner.close()
    except Exception as error:
        logger.debug("the engine process fails", exc_info=True)
        send(EngineFailed(f"{type(error).__name__}: {error}"))
        return 1
    finally:
        requests.close(linger=0)
        outputs.close(linger=2000)
        context.term()  # waits until the last words are out
    return 0


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    # Daemon threads hold sockets; the interpreter's orderly teardown would wait for them.
    os._exit(code)
