// Rows of A as each instruction set multiplies them.
#pragma once

#include "packed.h"
#include "simd.h"

namespace skyline {

#if defined(__AMX_TILE__)
using Narrow = bf16;       // for weights of bfloat16, and those that become it
using Quantized = int8_t;  // for int8
#elif defined(__AVX512F__)
using Narrow = bf16;
using Quantized = uint8_t;  // with 128 added
#else
using Narrow = float;
using Quantized = int16_t;
#endif

inline bool quantizes(Format format) { return format == Format::kInt8 || format == Format::kInt4; }

inline int64_t activation_bytes(Format format) {
  switch (format) {
    case Format::kFloat32: return sizeof(float);
    case Format::kInt8: return sizeof(Quantized);
    case Format::kInt4: return sizeof(int8_t);
    default: return sizeof(Narrow);
  }
}

}  // namespace skyline
