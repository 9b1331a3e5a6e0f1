"""A checkpoint's weights by the names that a model knows them by: plain or quantized, in one file format or another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from skyline.checkpoint.config import ModelConfig
from skyline.checkpoint.errors import CheckpointError
from skyline.checkpoint.gguf import WEIGHTS_FILE
from skyline.checkpoint.weights import Destination, LoadReport, SafetensorsWeights, Weights, load
from skyline.kernels.gpu import Gpu
from skyline.models import destinations, ignorable
from skyline.ops import Fp4Weight, KVCache
from skyline.ops.formats import IntegerFormat, integers_of, together
from skyline.ops.fp4 import MXFP4_GROUP, NVFP4_GROUP
from skyline.quantization.formats import KVScales, Stored, detect
from skyline.quantization.formats.gguf import GGUFWeight, GGUFWeights
from skyline.quantization.formats.scaled import ScaledWeight, Whole

# Where checkpoints that also see keep the language model, and what it is called in one that does not.
_PREFIXES = {
    "model.language_model.": "model.",
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
}
_SIGHT = ("model.visual.*", "visual.*", "*vision_tower.*", "*multi_modal_projector.*")


class Checkpoint:
    """Opens a folder's weights; nothing but headers is read. Use as a context manager.

    method: how the weights are quantized, for people; "" where they are not.
    """

    def __init__(self, folder: Path, config: ModelConfig) -> None:
        """Raises CheckpointError if a file is damaged or a format unknown."""
        self.method = ""
        self._stored: dict[str, Stored] = {}
        self._passed_over: set[str] = set()  # parts of stored weights, and what has no use here
        self._kv_scales: dict[str, KVScales] = {}
        self._with_inputs: set[str] = set()  # weights that were quantized together with what they multiply
        source: Any
        if (folder / WEIGHTS_FILE).exists():
            source = GGUFWeights(folder)
            self.method, self._stored = "GGUF", source.stored
        else:
            source = SafetensorsWeights(folder)
            found = detect(config.quantization_config, source)
            if found is not None:
                self.method = found.method
                self._passed_over = {_renamed(name) for name in found.consumed | found.spare}
                self._stored = {_renamed(name): stored for name, stored in found.stored.items()}
                self._with_inputs = {
                    _renamed(name)
                    for name, scale in found.input_scales.items()
                    if _scales_nvfp4(found.stored[name], scale)
                }
                self._kv_scales = {_renamed(name): scales for name, scales in found.kv_scales.items()}
        self._source = source
        self._weights = _Renamed(source)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if isinstance(self._source, SafetensorsWeights):
            self._source.close()

    def report(self, model: nn.Module, dtype: torch.dtype) -> list[dict[str, Any]]:
        """What becomes of the stored weights in memory, once that is decided: format, count, and `becomes`, for people.

        Plain weights are not listed.
        """
        places = destinations(model) if self._stored else {}
        name_of = str(dtype).removeprefix("torch.")
        counts: Counter[tuple[str, str]] = Counter()
        for name, stored in self._stored.items():
            if name not in places:
                continue
            decided = integers_of(_whole(places[name].tensor))
            if decided is None:
                becomes = f"{name_of}, exactly" if stored.exact or dtype == torch.float32 else f"{name_of}, rounded"
            elif _goes_into(stored, decided) and (places[name].transform is None or decided.fp4):
                becomes = f"{_described(decided)}, as stored"
            else:
                becomes = f"{_described(decided)}, quantized again"
            counts[stored.format, becomes] += 1
        return [{"format": f, "becomes": b, "weights": count} for (f, b), count in counts.items()]

    def integers(
        self, model: nn.Module, gpu: Gpu | None = None, compiled: frozenset[str] = frozenset()
    ) -> dict[int, IntegerFormat]:
        """By parameter's id, in what form kernels take all of its rows as they are stored, of GGUF's types together.

        For a GPU, FP8 only if it can, and no bytes. compiled: kinds that a CPU takes (`loader.compiled_kinds`).
        """
        if not self._stored:
            return {}  # a model of many experts has many places to go over
        found: dict[int, list[IntegerFormat | None]] = {}
        for name, place in destinations(model).items():
            stored = self._stored.get(name)
            format = None if stored is None else _kept(stored, place, gpu, compiled)
            if format is not None and format.fp4 and format.group == NVFP4_GROUP and name in self._with_inputs:
                format = replace(format, activations=True)
            for tensor in (place.tensor, *place.others):
                found.setdefault(id(_whole(tensor)), []).append(format)
        joined = {key: together(formats) for key, formats in found.items()}
        return {key: format for key, format in joined.items() if format is not None}

    def load(self, model: nn.Module, write: Callable[[torch.Tensor, Any], None]) -> LoadReport:
        """Hand every weight to `write(part of a parameter, rows)`; rows may be a QuantizedWeight, see WeightStore."""
        places = destinations(model)
        derived = {name: _AsWanted(stored, places.get(name)) for name, stored in self._stored.items()}
        for name, stored in derived.items():
            if stored.in_order:
                places[name] = Destination(places[name].tensor)
        return load(
            self._weights,
            places,
            ignore=[*ignorable(model), *_SIGHT, *map(_escaped, self._passed_over)],
            write=write,
            derived=derived,
        )

    def scale_keys_and_values(self, model: nn.Module) -> int:
        """Give caches in fp8, not allocated yet, the scales that the checkpoint has; returns how many got them."""
        count = 0
        for path, module in model.named_modules():
            cache = getattr(module, "cache", None)
            scales = self._kv_scales.get(path)
            if scales is None or not isinstance(cache, KVCache) or cache.dtype != torch.float8_e4m3fn:
                continue
            for attribute, name in (("k_scale", scales.key), ("v_scale", scales.value)):
                setattr(cache, attribute, self._head_scales(name, cache.num_kv_heads))
            count += 1
        return count

    def _head_scales(self, name: str, heads: int) -> torch.Tensor:
        values = self._source.get(name).float().flatten()
        if values.numel() not in (1, heads):
            raise CheckpointError(f"{name} has {values.numel()} values, but there are {heads} heads of keys and values")
        if not bool(values.isfinite().all()):
            raise CheckpointError(f"{name} is not finite; quantize the checkpoint again")
        values = torch.where(values > 0, values, 1.0)  # -1: none was computed
        return values.expand(heads).clone()


class _AsWanted:
    """Rows of a stored weight as its parameter takes them: integers where those are what it becomes, else floats.

    in_order: they come as the parameter's rows lie, so that no transform is left to do.
    """

    def __init__(self, stored: Stored, place: Destination | None) -> None:
        decided = None if place is None else integers_of(_whole(place.tensor))
        self._stored, self.shape = stored, stored.shape
        self._as_integers = self.in_order = self._as_bytes = False
        self._order: torch.Tensor | None = None
        if place is None or decided is None or not _goes_into(stored, decided):
            return
        if place.transform is None:
            self._as_integers, self._as_bytes = True, decided.widened
        elif (order := _order(stored, place)) is not None:
            self._as_integers = self.in_order = True
            self._order, self.shape = order, tuple(place.tensor.shape)

    def read(self, start: int, stop: int) -> Any:
        if not self._as_integers:
            return self._stored.read(start, stop)
        if self._as_bytes:
            assert isinstance(self._stored, GGUFWeight)
            return self._stored.as_bytes(start, stop)
        rows = self._stored.levels(start, stop)
        if self._order is None:
            return rows
        assert isinstance(rows, Fp4Weight)
        n = len(self._order)
        return rows.rows_at((torch.arange(stop - start)[:, None] * n + self._order).flatten())


class _Renamed:
    """Weights under the names of a checkpoint that is only a language model."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self.folder = weights.folder
        self._names: Mapping[str, str] = {_renamed(name): name for name in weights}

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def shape(self, name: str) -> tuple[int, ...]:
        return self._weights.shape(self._names[name])

    def dtype(self, name: str) -> torch.dtype:
        return self._weights.dtype(self._names[name])

    def get(self, name: str) -> torch.Tensor:
        return self._weights.get(self._names[name])


