// c [rows][32] = rows of A times a panel, on AVX2.
#pragma once

#include "accumulate.h"

namespace skyline {
namespace {

constexpr int64_t kFewRows = 8;  // up to so many, a panel is multiplied as it lies; for more it is widened once

// c [rows][32] = rows of A times a panel. A piece of it stays in the first-level cache while blocks of rows go by, widened if
// those are many, and the next one is asked for meanwhile: it lies behind. piece_at(k0, steps): where a piece begins.
template <class Panel, class A, class C, class PieceAt>
void accumulate_pieces(const A* x, int64_t stride, int64_t rows, int64_t k, int64_t piece, Scratch& s, C* c, bool streamed,
                       const PieceAt& piece_at) {
  const bool wide = rows > kFewRows;
  const int64_t blocks = ceil_div(rows, wide ? kWideRows : kRowBlock);
  for (int64_t k0 = 0; k0 < k; k0 += piece) {
    const int64_t steps = std::min(piece, k - k0) / Panel::k, bytes = steps * Panel::bytes;
    const uint8_t* b = piece_at(k0, steps);
    const Ahead ahead{b + bytes, b + (streamed ? 2 : 1) * bytes};
    if (wide) widen<Panel>(b, steps, s.wide);
    for (int64_t i = 0; i < blocks; i++) {
      const int64_t r = rows * i / blocks, count = rows * (i + 1) / blocks - r;
      const A* from = x + r * stride + k0;
      C* to = c + r * kPanel;
      if (!wide) {
        multiply<Panel>(from, stride, count, b, steps, to, k0 > 0, ahead.part(i, blocks));
      } else {
        multiply_widened<Panel>(from, stride, count, s.wide, steps, to, k0 > 0, ahead.part(i, blocks));
      }
    }
  }
}

template <class Panel, class A, class C>
void accumulate_columns(const A* x, int64_t stride, int64_t rows, const uint8_t* panel, int64_t k, int64_t piece, Scratch& s, C* c) {
  accumulate_pieces<Panel>(x, stride, rows, k, piece, s, c, true,
                           [&](int64_t k0, int64_t) { return panel + k0 / Panel::k * Panel::bytes; });
}

// FP4 becomes bfloat16, piece by piece.
void accumulate_fp4(const PackedMatrix& m, const float* x, int64_t stride, int64_t rows, const uint8_t* panel, int64_t piece, Scratch& s) {
  const auto widen = m.group == 32 ? widen_fp4<32> : widen_fp4<16>;
  accumulate_pieces<Bf16Pairs>(x, stride, rows, m.padded_k(), piece, s, s.c, false, [&](int64_t k0, int64_t steps) {
    widen(panel + k0 / m.group * kPanel, panel + m.fp4_scale_bytes() + k0 * kPanel / 2, steps, s.pairs);
    return static_cast<const uint8_t*>(s.pairs);
  });
}

// Bytes and six bits too.
void accumulate_bytes(const PackedMatrix& m, const float* x, int64_t stride, int64_t rows, const uint8_t* panel, int64_t piece, Scratch& s) {
  dispatch_bytes(m, [&]<int64_t group, bool offsets, bool six>(Bytes<group, offsets, six>) {
    accumulate_pieces<Bf16Pairs>(x, stride, rows, m.padded_k(), piece, s, s.c, false, [&](int64_t k0, int64_t steps) {
      widen_bytes<group, offsets, six>(m, panel, k0, steps, s.pairs);
      return static_cast<const uint8_t*>(s.pairs);
    });
  });
}

// FP8 too. Where each group of k has scales of the columns, its sums are multiplied by them first.
void accumulate_fp8(const PackedMatrix& m, const float* x, int64_t stride, int64_t rows, const uint8_t* panel, int64_t piece, Scratch& s) {
  const uint8_t* values = panel + m.fp8_scale_bytes();
  const int64_t k = m.padded_k(), together = m.group ? m.group : k;
  for (int64_t g = 0; g < k; g += together) {
    float* sums = m.group ? s.partial : s.c;
    accumulate_pieces<Bf16Pairs>(x + g, stride, rows, std::min(together, k - g), piece, s, sums, false, [&](int64_t k0, int64_t steps) {
      widen_fp8(values + (g + k0) * kPanel, steps, s.pairs);
      return static_cast<const uint8_t*>(s.pairs);
    });
    if (!m.group) return;
    const float* scales = reinterpret_cast<const float*>(panel) + g / m.group * kPanel;
    for (int64_t at = 0; at < rows * kPanel; at += Vec::width) {
      const Vec before = g > 0 ? Vec::load(s.c + at) : Vec::zero();
      fma(Vec::load(sums + at), Vec::load(scales + at % kPanel), before).store(s.c + at);
    }
  }
}

// c [R][32] += R rows of A, from `row` on and at x, times the groups [g, end) of an int4 panel, in order.
template <bool zeros, int R = static_cast<int>(kRowBlock)>
void add_groups(const PackedMatrix& m, const Activations& a, const int8_t* x, int64_t row, int64_t rows, const uint8_t* panel,
                int64_t g, int64_t end, float* c, bool ahead) {
  if constexpr (R > 1) {
    if (rows < R) return add_groups<zeros, R - 1>(m, a, x, row, rows, panel, g, end, c, ahead);
  }
  const int64_t group = m.group, group_bytes = m.group_bytes(), stride = a.stride;
  for (; g < end; g++) {
    const uint8_t* from = panel + g * group_bytes;
    const uint16_t* halves = reinterpret_cast<const uint16_t*>(from);
    const float* scales = a.scales + g * a.rows + row;
    float totals[R], offsets[R];
    for (int r = 0; r < R; r++) {
      totals[r] = static_cast<float>(a.sums[g * a.rows + row + r]);
      offsets[r] = -8 * totals[r];
    }
    for (int vec = 0; vec < 4; vec++) {
      if (ahead)
        for (int64_t at = vec * group_bytes / 4; at < (vec + 1) * group_bytes / 4; at += 64) ask_for(from + kAhead + at);
      __m256i sums[R];
      multiply_levels<R>(x + g * group, stride, from + (zeros ? 128 : 64), vec, group / 32, sums);
      const Vec scale = widen_half(halves + 8 * vec);
      const Vec zero = zeros ? Vec::zero() - widen_half(halves + kPanel + 8 * vec) : Vec::zero();
      repeat<R>(SKYLINE_EACH(r) {
        Vec value = Vec{_mm256_cvtepi32_ps(sums[r])} + Vec::all(offsets[r]);  // exact: whole numbers below 2^24
        if (zeros) value = fma(Vec::all(totals[r]), zero, value);
        float* to = c + r * kPanel + 8 * vec;
        fma(value * Vec::all(scales[r]), scale, Vec::load(to)).store(to);
      });
    }
  }
}

// The same of a group's widened levels, for up to kLevelRows rows.
template <bool zeros, int R = static_cast<int>(kLevelRows)>
void add_widened_group(const PackedMatrix& m, const Activations& a, const int8_t* x, int64_t row, int64_t rows, const uint8_t* panel,
                       const uint8_t* levels, int64_t g, float* c, Ahead& ahead) {
  if constexpr (R > 1) {
    if (rows < R) return add_widened_group<zeros, R - 1>(m, a, x, row, rows, panel, levels, g, c, ahead);
  }
  const __m256i ones = _mm256_set1_epi16(1);
  const uint16_t* halves = reinterpret_cast<const uint16_t*>(panel + g * m.group_bytes());
  const float* scales = a.scales + g * a.rows + row;
  float totals[R], offsets[R];
  for (int r = 0; r < R; r++) {
    totals[r] = static_cast<float>(a.sums[g * a.rows + row + r]);
    offsets[r] = -8 * totals[r];
  }
  for (int first = 0; first < 4; first += 2) {
    __m256i sums[R][2] = {};
    for (int64_t block = 0; block < m.group / 32; block++) {
      ahead.ask();
      ahead.ask();
      __m256i acc[R][2];
      multiply_widened_levels<R>(x + g * m.group + 32 * block, a.stride, levels + 1024 * block + 32 * first, acc);
      repeat<R>(SKYLINE_EACH(r) {
        repeat<2>(SKYLINE_EACH(v) { sums[r][v] = _mm256_add_epi32(sums[r][v], _mm256_madd_epi16(acc[r][v], ones)); });
      });
    }
    repeat<2>(SKYLINE_EACH(v) {
      const int vec = first + v;
      const Vec scale = widen_half(halves + 8 * vec);
      const Vec zero = zeros ? Vec::zero() - widen_half(halves + kPanel + 8 * vec) : Vec::zero();
      repeat<R>(SKYLINE_EACH(r) {
        Vec value = Vec{_mm256_cvtepi32_ps(sums[r][v])} + Vec::all(offsets[r]);
        if (zeros) value = fma(Vec::all(totals[r]), zero, value);
        float* to = c + r * kPanel + 8 * vec;
        fma(value * Vec::all(scales[r]), scale, Vec::load(to)).store(to);
      });
    });
  }
}

// c [rows][32] += many rows of A times the groups [g, end) of an int4 panel, whose levels are widened once for all of them.
template <bool zeros>
void add_widened_groups(const PackedMatrix& m, const Activations& a, const int8_t* x, int64_t begin, int64_t rows, const uint8_t* panel,
                        int64_t g, int64_t end, Scratch& s) {
  const int64_t bytes = m.group_bytes(), wide = m.group * kPanel, tiles = ceil_div(rows, kLevelRows);
  for (int64_t i = g; i < end; i++) widen_levels(panel + i * bytes + (zeros ? 128 : 64), m.group / 32, s.wide + (i - g) * wide);
  const Ahead next{panel + end * bytes, panel + (2 * end - g) * bytes};
  for (int64_t tile = 0; tile < tiles; tile++) {
    const int64_t r = rows * tile / tiles, count = rows * (tile + 1) / tiles - r;
    Ahead ahead = next.part(tile, tiles);
    for (int64_t i = g; i < end; i++)
      add_widened_group<zeros>(m, a, x + r * a.stride, begin + r, count, panel, s.wide + (i - g) * wide, i, s.c + r * kPanel, ahead);
  }
}

// What comes after the panel is taken to follow it in memory.
void accumulate_packed(const PackedMatrix& m, const Activations& a, int64_t begin, int64_t rows, const uint8_t* panel,
                       const uint8_t* /*next*/, const Tactic& tactic, Scratch& s, const Finish& finish) {
  const int64_t k = m.padded_k();
  if (m.format == Format::kInt4) {
    std::memset(s.c, 0, rows * kPanel * sizeof(float));
    const int8_t* x = static_cast<const int8_t*>(a.data) + begin * a.stride;
    const int64_t groups = k / m.group;
    if (rows > kFewRows) {
      const int64_t some = tactic.piece / m.group;
      for (int64_t g = 0; g < groups; g += some) {
        const int64_t end = std::min(g + some, groups);
        if (m.zeros) {
          add_widened_groups<true>(m, a, x, begin, rows, panel, g, end, s);
        } else {
          add_widened_groups<false>(m, a, x, begin, rows, panel, g, end, s);
        }
      }
      return finish(0, rows);
    }
    const int64_t at_once = 2 * tactic.piece / m.group, blocks = ceil_div(rows, kRowBlock);
    for (int64_t g = 0; g < groups; g += at_once)
      for (int64_t i = 0; i < blocks; i++) {
        const int64_t r = rows * i / blocks, count = rows * (i + 1) / blocks - r;
        const int64_t end = std::min(g + at_once, groups);
        if (m.zeros) {
          add_groups<true>(m, a, x + r * a.stride, begin + r, count, panel, g, end, s.c + r * kPanel, i == 0);
        } else {
          add_groups<false>(m, a, x + r * a.stride, begin + r, count, panel, g, end, s.c + r * kPanel, i == 0);
        }
      }
  } else if (m.format == Format::kInt8) {
    const int16_t* x = static_cast<const int16_t*>(a.data) + begin * a.stride;
    accumulate_columns<Int8Fours>(x, a.stride, rows, panel, k, tactic.piece / 2, s, reinterpret_cast<int32_t*>(s.c));
  } else {
    const float* x = static_cast<const float*>(a.data) + begin * a.stride;
    if (m.format == Format::kFp4) {
      accumulate_fp4(m, x, a.stride, rows, panel, tactic.piece / 4, s);
    } else if (m.format == Format::kFp8) {
      accumulate_fp8(m, x, a.stride, rows, panel, tactic.piece / 4, s);
    } else if (m.format == Format::kBytes || m.format == Format::kSixBits) {
      accumulate_bytes(m, x, a.stride, rows, panel, tactic.piece / 4, s);
    } else if (m.format == Format::kBfloat16) {
      accumulate_columns<Bf16Pairs>(x, a.stride, rows, panel, k, tactic.piece / 4, s, s.c);
    } else {
      accumulate_columns<Int8Pairs>(x, a.stride, rows, panel, k, tactic.piece / 4, s, s.c);
    }
  }
  finish(0, rows);
}

}  // namespace
}  // namespace skyline
