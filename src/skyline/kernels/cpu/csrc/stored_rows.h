// Rows of weights that are small numbers already, as they are written into their panels and read back: FP4, FP8, bytes and six bits.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cmath>

#include "packed.h"

namespace skyline {

inline float half_to_float(uint16_t bits) { return _cvtsh_ss(bits); }

// Four-bit floats: E2M1 (OCP Microscaling Formats 1.0, section 5.3.3).
constexpr float kE2m1[16] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -0.5f, -1, -1.5f, -2, -3, -4, -6};

// With smaller ones (exponents of two plus 127), not all of a group's numbers are normal ones of bfloat16: they become zeros.
constexpr uint8_t kSmallestScale = 2;

// One row of FP4: `values` two a byte, the even k in the low nibble, and its groups' scales.
inline void pack_fp4_row(const PackedMatrix& m, const uint8_t* values, const uint8_t* scales, int64_t place) {
  uint8_t* panel = m.data + place / kPanel * m.panel_bytes();
  const int64_t column = place % kPanel, bytes = m.k / 2, groups = ceil_div(m.k, m.group);
  for (int64_t g = 0; g < m.padded_k() / m.group; g++) panel[g * kPanel + column] = g < groups ? scales[g] : 0;
  uint8_t* to = panel + m.fp4_scale_bytes() + column / kTile * 256 + column % kTile * 4;
  for (int64_t block = 0; block < m.padded_k() / 32; block++, to += 512) {
    uint8_t from[16] = {};
    std::copy_n(values + 16 * block, std::min<int64_t>(16, bytes - 16 * block), from);
    if (m.group == 32 && panel[block * kPanel + column] < kSmallestScale) std::fill_n(from, 16, uint8_t{0});
    for (int i = 0; i < 8; i++) {  // k = 4 i to 4 i + 3, in two bytes
      const uint8_t first = from[2 * i], second = from[2 * i + 1];
      uint8_t* word = to + i / 2 * 64 + i % 2;
      word[0] = static_cast<uint8_t>((first & 15) | second << 4);
      word[2] = static_cast<uint8_t>(first >> 4 | (second & 0xF0));
    }
  }
}

// float8_e4m3fn (arXiv:2209.05433), but for NaN, which no weight holds.
inline float e4m3(uint8_t byte) {
  const int exponent = byte >> 3 & 15, mantissa = byte & 7;
  const float size = exponent ? std::ldexp(8.0f + mantissa, exponent - 10) : std::ldexp(static_cast<float>(mantissa), -9);
  return byte & 0x80 ? -size : size;
}

inline float fp4_scale(const PackedMatrix& m, uint8_t byte) { return m.group == 32 ? std::ldexp(1.0f, byte - 127) : e4m3(byte); }

// Where value i of a row of FP8 is.
inline uint8_t* fp8_value(const PackedMatrix& m, int64_t place, int64_t i) {
  const int64_t tile = place % kPanel / kTile, lane = place % kTile, four = (i / 32 * 2 + tile) * 8 + i % 32 / 4;
  uint8_t* panel = m.data + place / kPanel * m.panel_bytes() + m.fp8_scale_bytes();
  return panel + four * 64 + lane / 4 * 16 + i % 4 / 2 * 8 + lane % 4 * 2 + i % 2;
}

// One row of FP8. Returns whether all of it are numbers.
inline bool pack_fp8_row(const PackedMatrix& m, const uint8_t* values, const float* scales, int64_t place) {
  if (m.group) {
    float* to = reinterpret_cast<float*>(m.data + place / kPanel * m.panel_bytes()) + place % kPanel;
    for (int64_t g = 0; g < ceil_div(m.k, m.group); g++) to[g * kPanel] = scales[g];
  } else {
    m.scales[place] = scales[0];
  }
  bool numbers = true;
  for (int64_t k0 = 0; k0 < m.k; k0 += 32) {
    uint8_t* to = fp8_value(m, place, k0);
    const int64_t count = std::min<int64_t>(32, m.k - k0);
    for (int64_t i = 0; i < count; i++) {
      const uint8_t value = values[k0 + i];
      to[i / 4 * 64 + i % 4 / 2 * 8 + i % 2] = value;
      numbers = numbers && (value & 0x7F) != 0x7F;
    }
  }
  return numbers;
}

