// c [rows][32] = rows of A times a panel, on AVX-512 and AMX.
#pragma once

#include "accumulate.h"
#include "columns_avx512.h"

namespace skyline {
namespace {

constexpr int64_t kPassingBlocks = 4;  // of rows: up to so many, making bfloat16 anew is faster than writing and reading it

// What to ask for while rows of A, in so many blocks, go by the `bytes` at b, after which come those at `next`, if any.
Ahead ahead_of(const uint8_t* b, int64_t bytes, const uint8_t* next, int64_t rows, int64_t blocks) {
  const int64_t more = next ? bytes : 0;
  if (blocks > 1) return {next, next + more};
  if (rows < kAskingRows) return {};
  return {b + std::min(kAhead, bytes), b + bytes, next, next + std::min(kAhead, more)};
}

// c [rows][32] += up to R rows of A, from `row` on and at x, times an int4 panel, group after group along the whole of K.
template <bool zeros, int R = static_cast<int>(kLevelRows)>
void multiply_groups(const PackedMatrix& m, const Activations& a, const int8_t* x, int64_t row, int64_t rows,
                     const uint8_t* panel, float* c, Ahead ahead) {
  if constexpr (R > 1) {
    if (rows < R) return multiply_groups<zeros, R - 1>(m, a, x, row, rows, panel, c, ahead);
  }
  constexpr int64_t head = zeros ? 128 : 64;
  const int64_t groups = m.padded_k() / m.group, blocks = m.group / 32, stride = a.stride, all_rows = a.rows;
  const float* scales = a.scales + row;
  const int32_t* sums = a.sums + row;
  for (int64_t g = 0; g < groups; g++, x += 32 * blocks, panel += head + 512 * blocks, scales += all_rows, sums += all_rows) {
    __m512i products[R][2];
    multiply_levels<R>(x, stride, sums, panel + head, blocks, products, ahead);
    const uint16_t* halves = reinterpret_cast<const uint16_t*>(panel);
    const Vec scale[2] = {widen_half(halves), widen_half(halves + kTile)};
    repeat<R>(SKYLINE_EACH(r) {
      repeat<2>(SKYLINE_EACH(t) {
        float* to = c + r * kPanel + kTile * t;
        Vec value{_mm512_cvtepi32_ps(products[r][t])};
        if constexpr (zeros)
          value = fma(Vec::all(static_cast<float>(sums[r])), Vec::zero() - widen_half(halves + kPanel + kTile * t), value);
        fma(value * Vec::all(scales[r]), scale[t], Vec::load(to)).store(to);
      });
    });
    asm volatile("" ::: "memory");  // c stays in memory: GCC would keep it in registers that the products need
  }
}

#if defined(__AMX_TILE__)

// c [R][32] += (partial - zero * sum) * scale of x * scale of the weight, for the groups [g, g + count) in order; x of the
// rows from `row` on. partial: [count][kRowBlock][32].
template <int R>
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
        Vec value = Vec::load(from + r * kPanel);
        if (m.zeros) value = fma(Vec::all(static_cast<float>(sums[r])), zero, value);
        sum[r] = fma(value * Vec::all(scales[r]), scale, sum[r]);
      }
    }
    for (int r = 0; r < R; r++) sum[r].store(c + r * kPanel + i);
  }
}

#endif

