"""vLLM's CPU build through its offline API. Threads are bound by the coordinator's VLLM_CPU_OMP_THREADS_BIND."""

from __future__ import annotations

import os
from typing import Any

from protocol import Engine, serve

BLOCK = 128  # tokens a KV block, vLLM's own choice on CPUs


class Vllm(Engine):
    packages = ("vllm-cpu", "torch", "transformers")

    def load(self, model: str, threads: int, settings: dict[str, Any]) -> dict[str, Any]:
        from vllm import LLM, SamplingParams

        options: dict[str, Any] = {
            "dtype": "bfloat16",
            "max_model_len": settings["max_model_len"],
            "max_num_seqs": settings["max_num_seqs"],
            "enable_prefix_caching": False,
            "kv_cache_memory_bytes": settings["kv_tokens"] * settings["kv_token_bytes"],
        }
        self.llm = LLM(model, disable_log_stats=True, **options)
        self.params = SamplingParams
        bound = os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "")
        return {**options, "threads": threads, "omp_threads_bind": bound, "kv": "bfloat16"}

    def generate(self, prompts: list[list[int]], new_tokens: int) -> list[int]:
        params = self.params(temperature=0, max_tokens=new_tokens, ignore_eos=True)
        outputs = self.llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        return [len(output.outputs[0].token_ids) for output in outputs]


if __name__ == "__main__":  # vLLM spawns its engine: the guard is needed
    serve(Vllm())
