// Weights as the matrix kernels read them.
//
// A weight [N, K] is cut into panels of 32 rows (output columns), and a panel into blocks along K. Inside a panel everything
// lies in the order in which it is used, so that a thread streams through memory. A panel is two tiles of 16 rows:
//
//   float32            [K][32]
//   bfloat16           [K/32] x two tiles [16 pairs of k][16 rows][2]: the B operand of TDPBF16PS and of VDPBF16PS
//   compressed         bfloat16 in 12 bits, without loss: compressed.h
//   int8 weight-only   [K/32] x two tiles [16 pairs of k][16 rows][2], widened to bfloat16 before use
//   int8               [K/64] x two tiles [16 fours of k][16 rows][4]: the B operand of TDPBSSD and of VPDPBUSD
//   int4               for each group of k: 32 float16 scales, 32 float16 zero points less 8 (asymmetric only), then for each
//                      32 k two tiles [4][16 rows][4]: byte e of row j has k = 4 j + e in its low and k = 4 (j + 4) + e in its
//                      high nibble, so that the halves are the two halves of an int8 tile of 32 k
//   fp8                for each group of k, if there are groups, 32 float32 scales; then [K/32] x two tiles [8 fours of k][4 fours
//                      of rows][2 pairs of k][4 rows][2]: of 16 bytes, half belong to the first pair and half to the second, as
//                      the instructions that put two bytes together take them
//   fp4                for each group of k 32 bytes of scales, padded to 64 bytes; then for each 32 k two tiles [4 eights of k][16 rows]
//                      [2 of a pair][2 bytes]: four pairs of k in the nibbles of two bytes, the first the lowest
//   bytes              heads, then values as of int8 weight-only. In groups of 32, a head for each: 32 float16 factors, then 32
//                      offsets if there are. In groups of 16, a head for each 256 k: the same, 32 int8 scales for each group, then 32
//                      uint8 minima for each if there are offsets
//   six bits           heads as of bytes in groups of 16 without offsets; then for each 32 k two tiles of 384 bytes: values are
//                      those of a tile of int8 weight-only plus 32, of which line i has 64. Four lines of lower halves of a byte, of
//                      line 2 i and of 2 i + 1, then two lines of two bits, of lines 4 i to 4 i + 3
//
// `gated` weights hold the gate in the first half of their rows and the up projection in the second: tile 0 of a panel is 16
// rows of gate and tile 1 the same 16 of up, so that silu(gate) * up needs one panel only.
#pragma once

#include <algorithm>
#include <cstdint>

namespace skyline {

enum class Format : int64_t { kFloat32, kBfloat16, kInt8WeightOnly, kInt8, kInt4, kFp4, kFp8, kBytes, kSixBits, kCompressed };

constexpr int64_t kPanel = 32, kTile = 16;
constexpr int64_t kSuper = 256;  // of k, that share factors, in groups of 16 (GGML's K types)

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Of bytes and six bits: the k that a head is for, its size, and that of 32 k of values.
constexpr int64_t head_k(int64_t group) { return group == 32 ? 32 : kSuper; }
constexpr int64_t head_bytes(int64_t group, bool offsets) {
  return (group == 32 ? 64 : 64 + kSuper / 16 * kPanel) * (offsets ? 2 : 1);
}
constexpr int64_t step_bytes(bool six) { return six ? 768 : 1024; }

constexpr int64_t kCompressedHead = 64, kCompressedStep = 1536;  // bytes: of a panel's head, and of 32 k

struct PackedMatrix {
  Format format;
  int64_t n, k;
  bool gated;
  int64_t group;  // int4, fp4, fp8, bytes and six bits only; of fp8, 0 is a scale for a whole row
  bool zeros;     // int4: zero points; bytes: offsets
  uint8_t* data;
  float* scales;  // int8 formats, fp4, and fp8 without groups: one a row, in panel order
  int32_t* sums;  // int8: sum of each row's values, in panel order; compressed: the exceptions of all panels

  // K is padded with zeros to a multiple of this.
  int64_t k_step() const {
    switch (format) {
      case Format::kFloat32: return 1;
      case Format::kInt8: return 64;
      case Format::kInt4: return group;
      case Format::kBytes:
      case Format::kSixBits: return head_k();
      default: return 32;
    }
  }
  int64_t padded_k() const { return ceil_div(k, k_step()) * k_step(); }
  int64_t panels() const { return gated ? ceil_div(n / 2, kTile) : ceil_div(n, kPanel); }
  int64_t group_bytes() const { return (zeros ? 128 : 64) + group / 32 * 512; }
  int64_t fp4_scale_bytes() const { return ceil_div(padded_k() / group * kPanel, 64) * 64; }
  // Of bytes and six bits.
  int64_t head_k() const { return skyline::head_k(group); }
  int64_t head_bytes() const { return skyline::head_bytes(group, zeros); }
  int64_t heads_bytes() const { return padded_k() / head_k() * head_bytes(); }
  int64_t step_bytes() const { return skyline::step_bytes(format == Format::kSixBits); }
  int64_t fp8_scale_bytes() const { return group ? ceil_div(padded_k(), group) * kPanel * 4 : 0; }
  int64_t panel_bytes() const {
    switch (format) {
      case Format::kFloat32: return k * kPanel * 4;
      case Format::kBfloat16: return padded_k() * kPanel * 2;
      case Format::kCompressed: return kCompressedHead + padded_k() / 32 * kCompressedStep;
      case Format::kInt4: return padded_k() / group * group_bytes();
      case Format::kFp4: return fp4_scale_bytes() + padded_k() * kPanel / 2;
      case Format::kFp8: return fp8_scale_bytes() + padded_k() * kPanel;
      case Format::kBytes:
      case Format::kSixBits: return heads_bytes() + padded_k() / 32 * step_bytes();
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