void accumulate_int4(const PackedMatrix& m, const Activations& a, int64_t begin, int64_t rows, const uint8_t* panel,
                     const uint8_t* next, const Tactic& tactic, Scratch& s, const Finish& finish) {
  std::memset(s.c, 0, rows * kPanel * sizeof(float));
  const int8_t* x = static_cast<const int8_t*>(a.data) + begin * a.stride;
#if defined(__AMX_TILE__)
  const bool in_tiles = rows > tactic.level_rows;
#else
  const bool in_tiles = false;
#endif
  if (!in_tiles) {
    const auto multiply_rows = m.zeros ? multiply_groups<true> : multiply_groups<false>;
    const int64_t blocks = ceil_div(rows, kLevelRows);
    const Ahead ahead = ahead_of(panel, m.panel_bytes(), next, rows, blocks);
    for (int64_t i = 0; i < blocks; i++) {
      const int64_t r = rows * i / blocks, count = rows * (i + 1) / blocks - r;
      multiply_rows(m, a, x + r * a.stride, begin + r, count, panel, s.c + r * kPanel, blocks > 1 ? ahead.part(i, blocks) : ahead);
      finish(r, count);
    }
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
          add_groups<8>(m, a, begin + r + done, panel, g, count, s.partial + done * kPanel, s.c + (r + done) * kPanel);
        for (; done < block; done++)
          add_groups<1>(m, a, begin + r + done, panel, g, count, s.partial + done * kPanel, s.c + (r + done) * kPanel);
      }
    }
  }
  finish(0, rows);
#endif
}

#if defined(__AMX_TILE__)

// c [rows][32] (+)= sums [rows][32] * scales of the columns.
void add_scaled(const float* sums, int64_t rows, const float* scales, float* c, bool accumulate) {
  for (int64_t i = 0; i < kPanel; i += Vec::width) {
    const Vec scale = Vec::load(scales + i);
    for (int64_t at = i; at < rows * kPanel; at += kPanel)
      fma(Vec::load(sums + at), scale, accumulate ? Vec::load(c + at) : Vec::zero()).store(c + at);
  }
}

#else

// Where the i-th of so many blocks of rows begins. As many as can be are whole: blocks of 11 rows are 7 % slower in int8 than of 12
// (Zen 5), those of less than eight make little of the columns that they load.
int64_t block_begin(int64_t i, int64_t blocks, int64_t rows) {
  if (i == blocks) return rows;
  const int64_t whole = std::max<int64_t>(blocks - 2, 0) * kRowBlock, rest = rows - whole;
  if (i < blocks - 1 || blocks == 1) return i * kRowBlock;
  return whole + (rest >= kRowBlock + 8 ? kRowBlock : ceil_div(rest, 2));
}

#endif

// c [rows][32] (+)= rows of A, at x, times `size` of K at b, and, if there are, times the scales of the columns. streamed: b comes
// from memory itself, which AMX then asks for; ahead: what the others ask for. finish: if c is complete with that.
template <class Step>
void multiply_blocks(const typename Step::A* x, int64_t stride, int64_t rows, const uint8_t* b, int64_t size, typename Step::C* c,
                     bool accumulate, bool streamed, Ahead ahead, const Finish* finish, const float* scales = nullptr) {
  const int64_t blocks = ceil_div(rows, kRowBlock);
#if defined(__AMX_TILE__)
  TileShape shape;
  for (int64_t r = 0; r < rows; r += kRowBlock) {
    const int64_t count = std::min(kRowBlock, rows - r);
    alignas(64) typename Step::C sums[kRowBlock * kPanel];
    typename Step::C* to = scales ? sums : c + r * kPanel;
    multiply<Step>(shape, x + r * stride, stride, count, b, size / Step::k, to, accumulate && !scales, streamed && blocks == 1);
    if constexpr (std::is_same_v<typename Step::C, float>) {
      tile_fence();
      if (scales) add_scaled(sums, count, scales, c + r * kPanel, accumulate);
    }
  }
  tile_fence();
  if (finish) (*finish)(0, rows);
#else
  for (int64_t i = 0; i < blocks; i++) {
    const int64_t r = block_begin(i, blocks, rows), count = block_begin(i + 1, blocks, rows) - r;
    if (finish) finish->ask(r, count);
    multiply<Step>(x + r * stride, stride, count, b, size / Step::k, c + r * kPanel, accumulate,
                   blocks > 1 ? ahead.part(i, blocks) : ahead, scales);
    if (finish) (*finish)(r, count);
  }
#endif
}

