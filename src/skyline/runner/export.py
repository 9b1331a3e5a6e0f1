"""Writes a quantized copy of a checkpoint, tensor by tensor, in the format of compressed-tensors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from skyline.checkpoint import CheckpointError, load_config
from skyline.checkpoint.fields import read_json_object
from skyline.checkpoint.safetensors_weights import INDEX_FILE, SINGLE_FILE, SafetensorsWeights
from skyline.graph import capture, quantize_linears
from skyline.models import create_model, destinations
from skyline.ops.formats import integers_of
from skyline.quantization.compress import COMPRESSIONS, Compression
from skyline.runner.checkpoint import Checkpoint

SHARD_BYTES = 4 << 30
_COPIED = ("generation_config.json", "tokenizer*", "special_tokens_map.json", "chat_template*", "vocab*", "merges.txt")


@dataclass(frozen=True, slots=True)
class Exported:
    """quantized, kept: how many weights of linear layers became small, and how many stayed. Bytes of all tensors."""

    quantized: int
    kept: int
    bytes_before: int
    bytes_after: int


def export(source: Path, target: Path, format: str, on_progress: Callable[[int, int], None] | None = None) -> Exported:
    """Write `source`, a folder with a plain checkpoint, to `target`, a folder that does not exist or is empty.

    Linear layers and experts become `format`, a name of COMPRESSIONS; embeddings, the output head, norms, routers and
    gates stay as they are, and so do linears whose columns no group divides. Nothing is left in `target` if it fails.
    `on_progress(tensors done, tensors in all)`. Raises CheckpointError or ValueError with what to do.
    """
    if format not in COMPRESSIONS:
        raise ValueError(f"format must be one of {', '.join(COMPRESSIONS)}, not {format!r}")
    if target.exists() and any(target.iterdir()):
        raise ValueError(f"{target} is not empty; name a folder that does not exist")
    compression = COMPRESSIONS[format]
    chosen, linears = _linears(source)
    made = not target.exists()
    target.mkdir(parents=True, exist_ok=True)
    try:
        with SafetensorsWeights(source) as weights:
            fitting = {name for name in chosen if weights.shape(name)[-1] % compression.group == 0}
            writer = _Shards(target)
            for done, name in enumerate(weights):
                for part, tensor in _parts(weights, name, compression if name in fitting else None):
                    writer.add(part, tensor)
                if on_progress is not None:
                    on_progress(done + 1, len(weights))
            writer.finish()
            kept = sorted(name.removesuffix(".weight") for name in linears - fitting)
            config = read_json_object(source / "config.json")
            config["quantization_config"] = compression.config(["lm_head", *kept])
            (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
            for pattern in _COPIED:
                for path in source.glob(pattern):
                    shutil.copyfile(path, target / path.name)
            return Exported(len(fitting), len(kept), weights.nbytes, writer.nbytes)
    except BaseException:
        if made:
            shutil.rmtree(target, ignore_errors=True)
        else:
            for path in target.iterdir():
                path.unlink()
        raise


def _linears(source: Path) -> tuple[set[str], set[str]]:
    """Checkpoint names of the weights to quantize, and of all linears but the output head."""
    config = load_config(source)
    checkpoint = Checkpoint(source, config)
    checkpoint.close()
    if checkpoint.method:
        raise CheckpointError(f"{source} is quantized already ({checkpoint.method}); take the original checkpoint")
    with SafetensorsWeights(source) as weights:
        names = set(weights)
    model = create_model(config, torch.bfloat16, "meta", allocate=False)
    graph = capture(model)
    quantize_linears(graph, "int8")
    head = model.get_parameter("lm_head.weight")
    chosen, linears = set(), set()
    for name, place in destinations(model).items():
        parameter = place.tensor if place.tensor._base is None else place.tensor._base
        if name not in names or not name.endswith(".weight") or place.transform is not None or parameter is head:
            continue
        if place.tensor.dim() == 2 and "embed_tokens" not in name:
            linears.add(name)
            if integers_of(parameter) is not None:
                chosen.add(name)
    if not chosen:
        raise CheckpointError(
            f"{source}: no weight of {config.architecture} could be quantized under the names of this checkpoint"
        )
    return chosen, linears


def _parts(
    weights: SafetensorsWeights, name: str, compression: Compression | None
) -> Iterator[tuple[str, torch.Tensor]]:
    tensor = weights.get(name)
    if compression is None:
        yield name, tensor
        return
    stem = name.removesuffix("weight")
    try:
        parts = compression.compress(tensor)
    except ValueError as error:
        raise CheckpointError(f"{weights.folder}: {name} {error}") from error
    for end, part in parts.items():
        yield stem + end, part.contiguous()


class _Shards:
    """Files of at most SHARD_BYTES, with an index if there are several."""

    def __init__(self, folder: Path) -> None:
        self.nbytes = 0
        self._folder = folder
        self._waiting: dict[str, torch.Tensor] = {}
        self._size = 0
        self._files: list[tuple[Path, list[str]]] = []

    def add(self, name: str, tensor: torch.Tensor) -> None:
        if self._waiting and self._size + tensor.nbytes > SHARD_BYTES:
            self._flush()
        self._waiting[name] = tensor
        self._size += tensor.nbytes
        self.nbytes += tensor.nbytes

    def _flush(self) -> None:
        path = self._folder / f"part-{len(self._files)}.safetensors"
        save_file(self._waiting, path, metadata={"format": "pt"})
        self._files.append((path, list(self._waiting)))
        self._waiting, self._size = {}, 0

    def finish(self) -> None:
        self._flush()
        if len(self._files) == 1:
            self._files[0][0].rename(self._folder / SINGLE_FILE)
            return
        weight_map: dict[str, str] = {}
        for index, (path, names) in enumerate(self._files):
            final = f"model-{index + 1:05}-of-{len(self._files):05}.safetensors"
            path.rename(self._folder / final)
            weight_map |= dict.fromkeys(names, final)
        index_text = json.dumps({"metadata": {"total_size": self.nbytes}, "weight_map": weight_map}, indent=2)
        (self._folder / INDEX_FILE).write_text(index_text + "\n")
