"""Quantize a GGUF file with llama.cpp's own quantizer (runs in llama.cpp's environment).

python quantize_gguf.py IN OUT q8_0|q4_0|q4_k_m
"""

from __future__ import annotations

import ctypes
import os
import sys

import llama_cpp

TYPES = {
    "q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
    "q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
    "q4_k_m": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M,
}


def main() -> None:
    source, target, kind = sys.argv[1:]
    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = TYPES[kind]
    params.nthread = os.cpu_count() or 1
    if llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params)) != 0:
        raise SystemExit("llama_model_quantize failed")


if __name__ == "__main__":
    main()
