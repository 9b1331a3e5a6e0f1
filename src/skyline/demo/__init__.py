"""Skyline's embedded demonstration model: a small transformer that solves arithmetic word problems, see README.md.

``skyline serve`` without a model serves it.  `skyline.demo.problems` generates what it was trained on,
`skyline.demo.evaluate` measures any OpenAI-compatible server against the held-out problems.
"""

from pathlib import Path

DEMO_PATH: Path = Path(__file__).with_name("model")
"""Checkpoint directory in the Hugging Face layout (Qwen3ForCausalLM)."""

HELDOUT_PATH: Path = Path(__file__).with_name("heldout.jsonl")
"""500 held-out problems, one JSON object {"question": str, "answer": int} a line."""

__all__ = ["DEMO_PATH", "HELDOUT_PATH"]