// c [rows][32] = rows of A times a panel that becomes bfloat16, piece by piece, or for few rows pair by pair: its values, `bits` of
// each, are columns_at(k). The next piece is asked for meanwhile (not on AMX). scales, if there are, are those of columns for each
// `group` of k.
template <class ColumnsAt>
void accumulate_widened(const bf16* x, int64_t stride, int64_t rows, int64_t k, const Tactic& tactic, Scratch& s, const Finish& finish,
                        int64_t bits, const uint8_t* values, const uint8_t* next, const ColumnsAt& columns_at,
                        const float* scales = nullptr, int64_t group = 0) {
  const auto scales_at = [&](int64_t k0) { return scales ? scales + k0 / group * kPanel : nullptr; };
#if !defined(__AMX_TILE__)
  if (rows <= kPassingRows) {
    const int64_t together = scales ? group : k;
    for (int64_t k0 = 0; k0 < k; k0 += together) {
      multiply_in_passing(x + k0, stride, rows, columns_at(k0), std::min(together, k - k0) / 32, s.c, k0 > 0, scales_at(k0));
    }
    return finish(0, rows);
  }
#endif
  for (int64_t k0 = 0; k0 < k; k0 += tactic.piece) {
    const int64_t size = std::min(tactic.piece, k - k0), together = scales ? group : size, parts = ceil_div(size, together);
    const uint8_t* after = k0 + size < k ? values + (k0 + size) * kPanel * bits / 8 : next;
    const Ahead ahead{after, after ? after + size * kPanel * bits / 8 : nullptr};
    widen(columns_at(k0), size / 32, s.b);
    for (int64_t i = 0; i < parts; i++) {
      const int64_t g = i * together;
      const bool last = k0 + size == k && i == parts - 1;
      multiply_blocks<Bf16Step>(x + k0 + g, stride, rows, s.b + g * kPanel * 2, std::min(together, size - g), s.c, k0 + g > 0,
                                false, ahead.part(i, parts), last ? &finish : nullptr, scales_at(k0 + g));
    }
  }
}

// The same of a compressed panel. Without AMX, few blocks of rows are all multiplied in passing; of many the first is, and what it was
// multiplied by is kept for the others.
void accumulate_compressed(const PackedMatrix& m, const bf16* x, int64_t stride, int64_t rows, const uint8_t* panel,
                           const uint8_t* next, int64_t piece, Scratch& s, const Finish& finish) {
  const int64_t k = m.padded_k(), blocks = ceil_div(rows, kRowBlock);
#if !defined(__AMX_TILE__)
  if (blocks == 1) {
    multiply_in_passing<CompressedColumns<true>, kRowBlock>(x, stride, rows, {m, panel, 0}, k / 32, s.c, false);
    return finish(0, rows);
  }
#endif
  for (int64_t k0 = 0; k0 < k; k0 += piece) {
    const int64_t size = std::min(piece, k - k0), bytes = size / 32 * kCompressedStep;
    const uint8_t* after = k0 + size < k ? panel + kCompressedHead + (k0 + size) / 32 * kCompressedStep : next;
    const Ahead ahead{after, after ? after + bytes : nullptr};
    const bool last = k0 + size == k;
#if defined(__AMX_TILE__)
    widen(CompressedColumns<true>(m, panel, k0), size / 32, s.b);
    multiply_blocks<Bf16Step>(x + k0, stride, rows, s.b, size, s.c, k0 > 0, false, ahead, last ? &finish : nullptr);
#else
    const auto in_passing = [&]<bool keep>(int64_t i) {
      const int64_t r = block_begin(i, blocks, rows), count = block_begin(i + 1, blocks, rows) - r;
      multiply_in_passing<CompressedColumns<false>, kRowBlock, keep>(x + r * stride + k0, stride, count, {m, panel, k0}, size / 32,
                                                                     s.c + r * kPanel, k0 > 0, nullptr, s.b, ahead.part(i, blocks));
      if (last) finish(r, count);
      return r + count;
    };
    if (blocks <= kPassingBlocks) {
      for (int64_t i = 0; i < blocks; i++) in_passing.template operator()<false>(i);
      continue;
    }
    const int64_t r = in_passing.template operator()<true>(0);
    const Finish others = finish.from(r);
    multiply_blocks<Bf16Step>(x + r * stride + k0, stride, rows - r, s.b, size, s.c + r * kPanel, k0 > 0, false,
                              {ahead.part(1, blocks).next, ahead.end}, last ? &others : nullptr);
#endif
  }
}

