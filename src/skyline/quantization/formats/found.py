"""What a format's reader found in a checkpoint."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from skyline.checkpoint.errors import CheckpointError
from skyline.quantization.formats.stored import Stored, TensorSource

# Beside a weight: scales of activations, and what its parts say already.
_INPUT_SCALES = ("input_scale", "activation_scale", "input_global_scale")
_BOOKKEEPING = (
    *_INPUT_SCALES,
    "input_zero_point",
    "output_scale",
    "output_zero_point",
    "weight_shape",
    "weight_g_idx",
    "weight_zero_point",
    "g_idx",
)
_KV_BOOKKEEPING = (".q_scale", ".prob_output_scale", ".k_zero_point", ".v_zero_point")
_KV_PLACES = (".k_proj", ".v_proj", ".qkv_proj", ".kv_b_proj", ".attn")


@dataclass(frozen=True, slots=True)
class KVScales:
    """Names of the scales of an attention layer's keys and values in the checkpoint: one number, or one a head.

    A stored key stands for itself times the scale. -1 means that none was computed.
    """

    key: str
    value: str


@dataclass(frozen=True, slots=True)
class QuantizedWeights:
    """The quantized weights of a checkpoint.

    method: for people. stored: by the plain tensor's name. consumed: names of the checkpoint's tensors that are parts
    of those, or known and without use otherwise. kv_scales: by attention module ("model.layers.0.self_attn").
    input_scales: by the plain weight's name, the name of the static scale of its input, if it has one. "input_scale"
    and "activation_scale" multiply stored values, "input_global_scale" divides them; -1 means that none was computed.
    spare: biases that GPTQ's writers add to layers without, all zero; leave them out where the model has no place.
    """

    method: str
    stored: dict[str, Stored]
    consumed: set[str]
    kv_scales: dict[str, KVScales]
    input_scales: dict[str, str]
    spare: set[str]


@dataclass
class Found:
    """Collects them."""

    source: TensorSource
    stored: dict[str, Stored] = field(default_factory=dict)
    consumed: set[str] = field(default_factory=set)
    input_scales: dict[str, str] = field(default_factory=dict)
    spare: set[str] = field(default_factory=set)

    def add(self, plain: str, stored: Stored) -> None:
        """`plain`: "layer.weight", or a bare parameter whose companions are "experts.gate_up_proj_activation_scale"."""
        if plain in self.stored or (plain in self.source and plain not in stored.parts):
            raise CheckpointError(
                f"{self.source.folder}: {plain!r} is there more than once: as {list(stored.parts)} and by itself or in "
                "other parts; download the checkpoint again, into an empty folder"
            )
        self.stored[plain] = stored
        self.consumed.update(stored.parts)
        prefix = f"{plain.removesuffix('.weight')}." if plain.endswith(".weight") else f"{plain}_"
        self.consumed.update(prefix + name for name in _BOOKKEEPING if prefix + name in self.source)
        for name in _INPUT_SCALES:
            if prefix + name in self.source:
                self.input_scales[plain] = prefix + name

    def finish(self, method: str) -> QuantizedWeights | None:
        """None if there is nothing quantized at all."""
        kv_scales = self._kv_scales()
        if not self.stored and not kv_scales:
            return None
        formats = Counter(stored.format for stored in self.stored.values()).most_common()
        listed = "; ".join(format for format, _ in formats) or "only the scales of keys and values"
        return QuantizedWeights(
            f"{method}: {listed}", self.stored, self.consumed, kv_scales, self.input_scales, self.spare
        )

    def _kv_scales(self) -> dict[str, KVScales]:
        keys: dict[str, str] = {}
        values: dict[str, str] = {}
        for name in self.source:
            if name.endswith(_KV_BOOKKEEPING):
                self.consumed.add(name)
            if name.endswith((".k_scale", ".k_proj.output_scale", ".kv_scale")):
                keys[_attention(name)] = name
            if name.endswith((".v_scale", ".v_proj.output_scale", ".kv_scale")):
                values[_attention(name)] = name
        self.consumed.update(keys.values(), values.values())
        lone = sorted(keys.keys() ^ values.keys())
        if lone:
            raise CheckpointError(
                f"{self.source.folder}: {lone[0]!r} has a scale for only one of keys and values; quantize it again"
            )
        return {module: KVScales(keys[module], values[module]) for module in keys}


def _attention(name: str) -> str:
    module = name.rpartition(".")[0]
    for place in _KV_PLACES:
        module = module.removesuffix(place)
    return module
