"""torch without its rules for shapes on the meta device: what needs them finds them, and no model does."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from skyline.demo import DEMO_PATH

from ..models.families import FAMILIES
from ..models.harness import save_tiny

_COMPILER = ["_decomp", "_decomp.decompositions", "_prims", "_refs", "_inductor", "utils._content_store"]
_BEGIN = """
import sys
from skyline.ipc.torch_import import import_torch
import_torch()
import torch
RULES = "torch._meta_registrations"
assert RULES not in sys.modules and not hasattr(torch, "_meta_registrations")
"""


def _run(code: str) -> None:
    process = subprocess.run([sys.executable, "-c", _BEGIN + code], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr


@pytest.mark.parametrize(
    "code",
    [
        "program = torch.export.export(torch.nn.Linear(4, 3), (torch.ones(2, 4),))\n"
        "assert program.module()(torch.ones(2, 4)).shape == (2, 3)",
        "model = torch.nn.Linear(4, 3)\n"
        "assert torch.equal(torch.compile(model, backend='aot_eager')(torch.ones(2, 4)), model(torch.ones(2, 4)))",
        "from torch._subclasses.fake_tensor import FakeTensorMode\n"
        "with FakeTensorMode():\n"
        "    assert torch.nn.functional.embedding(torch.ones(2, dtype=torch.int64), torch.ones(4, 5)).shape == (2, 5)",
        *(f"import torch.{name}; assert torch.{name}.__spec__.name == 'torch.{name}'" for name in _COMPILER),
    ],
    ids=["export", "compile", "fake tensors", *_COMPILER],
)
def test_the_compiler_finds_its_rules(code: str) -> None:
    _run(f"{code}\nassert RULES in sys.modules and torch._meta_registrations.activate_meta")


def test_once_imported_torch_is_left_alone() -> None:
    code = (
        "import sys, torch; rules = torch._meta_registrations; finders = list(sys.meta_path)\n"
        "from skyline.ipc.torch_import import import_torch\n"
        "import_torch(); assert torch._meta_registrations is rules and sys.meta_path == finders"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_model_needs_them(tmp_path: Path) -> None:
    for family, settings in {"Llama": {}, "Qwen3": {}, "Qwen3Moe": {}, **FAMILIES}.items():
        save_tiny(tmp_path / family, family, **settings)
        shutil.copy(DEMO_PATH / "tokenizer.json", tmp_path / family)
    _run(
        "from pathlib import Path\n"
        "from skyline.engine.config import EngineConfig\n"
        "from skyline.runner.loader import load_model\n"
        f"for folder in sorted(Path({str(tmp_path)!r}).iterdir()):\n"
        "    for quantization in ('none', 'int8'):\n"
        "        settings = dict(dtype='float32', quantization=quantization, num_kv_blocks=64)\n"
        "        load_model(EngineConfig(model=str(folder), **settings)).runner.close()\n"
        "assert RULES not in sys.modules"
    )
