// Weights as the matrix kernels read them.
//
// A weight [N, K] is cut into panels of 32 rows (output columns), and a panel into blocks along K. Inside a panel everything
// lies in the order in which it is used, so that a thread streams through memory. A panel is two tiles of 16 rows:
//
//   float32            [K][32]
//   bfloat16           [K/32] x two tiles [16 pairs of k][16 rows][2]: the B operand of TDPBF16PS and of VDPBF16PS
//   int8 weight-only   [K/32] x two tiles [16 pairs of k][16 rows][2], widened to bfloat16 before use
//   int8               [K/64] x two tiles [16 fours of k][16 rows][4]: the B operand of TDPBSSD and of VPDPBUSD
//   int4               for each group of k: 32 float16 scales, 32 float16 zero points less 8 (asymmetric only), then for each
//                      32 k two tiles [4][16 rows][4]: byte e of row j has k = 4 j + e in its low and k = 4 (j + 4) + e in its
//                      high nibble, so that the halves are the two halves of an int8 tile of 32 k
//   fp8                for each group of k, if there are groups, 32 float32 scales; then [K/32] x two tiles [8 fours of k][4 fours
//                      of rows][2 pairs of k][4 rows][2]: of 16 bytes, half belong to the first pair and half to the second, as
//                      the instructions that put two bytes together take them
//
// `gated` weights hold the gate in the first half of their rows and the up projection in the second: tile 0 of a panel is 16
// rows of gate and tile 1 the same 16 of up, so that silu(gate) * up needs one panel only.
#pragma once

#include <algorithm>
#include <cstdint>

namespace skyline {

enum class Format : int64_t { kFloat32, kBfloat16, kInt8WeightOnly, kInt8, kInt4, kFp4, kFp8 };

constexpr int64_t kPanel = 32, kTile = 16;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct PackedMatrix {
  Format format;
  int64_t n, k;
  bool gated;
  int64_t group;  // int4, fp4 and fp8 only; of fp8, 0 is a scale for a whole row
  bool zeros;     // int4 only
  uint8_t* data;
  float* scales;  // int8 formats, fp4, and fp8 without groups: one a row, in panel order
  int32_t* sums;  // int8: sum of each row's values, in panel order

  // K is padded with zeros to a multiple of this.
  int64_t k_step() const {
    switch (format) {
      case Format::kFloat32: return 1;
      case Format::kInt8: return 64;
      case Format::kInt4: return group;
      default: return 32;
    }
  }
  int64_t padded_k() const { return ceil_div(k, k_step()) * k_step(); }
  int64_t panels() const { return gated ? ceil_div(n / 2, kTile) : ceil_div(n, kPanel); }
  int64_t group_bytes() const { return (zeros ? 128 : 64) + group / 32 * 512; }
  int64_t fp4_scale_bytes() const { return ceil_div(padded_k() / group * kPanel, 64) * 64; }
  int64_t fp8_scale_bytes() const { return group ? ceil_div(padded_k(), group) * kPanel * 4 : 0; }
  int64_t panel_bytes() const {
    switch (format) {
      case Format::kFloat32: return k * kPanel * 4;
      case Format::kBfloat16: return padded_k() * kPanel * 2;
      case Format::kInt4: return padded_k() / group * group_bytes();
      case Format::kFp4: return fp4_scale_bytes() + padded_k() * kPanel / 2;
      case Format::kFp8: return fp8_scale_bytes() + padded_k() * kPanel;
      default: return padded_k() * kPanel;
    }
  }
  // Where row `row` is: its place counted over panels of 32.
  int64_t place(int64_t row) const {
    if (!gated) return row;
    int64_t half = n / 2, up = row >= half, lane = row - up * half;
    return lane / kTile * kPanel + up * kTile + lane % kTile;
  }
  const uint8_t* panel(int64_t index) const { return data + index * panel_bytes(); }
};

}  // namespace skyline