// Where value i of a row of int8 weight-only is in its panel.
inline int64_t int8_place(int64_t place, int64_t i) {
  const int64_t tile = place % kPanel / kTile, lane = place % kTile;
  return ((i / 32 * 2 + tile) * 16 + i % 32 / 2) * 32 + lane * 2 + i % 2;
}

// One row of bytes or six bits, as skyline.ops.quantized.ByteRows has it: what there is for each group is for `group` of its values,
// which may be several of the weight's groups.
struct ByteRow {
  const int8_t* levels;
  const uint16_t *factors, *offsets;
  const int8_t* scales;
  const uint8_t* minima;
  int64_t group;
};

inline void pack_bytes_row(const PackedMatrix& m, const ByteRow& row, int64_t place) {
  uint8_t* panel = m.data + place / kPanel * m.panel_bytes();
  const int64_t column = place % kPanel, parts = m.zeros ? 2 : 1;
  for (int64_t i = 0; i < ceil_div(m.k, m.head_k()); i++) {
    uint8_t* head = panel + i * m.head_bytes();
    uint16_t* halves = reinterpret_cast<uint16_t*>(head);
    halves[column] = row.factors[i];
    if (m.zeros) halves[kPanel + column] = row.offsets ? row.offsets[i] : 0;
    if (m.group == 32) continue;
    for (int64_t g = 0; g < kSuper / 16; g++) {
      const int64_t from = (i * kSuper + g * 16) / row.group;
      uint8_t* scales = head + 64 * parts + g * kPanel + column;
      scales[0] = static_cast<uint8_t>(row.scales[from]);
      if (m.zeros) scales[kSuper / 16 * kPanel] = row.minima ? row.minima[from] : 0;
    }
  }
  const int64_t tile = column / kTile, lane = column % kTile;
  for (int64_t k0 = 0; k0 < m.k; k0 += 32) {
    const int8_t* levels = row.levels + k0;
    uint8_t* to = panel + m.heads_bytes() + k0 / 32 * m.step_bytes() + tile * m.step_bytes() / 2 + 2 * lane;
    if (m.format == Format::kBytes) {
      const int64_t count = std::min<int64_t>(32, m.k - k0);
      for (int64_t i = 0; i < count; i++) to[i / 2 * 32 + i % 2] = static_cast<uint8_t>(levels[i]);
      continue;
    }
    for (int c = 0; c < 4; c++) {  // of each four of k, which are two pairs in a line
      const auto level = [&](int four) { return levels[4 * four + c] + 32; };
      uint8_t* at = to + c / 2 * 32 + c % 2;
      for (int i = 0; i < 4; i++) at[64 * i] = static_cast<uint8_t>((level(2 * i) & 15) | (level(2 * i + 1) & 15) << 4);
      for (int i = 0; i < 2; i++) {
        int upper = 0;
        for (int four = 0; four < 4; four++) upper |= level(4 * i + four) >> 4 << (2 * four);
        at[256 + 64 * i] = static_cast<uint8_t>(upper);
      }
    }
  }
}

inline float byte_element(const PackedMatrix& m, const uint8_t* panel, int64_t place, int64_t i) {
  const int64_t column = place % kPanel, at = int8_place(place, i), parts = m.zeros ? 2 : 1;
  const uint8_t *head = panel + i / m.head_k() * m.head_bytes(), *values = panel + m.heads_bytes();
  const uint16_t* halves = reinterpret_cast<const uint16_t*>(head);
  float scale = half_to_float(halves[column]), minimum = m.zeros ? half_to_float(halves[kPanel + column]) : 0.0f;
  if (m.group == 16) {
    const uint8_t* scales = head + 64 * parts + i % kSuper / 16 * kPanel + column;
    scale *= static_cast<float>(static_cast<int8_t>(scales[0]));
    if (m.zeros) minimum *= static_cast<float>(scales[kSuper / 16 * kPanel]);
  }
  if (m.format == Format::kBytes) return static_cast<float>(static_cast<int8_t>(values[at])) * scale - minimum;
  const int64_t line = at % 512 / 64, b = at % 64;
  const uint8_t* of_tile = values + at / 512 * 384;
  const int low = of_tile[line / 2 * 64 + b] >> (line % 2 * 4) & 15, high = of_tile[256 + line / 4 * 64 + b] >> (line % 4 * 2) & 3;
  return static_cast<float>((high << 4 | low) - 32) * scale;
}

}  // namespace skyline
