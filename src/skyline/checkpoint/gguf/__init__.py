"""GGUF, llama.cpp's format of one file for weights, configuration and tokenizer. Needs numpy, not torch."""

from skyline.checkpoint.gguf.folder import WEIGHTS_FILE, materialize

__all__ = ["WEIGHTS_FILE", "materialize"]
