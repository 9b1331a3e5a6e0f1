"""Which tensor of a GGUF file is which of a Hugging Face checkpoint: what llama.cpp's converters (conversion/*.py) did
to the tensors is described here, to be undone where they are read.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from skyline.checkpoint.errors import CheckpointError
from skyline.checkpoint.gguf.architectures import Architecture, Header, find, layer_count
from skyline.checkpoint.gguf.reader import GGUFFile, GGUFTensor

MAX_PLACED = 1 << 19  # an expert counts as three; the largest models have a tenth of that

_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = re.compile(r"blk\.(\d{1,5})\.(.+)")
_GATE, _UP = (re.compile(rf"(.+\.mlp\.experts\.){part}_proj(|_bias)") for part in ("gate", "up"))


@dataclass(frozen=True, slots=True)
class Placed:
    """A tensor of the Hugging Face checkpoint: which tensor of which file it is, and what is to be done to it.

    heads: its rows are those of so many heads, and in each head the two halves that rotate together are interleaved.
    partner: its rows and the partner's, which has the same shape, take turns along the second dimension.
    transposed: after that, the last two of three dimensions change places.
    shift: is added to every value.
    """

    file: GGUFFile
    tensor: GGUFTensor
    heads: int | None = None
    partner: Placed | None = None
    transposed: bool = False
    shift: float = 0.0

    @property
    def shape(self) -> tuple[int, ...]:
        """As in the checkpoint."""
        shape = list(self.tensor.shape)
        if self.partner is not None:
            shape[1] *= 2
        return (shape[0], *reversed(shape[1:])) if self.transposed else tuple(shape)

    @property
    def is_as_stored(self) -> bool:
        """Whether nothing is to be done."""
        return self.heads is None and self.partner is None and not self.transposed and self.shift == 0.0


def place(header: Header) -> dict[str, Placed]:
    """Every tensor of the model by its Hugging Face name. Those without a counterpart keep their own.

    CheckpointError if a shape contradicts the metadata, or two tensors get one name.
    """
    architecture, layers = find(header), layer_count(header)
    placed: dict[str, Placed] = {}
    for name, file in header.files.items():
        module, _, suffix = name.rpartition(".")
        layer = _LAYER.fullmatch(module)
        if name == "rope_freqs.weight" or (layer is not None and int(layer[1]) >= layers):
            continue  # config.json says it, or it only predicts further tokens
        whole = Placed(file, file.tensors[name])
        if layer is None:
            entries = {f"{_OUTER[module]}.{suffix}" if module in _OUTER else name: whole}
        else:
            entries = _place_in_layer(header, architecture, int(layer[1]), f"{layer[2]}.{suffix}", whole)
        for target, entry in entries.items():
            if target in placed:
                raise CheckpointError(f"{header.where}: two tensors are {target}, one of them {name!r}")
            if len(entry.tensor.shape) == 1 and entry.tensor.type.block is not None:
                raise CheckpointError(f"{header.where}: tensor {name!r} has one dimension and is quantized")
            shift = architecture.norm_shift if target.endswith("norm.weight") else 0.0
            placed[target] = replace(entry, shift=shift)
        if len(placed) > MAX_PLACED:
            raise CheckpointError(f"{header.where} describes more than {MAX_PLACED} tensors, so it is damaged")
    return _join_experts(header, placed) if architecture.joined_experts else placed


def _place_in_layer(
    header: Header, architecture: Architecture, layer: int, name: str, placed: Placed
) -> dict[str, Placed]:
    """Of one tensor of a layer, or of one for each expert."""
    module, _, suffix = name.rpartition(".")
    target = architecture.layer_names.get(name)
    if target is None and module in architecture.layer_names:
        target = f"{architecture.layer_names[module]}.{suffix}"
    if target is None:
        return {placed.tensor.name: placed}
    target = f"model.layers.{layer}.{target}"
    if "{}" in target:
        experts = _split(placed.tensor, header.size("expert_count", 2**16), header.where)
        return {target.format(number): replace(placed, tensor=expert) for number, expert in enumerate(experts)}
    if architecture.interleaved and module in ("attn_q", "attn_k"):
        heads = header.size("attention.head_count", 2**16)
        heads = heads if module == "attn_q" else header.size("attention.head_count_kv", 2**16, heads)
        if placed.tensor.shape[0] % (2 * heads):
            raise CheckpointError(
                f"{header.where}: tensor {placed.tensor.name!r} cannot have the rows of {heads} heads"
            )
        placed = replace(placed, heads=heads)
    return {target: placed}


def _join_experts(header: Header, placed: dict[str, Placed]) -> dict[str, Placed]:
    """Gate and up together, and all matrices of experts as [experts, inputs, outputs]."""
    joined: dict[str, Placed] = {}
    for name, entry in placed.items():
        gate = _GATE.fullmatch(name)
        transposed = ".mlp.experts." in name and len(entry.tensor.shape) == 3
        if gate is not None:
            up = placed.get(f"{gate[1]}up_proj{gate[2]}")
            if up is None or up.shape != entry.shape or len(up.shape) < 2:
                raise CheckpointError(f"{header.where}: {entry.tensor.name!r} has no counterpart of its shape for up")
            joined[f"{gate[1]}gate_up_proj{gate[2]}"] = replace(entry, partner=up, transposed=transposed)
        elif not _UP.fullmatch(name):
            joined[name] = replace(entry, transposed=transposed)
    return joined


def _split(tensor: GGUFTensor, experts: int, where: str) -> list[GGUFTensor]:
    """[experts, ...] as one tensor an expert."""
    if len(tensor.shape) < 2 or tensor.shape[0] != experts:
        raise CheckpointError(f"{where}: tensor {tensor.name!r} {list(tensor.shape)} is not of {experts} experts")
    shape, size = tensor.shape[1:], tensor.nbytes // experts
    return [GGUFTensor(tensor.name, shape, tensor.type, tensor.offset + i * size, size) for i in range(experts)]


def interleaved_rows(rows: int, heads: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """For each row of the checkpoint, which row of the file it is.

    transformers rotates the first half of a head with the second; llama.cpp's Llama rotates neighbours, and its
    converter (LlamaModel.permute) puts the rows in that order.
    """
    return np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)
