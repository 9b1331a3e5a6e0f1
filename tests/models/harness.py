"""Runs a model over paged KV memory step by step, the way the engine does, and makes tiny transformers checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from skyline.checkpoint.config import load_config
from skyline.checkpoint.weights import SafetensorsWeights, load
from skyline.engine.config import EngineConfig
from skyline.models import create_model, destinations, ignorable, kv_caches
from skyline.ops import AttentionBatch
from skyline.runner.memory import set_kv_format

CPU = torch.device("cpu")


def save_tiny(folder: Path, family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """Write a tiny random transformers model to `folder` and return it. `family`: "Llama", "Qwen3Moe", ..."""
    import transformers

    base = dict(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        rms_norm_eps=0.03,  # far from any default, and large enough to be noticed
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    config_name = f"{family}TextConfig" if hasattr(transformers, f"{family}TextConfig") else f"{family}Config"
    config = getattr(transformers, config_name)(**{**base, **settings})
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # The library starts biases at zero, norms at one and the rest small: that would hide mistakes.
            around = 1.0 if "norm" in name and float(parameter.mean()) > 0.5 else 0.0
            scale = 0.2 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5
            parameter.copy_(around + torch.randn_like(parameter) * scale)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.randn_like(buffer) * 0.1)
    model = model.to(dtype)
    model.save_pretrained(folder)
    return model


def load_ours(folder: Path, dtype: torch.dtype = torch.float32, max_positions: int | None = None) -> nn.Module:
    """Our model with the weights of a checkpoint folder, by the same path as the engine."""
    model = create_model(load_config(folder), dtype, CPU, max_positions)
    load(SafetensorsWeights(folder), destinations(model), ignore=ignorable(model))
    return model


class PagedRunner:
    """Requests by name, each with its own scattered KV blocks; `step` computes the next tokens of any of them."""

    def __init__(
        self,
        model: nn.Module,
        num_blocks: int = 128,
        block_size: int = 4,
        run: Callable[..., torch.Tensor] | None = None,
    ) -> None:
        """`run`: a Program of the model, to be called in its place."""
        self.run = run or model
        self.block_size = block_size
        set_kv_format(EngineConfig(model="", device="cpu"), kv_caches(model))
        for cache in kv_caches(model):
            cache.allocate(num_blocks, block_size, CPU)
        order = torch.randperm(num_blocks - 1, generator=torch.Generator().manual_seed(7)) + 1
        self._free: list[int] = order.tolist()
        self._tables: dict[str, list[int]] = {}
        self._done: dict[str, int] = {}

    @torch.inference_mode()
    def step(self, *work: tuple[str, list[int]], rows: list[int] | None = None) -> list[torch.Tensor]:
        """Append tokens to requests, all in one batch. Returns the logits [tokens, vocab] of each.

        With `rows`, which count through the batch, the one tensor returned has the logits of those alone.
        """
        starts = [self._done.get(name, 0) for name, _ in work]
        lengths = [len(tokens) for _, tokens in work]
        for (name, tokens), start in zip(work, starts, strict=True):
            table = self._tables.setdefault(name, [])
            self._done[name] = start + len(tokens)
            while len(table) * self.block_size < self._done[name]:
                table.append(self._free.pop())
        tables = [self._tables[name] for name, _ in work]
        batch = AttentionBatch.build(tables, starts, lengths, self.block_size, CPU)
        positions = [start + i for start, length in zip(starts, lengths, strict=True) for i in range(length)]
        logits = self.run(
            torch.tensor([token for _, tokens in work for token in tokens]),
            torch.tensor(positions),
            batch,
            torch.arange(len(positions)) if rows is None else torch.tensor(rows),
        )
        return list(logits.split(lengths)) if rows is None else [logits]
