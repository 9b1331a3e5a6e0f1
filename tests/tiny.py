"""A tiny random checkpoint that can be served: weights that transformers saved, a tokenizer, a chat template.

What it says is noise, but always the same noise, which is all that most tests need.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CHAT_TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + (message.content or '') + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}"""

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

_TEXT = [
    "The quick brown fox jumps over the lazy dog.",
    "What is 12 plus 30? 12 + 30 = 42, so the answer is 42.",
    "user assistant system tool: one two three four five six seven eight nine ten",
    "Anna has 5 apples and buys 3 more. She gives 2 of them to Ben. How many are left?",
    '{"name": "value", "numbers": [1, 2, 3], "nested": {"ok": true, "none": null}}',
    "Grüße aus Köln, 日本語 und emoji 🙂 test bytes beyond ASCII.",
]


def make_tokenizer(folder: Path, vocab_size: int = 512) -> None:
    """Write tokenizer.json (byte-level BPE) and tokenizer_config.json with a ChatML template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


def make_tiny_checkpoint(
    path: Path, architecture: str = "qwen3", vocab_size: int = 512, seed: int = 0, **overrides: Any
) -> Path:
    """Write a random float32 checkpoint to `path` and return it.

    `architecture` names the transformers classes without regard to case ("qwen3" -> Qwen3ForCausalLM, "llama", ...);
    `overrides` are fields of its configuration.
    """
    import torch
    import transformers

    path.mkdir(parents=True, exist_ok=True)
    make_tokenizer(path, vocab_size)
    family = next(name for name in dir(transformers) if name.lower() == f"{architecture.lower()}forcausallm")
    family = family.removesuffix("ForCausalLM")
    fields: dict[str, Any] = dict(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=SPECIAL_TOKENS.index("<|im_end|>"),
        pad_token_id=SPECIAL_TOKENS.index("<|endoftext|>"),
    )
    config = getattr(transformers, f"{family}Config")(**{**fields, **overrides})
    generator = torch.Generator().manual_seed(seed)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # The library's own starting values leave the logits so flat that a greedy choice would be a near-tie.
            around = 1.0 if "norm" in name else 0.0
            scale = 0.2 if parameter.dim() == 1 else 2.0 * parameter.shape[-1] ** -0.5
            parameter.copy_(around + scale * torch.randn(parameter.shape, generator=generator))
    model.to(torch.float32).save_pretrained(path)
    return path