def _renamed(name: str) -> str:
    for prefix, plain in _PREFIXES.items():
        if name.startswith(prefix):
            return plain + name.removeprefix(prefix)
    return name


def _kept(stored: Stored, place: Destination, gpu: Gpu | None, compiled: frozenset[str]) -> IntegerFormat | None:
    """What kernels can take as it is stored."""
    format = stored.integers
    if format is None or (place.transform is not None and not (format.fp4 and _order(stored, place) is not None)):
        return None
    if gpu is None:
        return format if format.kind in compiled else None
    if format.widened or (format.fp8 and not (gpu.fp8 and _whole_blocks(place, format))):
        return None
    return format


def _scales_nvfp4(stored: Stored, scale: str) -> bool:
    """Whether the static scale of an NVFP4 weight's input is one of NVFP4: compressed-tensors has others, too."""
    if not isinstance(stored, ScaledWeight) or stored.whole is None:
        return False
    return scale.endswith("input_global_scale") == (stored.whole[1] is Whole.DIVIDES)


def _goes_into(stored: Stored, decided: IntegerFormat) -> bool:
    """Whether what was decided for a parameter takes the weight's rows as they are stored."""
    if stored.integers is None or decided == stored.integers:
        return decided == stored.integers
    return decided.widened and isinstance(stored, GGUFWeight)


def _order(stored: Stored, place: Destination) -> torch.Tensor | None:
    """Which row of a stored matrix [N, K] each of the parameter's is, where the transform, of an entry, only turns the
    matrix and puts rows elsewhere; None where it does more."""
    if (
        not isinstance(stored, (ScaledWeight, GGUFWeight))
        or not place.by_entry
        or place.transform is None
        or place.others
    ):
        return None
    n = stored.matrix[-2]
    numbered = torch.arange(4 * n).view(n, 4)
    moved = place.transform(numbered.t() if stored.transposed else numbered)
    if moved.shape != (n, 4):
        return None
    order = moved[:, 0] // 4
    return order if torch.equal(moved, numbered[order]) else None


def _whole_blocks(place: Destination, format: IntegerFormat) -> bool:
    """Whether what shares a scale in the checkpoint also does where it goes: in the rows of one matrix."""
    if format.group is None:
        return True
    parts = (place.tensor, *place.others)
    rows = [part.storage_offset() // part.shape[-1] % _whole(part).shape[-2] for part in parts]
    return all(row % format.group == 0 for row in rows)


def _described(format: IntegerFormat) -> str:
    if format.fp4:
        return "mxfp4" if format.group == MXFP4_GROUP else f"nvfp4{' (activations too)' if format.activations else ''}"
    if format.widened:
        return f"int{format.bits} in groups of {format.group} for bfloat16"
    if format.fp8:
        return "fp8" if format.group is None else f"fp8 in blocks of {format.group}x{format.group}"
    group = "" if format.group is None else f" in groups of {format.group}"
    return f"int{format.bits}{group}{' with zero points' if format.zeros else ''}"


def _whole(view: torch.Tensor) -> torch.Tensor:
    return view if view._base is None else view._base


def _escaped(name: str) -> str:
    """A name as an fnmatch pattern for itself."""
    return name.replace("[", "[[]").replace("*", "[*]").replace("?", "[?]")
