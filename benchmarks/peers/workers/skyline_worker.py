"""Skyline as users run it: `from skyline import LLM`, the engine in its own process."""

from __future__ import annotations

from typing import Any

from protocol import Engine, serve


class Skyline(Engine):
    packages = ("skyline-llm", "torch")

    def load(self, model: str, threads: int, settings: dict[str, Any]) -> dict[str, Any]:
        from skyline import LLM, SamplingParams

        options: dict[str, Any] = {
            "threads": threads,
            "enable_prefix_caching": False,
            "max_model_len": settings["max_model_len"],
            "max_num_seqs": settings["max_num_seqs"],
            "kv_cache_dtype": settings["kv_cache_dtype"],
            "num_kv_blocks": settings["kv_tokens"] // 16 + 1,
        }
        if settings["format"] in ("int8", "int4"):
            options["quantization"] = settings["format"]
        self.llm = LLM(model, **options)
        self.params = SamplingParams
        return {**options, "kv": "int8" if settings["kv_cache_dtype"] == "int8" else "bfloat16"}

    def generate(self, prompts: list[list[int]], new_tokens: int) -> list[int]:
        params = self.params(temperature=0, max_tokens=new_tokens, ignore_eos=True)
        outputs = self.llm.generate(prompts, params, progress=False)
        return [len(output.outputs[0].token_ids) for output in outputs]

    def close(self) -> None:
        self.llm.close()


if __name__ == "__main__":
    serve(Skyline())
