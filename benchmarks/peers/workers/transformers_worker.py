"""Hugging Face transformers: `generate` with its defaults, on prompts of equal length (its best case)."""

from __future__ import annotations

from typing import Any

from protocol import Engine, serve


class Transformers(Engine):
    packages = ("transformers", "torch")

    def load(self, model: str, threads: int, settings: dict[str, Any]) -> dict[str, Any]:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self.torch = torch
        self.model: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
        self.model.train(False)
        attention = self.model.config._attn_implementation
        return {"threads": threads, "dtype": "bfloat16", "attention": attention, "kv": "bfloat16"}

    def generate(self, prompts: list[list[int]], new_tokens: int) -> list[int]:
        ids = self.torch.tensor(prompts)
        with self.torch.inference_mode():
            out = self.model.generate(
                ids,
                attention_mask=self.torch.ones_like(ids),
                min_new_tokens=new_tokens,
                max_new_tokens=new_tokens,
                do_sample=False,
            )
        return [out.shape[1] - ids.shape[1]] * out.shape[0]


if __name__ == "__main__":
    serve(Transformers())