void accumulate_packed(const PackedMatrix& m, const Activations& a, int64_t begin, int64_t rows, const uint8_t* panel,
                       const uint8_t* next, const Tactic& tactic, Scratch& s, const Finish& finish) {
  if (m.format == Format::kInt4) return accumulate_int4(m, a, begin, rows, panel, next, tactic, s, finish);
  const int64_t k = m.padded_k();
  if (m.format == Format::kInt8) {
    const Quantized* x = static_cast<const Quantized*>(a.data) + begin * a.stride;
    const int64_t piece = rows <= kRowBlock ? k : 2 * tactic.piece;
    for (int64_t k0 = 0; k0 < k; k0 += piece) {
      const int64_t size = std::min(piece, k - k0);
      const uint8_t* b = panel + k0 * kPanel;
      const Ahead ahead = ahead_of(b, size * kPanel, k0 + size < k ? b + size * kPanel : next, rows, ceil_div(rows, kRowBlock));
      multiply_blocks<Int8Step>(x + k0, a.stride, rows, b, size, reinterpret_cast<int32_t*>(s.c), k0 > 0, true, ahead,
                                k0 + size < k ? nullptr : &finish);
    }
    return;
  }
  const bf16* x = static_cast<const bf16*>(a.data) + begin * a.stride;
  if (m.format == Format::kInt8WeightOnly)
    return accumulate_widened(x, a.stride, rows, k, tactic, s, finish, 8, panel, next,
                              [&](int64_t k0) { return Int8Columns(panel + k0 * kPanel); });
  if (m.format == Format::kCompressed) return accumulate_compressed(m, x, a.stride, rows, panel, next, tactic.piece, s, finish);
  if (m.format == Format::kFp8) {
    const uint8_t* values = panel + m.fp8_scale_bytes();
    return accumulate_widened(
        x, a.stride, rows, k, tactic, s, finish, 8, values, next, [&](int64_t k0) { return Fp8Columns(values + k0 * kPanel); },
        m.group ? reinterpret_cast<const float*>(panel) : nullptr, m.group);
  }
  if (m.format == Format::kBytes || m.format == Format::kSixBits) {
    return dispatch_bytes(m, [&]<int64_t group, bool offsets, bool six>(Bytes<group, offsets, six>) {
      accumulate_widened(x, a.stride, rows, k, tactic, s, finish, six ? 6 : 8, panel + m.heads_bytes(), next,
                         [&](int64_t k0) { return ByteColumns<group, offsets, six>(m, panel, k0); });
    });
  }
  if (m.format == Format::kFp4) {
    const uint8_t* values = panel + m.fp4_scale_bytes();
    auto of_group = [&]<int64_t group>(std::integral_constant<int64_t, group>) {
      accumulate_widened(x, a.stride, rows, k, tactic, s, finish, 4, values, next, [&](int64_t k0) {
        return Fp4Columns<group>(panel + k0 / group * kPanel, values + k0 * kPanel / 2);
      });
    };
    return m.group == 32 ? of_group(std::integral_constant<int64_t, 32>()) : of_group(std::integral_constant<int64_t, 16>());
  }
  const int64_t piece = rows <= kRowBlock ? k : tactic.piece;
  for (int64_t k0 = 0; k0 < k; k0 += piece) {
    const int64_t size = std::min(piece, k - k0);
    const uint8_t* b = panel + k0 * kPanel * 2;
    const uint8_t* after = k0 + size < k ? b + size * kPanel * 2 : next;
    const Ahead ahead = ahead_of(b, size * kPanel * 2, after, rows, ceil_div(rows, kRowBlock));
    multiply_blocks<Bf16Step>(x + k0, a.stride, rows, b, size, s.c, k0 > 0, true, ahead, k0 + size < k ? nullptr : &finish);
  }
}

}  // namespace
}  // namespace skyline
