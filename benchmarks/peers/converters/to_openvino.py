"""A checkpoint as OpenVINO IR, with its tokenizer (runs in the conversion environment).

    python to_openvino.py CHECKPOINT FOLDER bf16|int8|int4

int8 and int4 are nncf's weight compression as optimum-intel offers it: int8 by row, int4 symmetric by groups of 128
with the embedding and head in int8 (its default). Activations are quantized by the plugin while running.
"""

from __future__ import annotations

import sys
from typing import Any

from openvino import save_model
from openvino_tokenizers import convert_tokenizer
from optimum.intel.openvino import OVModelForCausalLM, OVWeightQuantizationConfig
from transformers import AutoTokenizer

SETTINGS: dict[str, dict[str, Any]] = {
    "int8": {"bits": 8, "sym": True},
    "int4": {"bits": 4, "sym": True, "group_size": 128, "ratio": 1.0},
}


def main() -> None:
    source, target, kind = sys.argv[1:]
    quantization = OVWeightQuantizationConfig(**SETTINGS[kind]) if kind in SETTINGS else None
    model = OVModelForCausalLM.from_pretrained(
        source,
        export=True,
        compile=False,
        load_in_8bit=False,
        quantization_config=quantization,
    )
    model.save_pretrained(target)
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.save_pretrained(target)
    forward, backward = convert_tokenizer(tokenizer, with_detokenizer=True)
    save_model(forward, f"{target}/openvino_tokenizer.xml")
    save_model(backward, f"{target}/openvino_detokenizer.xml")


if __name__ == "__main__":
    main()
