// How a packed weight crosses from Python: spelled once, because exported functions cannot take a struct.
#pragma once

#include "packed.h"
#include "tensors.h"

#define PACKED_PARAMETERS                                                                                              \
  TensorView weight, ffi::Optional<TensorView> scales, ffi::Optional<TensorView> sums, int64_t format, int64_t n, int64_t k, \
      bool gated, int64_t group, bool zeros
#define PACKED_MATRIX                                                                                             \
  packed_matrix(weight, scales, sums, format, n, k, gated, group, zeros)

namespace skyline {

inline PackedMatrix packed_matrix(const TensorView& weight, const ffi::Optional<TensorView>& scales,
                                  const ffi::Optional<TensorView>& sums, int64_t format, int64_t n, int64_t k, bool gated,
                                  int64_t group, bool zeros) {
#if !defined(__AVX512F__)
  SKYLINE_CHECK(static_cast<Format>(format) != Format::kCompressed, "compressed weights take AVX-512");
#endif
  return {static_cast<Format>(format), n, k, gated, group, zeros, data<uint8_t>(weight),
          scales.has_value() ? data<float>(scales.value()) : nullptr, sums.has_value() ? data<int32_t>(sums.value()) : nullptr};
}

// An expert's matrix of a weight [E, N, K]: all experts' panels lie one after the other.
inline PackedMatrix expert_matrix(const PackedMatrix& m, int64_t expert) {
  PackedMatrix one = m;
  one.data += expert * m.panels() * m.panel_bytes();
  if (m.scales) one.scales += expert * m.panels() * kPanel;
  if (m.sums && m.format != Format::kCompressed) one.sums += expert * m.panels() * kPanel;
  return one;
}

}  // namespace skyline
