"""Checkpoints on disk: configuration, tokenizer, chat template and where to find them.

Only what needs no torch is exported here, so that a process without torch can use it; the weights are in
`skyline.checkpoint.weights`. Chat templates, which the engine's process has no use for, are in
`skyline.checkpoint.chat_template`.
"""

from skyline.checkpoint.config import (
    GenerationDefaults,
    ModelConfig,
    effective_eos_token_ids,
    load_config,
    load_generation_defaults,
)
from skyline.checkpoint.errors import CheckpointError
from skyline.checkpoint.hub import resolve
from skyline.checkpoint.rope import RopeConfig
from skyline.checkpoint.tokenizer import Tokenizer

__all__ = [
    "CheckpointError",
    "GenerationDefaults",
    "ModelConfig",
    "RopeConfig",
    "Tokenizer",
    "effective_eos_token_ids",
    "load_config",
    "load_generation_defaults",
    "resolve",
]
