// c [rows][32] = rows of A times a panel, on AVX-512 and AMX.
#pragma once

#include "accumulate.h"

namespace skyline {
namespace {

Vec difference(const int32_t* p, int32_t x) {
  return {_mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_loadu_si512(p), _mm512_set1_epi32(x)))};
}

// c [R][32] += (partial - zero * sum) * scale of x * scale of the weight, for the groups [g, g + count) in order; x of the
// rows from `row` on. partial: [count][kRowBlock][32]. `levels`: partial is of levels 0 to 15, not of -8 to 7.
template <int R, bool levels>
void add_groups(const PackedMatrix& m, const Activations& a, int64_t row, const uint8_t* panel, int64_t g, int64_t count,
                const int32_t* partial, float* c) {
  for (int64_t i = 0; i < kPanel; i += Vec::width) {
    Vec sum[R];
    for (int r = 0; r < R; r++) sum[r] = Vec::load(c + r * kPanel + i);
    for (int64_t at = g; at < g + count; at++) {
      const uint16_t* halves = reinterpret_cast<const uint16_t*>(panel + at * m.group_bytes()) + i;
      const float* scales = a.scales + at * a.rows + row;
      const int32_t *sums = a.sums + at * a.rows + row, *from = partial + (at - g) * kRowBlock * kPanel + i;
      const Vec scale = widen_half(halves), zero = m.zeros ? Vec::zero() - widen_half(halves + kPanel) : Vec::zero();
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        Vec value = difference(from + r * kPanel, levels ? 8 * sums[r] : 0);
        if (m.zeros) value = fma(Vec::all(static_cast<float>(sums[r])), zero, value);
        sum[r] = fma(value * Vec::all(scales[r]), scale, sum[r]);
      }
    }
    for (int r = 0; r < R; r++) sum[r].store(c + r * kPanel + i);
  }
}

// c [rows][32] += up to R rows of A, from `row` on and at x, times an int4 panel, along the whole of K.
template <int R = 4>
void multiply_few(const PackedMatrix& m, const Activations& a, const int8_t* x, int64_t row, int64_t rows,
                  const uint8_t* panel, Scratch& s, float* c) {
  if constexpr (R > 1) {
    if (rows < R) return multiply_few<R - 1>(m, a, x, row, rows, panel, s, c);
  }
  const int64_t head = m.zeros ? 128 : 64, group_bytes = m.group_bytes(), groups = m.padded_k() / m.group;
  for (int64_t g = 0; g < groups; g++) {
    multiply_levels<R>(x + g * m.group, a.stride, panel + g * group_bytes + head, m.group / 32, s.partial);
    add_groups<R, true>(m, a, row, panel, g, 1, s.partial, c);
  }
}

void accumulate_int4(const PackedMatrix& m, const Activations& a, int64_t begin, int64_t rows, const uint8_t* panel,
                     const Tactic& tactic, Scratch& s) {
  std::memset(s.c, 0, rows * kPanel * sizeof(float));
  const int8_t* x = static_cast<const int8_t*>(a.data) + begin * a.stride;
#if defined(__AMX_TILE__)
  const bool in_tiles = rows > tactic.level_rows;
#else
  const bool in_tiles = false;
#endif
  if (!in_tiles) {
    for (int64_t r = 0; r < rows; r += 4)
      multiply_few(m, a, x + r * a.stride, begin + r, std::min<int64_t>(4, rows - r), panel, s, s.c + r * kPanel);
    return;
  }
#if defined(__AMX_TILE__)
  TileShape shape;
  const int64_t head = m.zeros ? 128 : 64, group_bytes = m.group_bytes(), groups = m.padded_k() / m.group;
  const int64_t at_once = tactic.piece / m.group, wide_bytes = m.group * kPanel;
  for (int64_t g0 = 0; g0 < groups; g0 += at_once) {
    const int64_t end = std::min(g0 + at_once, groups);
    for (int64_t g = g0; g < end; g++)
      widen_int4(panel + g * group_bytes + head, m.group / 32, std::min<int64_t>(m.group, 64), s.b + (g - g0) * wide_bytes);
    for (int64_t r = 0; r < rows; r += kRowBlock) {
      const int64_t block = std::min(kRowBlock, rows - r);
      for (int64_t g = g0; g < end; g += kGroups) {
        const int64_t count = std::min(kGroups, end - g);
        for (int64_t i = 0; i < count; i++) {
          const int8_t* from = x + r * a.stride + (g + i) * m.group;
          const uint8_t* b = s.b + (g + i - g0) * wide_bytes;
          int32_t* to = s.partial + i * kRowBlock * kPanel;
          if (m.group == 32) {
            multiply<Int8HalfStep>(shape, from, a.stride, block, b, 1, to, false);
          } else {
            multiply<Int8Step>(shape, from, a.stride, block, b, m.group / 64, to, false);
          }
        }
        tile_fence();
        int64_t done = 0;
        for (; done + 8 <= block; done += 8)
          add_groups<8, false>(m, a, begin + r + done, panel, g, count, s.partial + done * kPanel, s.c + (r + done) * kPanel);
        for (; done < block; done++)
          add_groups<1, false>(m, a, begin + r + done, panel, g, count, s.partial + done * kPanel, s.c + (r + done) * kPanel);
      }
    }
  }
#endif
}

void accumulate_packed(const PackedMatrix& m, const Activations& a, int64_t begin, int64_t rows, const uint8_t* panel,
                       const Tactic& tactic, Scratch& s) {
  TileShape shape;
  const int64_t k = m.padded_k();
  if (m.format == Format::kInt8) {
    const int8_t* x = static_cast<const int8_t*>(a.data) + begin * a.stride;
    int32_t* c = reinterpret_cast<int32_t*>(s.c);
    const int64_t piece = rows <= kRowBlock ? k : 2 * tactic.piece;
    for (int64_t k0 = 0; k0 < k; k0 += piece)
      for (int64_t r = 0; r < rows; r += kRowBlock)
        multiply<Int8Step>(shape, x + r * a.stride + k0, a.stride, std::min(kRowBlock, rows - r), panel + k0 * kPanel,
                           std::min(piece, k - k0) / 64, c + r * kPanel, k0 > 0, rows <= kRowBlock);
    return;
  }
  if (m.format == Format::kInt4) return accumulate_int4(m, a, begin, rows, panel, tactic, s);
  const bf16* x = static_cast<const bf16*>(a.data) + begin * a.stride;
  const bool direct = m.format == Format::kBfloat16;
  const int64_t piece = direct && rows <= kRowBlock ? k : tactic.piece;
  for (int64_t k0 = 0; k0 < k; k0 += piece) {
    const int64_t steps = std::min(piece, k - k0) / 32;
    const uint8_t* b = panel + k0 * kPanel * 2;
    if (!direct) {
      widen_int8(panel + k0 * kPanel, steps, s.b);
      b = s.b;
    }
    for (int64_t r = 0; r < rows; r += kRowBlock)
      multiply<Bf16Step>(shape, x + r * a.stride + k0, a.stride, std::min(kRowBlock, rows - r), b, steps, s.c + r * kPanel,
                         k0 > 0, direct && rows <= kRowBlock);
  }
}

}  // namespace
}  // namespace skyline
