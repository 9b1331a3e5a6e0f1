"""OpenVINO GenAI: its continuous batching pipeline, fed with token ids."""

from __future__ import annotations

from typing import Any

from protocol import Engine, serve

BLOCK = 32  # tokens a KV block on CPUs


class OpenVino(Engine):
    packages = ("openvino-genai", "openvino", "openvino-tokenizers")

    def load(self, model: str, threads: int, settings: dict[str, Any]) -> dict[str, Any]:
        import numpy
        import openvino
        import openvino_genai

        self.numpy, self.openvino, self.genai = numpy, openvino, openvino_genai
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.num_kv_blocks = settings["kv_tokens"] // BLOCK + 1
        scheduler.max_num_seqs = settings["max_num_seqs"]
        scheduler.max_num_batched_tokens = 2048
        scheduler.enable_prefix_caching = False
        properties = {"INFERENCE_NUM_THREADS": threads, **settings.get("properties", {})}
        self.pipeline = openvino_genai.ContinuousBatchingPipeline(model, scheduler, "CPU", properties)
        return {
            **properties,
            "pipeline": "ContinuousBatchingPipeline",
            "num_kv_blocks": scheduler.num_kv_blocks,
            "max_num_batched_tokens": scheduler.max_num_batched_tokens,
            "kv": properties.get("KV_CACHE_PRECISION", "u8 (the default)"),
        }

    def generate(self, prompts: list[list[int]], new_tokens: int) -> list[int]:
        config = self.genai.GenerationConfig()
        config.max_new_tokens = new_tokens
        config.ignore_eos = True
        config.do_sample = False
        tensors = [self.openvino.Tensor(self.numpy.array([ids], dtype=self.numpy.int64)) for ids in prompts]
        results = self.pipeline.generate(tensors, [config] * len(prompts))
        return [len(result.m_generation_ids[0]) for result in results]


if __name__ == "__main__":
    serve(OpenVino())
