"""Quantized checkpoint formats: how to recognise them, and what their tensors stand for.

`detect` looks at headers and finds a `Stored` for each quantized weight. All of these give float32 rows; where kernels
can take the integers as they are, without loss, `Stored.integers` says so.

| quant_method | what is read | integers as they are | specification |
|---|---|---|---|
| fp8, fbgemm_fp8 | FP8 with a scale a tensor, row or block; E8M0 scales | | [1] |
| compressed-tensors | int-quantized | int8, a scale a row or tensor, symmetric | [2] |
| | pack-quantized, 4 and 8 bits, asymmetric too, g_idx | int4; int8 if symmetric with a scale a row; no g_idx | [2] |
| | float-quantized, naive-quantized, nvfp4-, mxfp4-pack-quantized, mxfp8-quantized | | [2], [3] |
| modelopt | FP8 (a scale a tensor, row or block), NVFP4, MXFP8, MXFP4, mixtures | | [4] |
| mxfp4 | gpt-oss' experts | | [3], [5] |
| awq | GEMM, 4 bits | int4 | [6] |
| gptq | versions 1 and 2, 4 and 8 bits, with or without activation order | as pack-quantized | [7] |
| bitsandbytes | NF4 and FP4, scales nested or not | | [8] |

As they are: groups of 32, 64, or of a multiple of 128, or a scale a row, if each int4 scale is a float16.

[1] https://huggingface.co/docs/transformers/quantization/finegrained_fp8, arXiv:2412.19437 section 3.3
[2] https://github.com/vllm-project/compressed-tensors
[3] OCP Microscaling Formats (MX) 1.0, https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf
[4] https://github.com/NVIDIA/Model-Optimizer, modelopt/torch/export
[5] https://github.com/openai/gpt-oss, gpt_oss/torch/weights.py
[6] https://github.com/casper-hansen/AutoAWQ, arXiv:2306.00978
[7] https://github.com/ModelCloud/GPTQModel, arXiv:2210.17323
[8] https://github.com/bitsandbytes-foundation/bitsandbytes, arXiv:2305.14314
"""

from skyline.quantization.formats.detect import detect
from skyline.quantization.formats.found import KVScales, QuantizedWeights
from skyline.quantization.formats.stored import Stored, TensorSource

__all__ = ["KVScales", "QuantizedWeights", "Stored", "TensorSource", "detect"]
