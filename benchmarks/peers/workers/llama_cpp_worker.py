"""llama.cpp through the low-level functions of llama-cpp-python: a static batch, one `llama_decode` a step, argmax.

The context is made for each shape of batch, outside the measured time, with one KV stream a sequence: what llama.cpp's
own batched benchmark does. Flash attention is left to it ("auto"); n_batch 2048 and n_ubatch 512 are its defaults.
"""

from __future__ import annotations

import ctypes
from typing import Any

from protocol import Engine, serve

BATCH = 2048  # tokens of one call of llama_decode
MICRO_BATCH = 512


class LlamaCpp(Engine):
    packages = ("llama-cpp-python",)

    def load(self, model: str, threads: int, settings: dict[str, Any]) -> dict[str, Any]:
        import llama_cpp
        import numpy

        self.api, self.numpy, self.threads = llama_cpp, numpy, threads
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(model.encode(), params)
        if not self.model:
            raise RuntimeError("llama.cpp could not load the file; see the log")
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.context: Any = None
        self.shape = (0, 0)
        self.batch = llama_cpp.llama_batch_init(BATCH, 0, 1)
        return {
            "threads": threads,
            "n_batch": BATCH,
            "n_ubatch": MICRO_BATCH,
            "flash_attn": "auto",
            "kv": "f16 (the default)",
            "system": llama_cpp.llama_print_system_info().decode().strip(),
        }

    def prepare(self, batch: int, total: int) -> None:
        """A context for this many sequences of this many tokens; an existing one is emptied."""
        room = -(-total // 256) * 256
        if self.shape == (batch, room):
            self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
            return
        if self.context is not None:
            self.api.llama_free(self.context)
        params = self.api.llama_context_default_params()
        params.n_ctx = batch * room
        params.n_batch, params.n_ubatch = BATCH, MICRO_BATCH
        params.n_seq_max = batch
        params.n_threads = params.n_threads_batch = self.threads
        params.kv_unified = False
        params.no_perf = True
        self.context = self.api.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError("llama.cpp could not make a context; see the log")
        self.shape = (batch, room)
        # The first use of a context touches its buffers for the first time, which is no part of a measurement.
        self._decode([(0, 0, 0, True)], [0], [0])
        self._decode([(0, 1 + position, 0, False) for position in range(min(MICRO_BATCH, room - 1))], [0], [0])
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)

    def generate(self, prompts: list[list[int]], new_tokens: int) -> list[int]:
        entries = [
            (token, position, sequence, position == len(ids) - 1)
            for sequence, ids in enumerate(prompts)
            for position, token in enumerate(ids)
        ]
        latest: list[int] = [0] * len(prompts)
        counts = [0] * len(prompts)
        for start in range(0, len(entries), BATCH):
            self._decode(entries[start : start + BATCH], latest, counts)
        for step in range(1, new_tokens):
            self._decode([(latest[s], len(ids) + step - 1, s, True) for s, ids in enumerate(prompts)], latest, counts)
        return counts

    def _decode(self, entries: list[tuple[int, int, int, bool]], latest: list[int], counts: list[int]) -> None:
        batch = self.batch
        batch.n_tokens = len(entries)
        for index, (token, position, sequence, wanted) in enumerate(entries):
            batch.token[index] = token
            batch.pos[index] = position
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = sequence
            batch.logits[index] = wanted
        status = self.api.llama_decode(self.context, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode answered {status}")
        for index, (_, _, sequence, wanted) in enumerate(entries):
            if wanted:
                pointer = self.api.llama_get_logits_ith(self.context, index)
                row = ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float * self.vocabulary)).contents
                latest[sequence] = int(self.numpy.frombuffer(row, dtype=self.numpy.float32).argmax())
                counts[sequence] += 1


if __name__ == "__main__":
    serve(LlamaCpp())
