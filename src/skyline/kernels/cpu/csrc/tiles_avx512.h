// The inner kernels of matrix products for AVX-512 with VNNI and BF16, and for AMX: included by tiles.h.
#pragma once

#include "amx.h"
#include "packed.h"
#include "repeat.h"
#include "simd.h"

namespace skyline {

#if defined(__AMX_TILE__)

constexpr int64_t kRowBlock = 32;
constexpr int kAskingRows = 1;  // from so many on, memory is asked for ahead

// Tiles 0-3 accumulate (rows 0-15 and 16-31, by columns 0-15 and 16-31), 4 and 5 are rows of A, 6 and 7 columns of B.
class TileShape {
 public:
  // depth: bytes of A's rows, 4 for each row of B.
  void set(int64_t rows, int64_t depth) {
    if (rows == rows_ && depth == depth_) return;
    rows_ = rows;
    depth_ = depth;
    TileConfig config;
    const int64_t first = std::min<int64_t>(rows, 16), second = rows > 16 ? rows - 16 : 1;
    const int64_t heights[8] = {first, first, second, second, first, second, depth / 4, depth / 4};
    for (int i = 0; i < 8; i++) config.set(i, heights[i], i == 4 || i == 5 ? depth : 64);
    config.load();
  }

 private:
  int64_t rows_ = 0, depth_ = 0;
};

struct Bf16Step {
  using A = bf16;
  using C = float;
  static constexpr int64_t k = 32;
};
struct Int8Step {
  using A = int8_t;
  using C = int32_t;
  static constexpr int64_t k = 64;
};
struct Int8HalfStep {
  using A = int8_t;
  using C = int32_t;
  static constexpr int64_t k = 32;
};

// c [rows][32] (+)= a [rows, steps * k] (row stride lda) times the panel's blocks at b.
template <class Step>
void multiply(TileShape& shape, const typename Step::A* a, int64_t lda, int64_t rows, const uint8_t* b, int64_t steps,
              typename Step::C* c, bool accumulate, bool stream = false) {
  constexpr bool integer = sizeof(typename Step::A) == 1;
  constexpr int64_t depth = Step::k * static_cast<int64_t>(sizeof(*a)), tile = depth * kTile;  // in bytes
  const int64_t stride = lda * static_cast<int64_t>(sizeof(*a));
  tile_fence();
  shape.set(rows, depth);
  if (rows <= 16) {
    if (accumulate) {
      _tile_loadd(0, c, 128);
      _tile_loadd(1, c + 16, 128);
    } else {
      _tile_zero(0);
      _tile_zero(1);
    }
    for (int64_t s = 0; s < steps; s++, a += Step::k, b += 2 * tile) {
      if (stream) prefetch<32>(b);
      _tile_loadd(4, a, stride);
      _tile_loadd(6, b, 64);
      _tile_loadd(7, b + tile, 64);
      if constexpr (integer) {
        _tile_dpbssd(0, 4, 6);
        _tile_dpbssd(1, 4, 7);
      } else {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
      }
    }
    _tile_stored(0, c, 128);
    _tile_stored(1, c + 16, 128);
    return;
  }
  const typename Step::A* a2 = a + 16 * lda;
  typename Step::C* c2 = c + 16 * kPanel;
  if (accumulate) {
    _tile_loadd(0, c, 128);
    _tile_loadd(1, c + 16, 128);
    _tile_loadd(2, c2, 128);
    _tile_loadd(3, c2 + 16, 128);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t s = 0; s < steps; s++, a += Step::k, a2 += Step::k, b += 2 * tile) {
    if (stream) prefetch<32>(b);
    _tile_loadd(4, a, stride);
    _tile_loadd(6, b, 64);
    _tile_loadd(7, b + tile, 64);
    _tile_loadd(5, a2, stride);
    if constexpr (integer) {
      _tile_dpbssd(0, 4, 6);
      _tile_dpbssd(1, 4, 7);
      _tile_dpbssd(2, 5, 6);
      _tile_dpbssd(3, 5, 7);
    } else {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, 128);
  _tile_stored(1, c + 16, 128);
  _tile_stored(2, c2, 128);
  _tile_stored(3, c2 + 16, 128);
}

#else

constexpr int64_t kRowBlock = 12;  // 24 accumulators, 2 columns, 1 row, of 32 registers
constexpr int kAskingRows = 2;     // from so many on, memory is asked for ahead; for one, the hardware does better alone (Zen 5)

struct Bf16Step {
  using A = bf16;
  using C = float;
  static constexpr int64_t k = 32;
  using V = __m512;
  static V zero() { return _mm512_setzero_ps(); }
  static V load(const float* c) { return _mm512_loadu_ps(c); }
  static void store(float* c, V v) { _mm512_storeu_ps(c, v); }
  static __m512i spread(const bf16* a) { return spread_four(a); }
  static V dot(V acc, __m512i a, __m512i b) { return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b); }
};

// VPDPBUSD takes an unsigned by a signed factor: rows of A are kept with 128 added, and the caller takes 128 * sum(b) off again.
struct Int8Step {
  using A = uint8_t;
  using C = int32_t;
  static constexpr int64_t k = 64;
  using V = __m512i;
  static V zero() { return _mm512_setzero_si512(); }
  static V load(const int32_t* c) { return _mm512_loadu_si512(c); }
  static void store(int32_t* c, V v) { _mm512_storeu_si512(c, v); }
  static __m512i spread(const uint8_t* a) { return spread_four(a); }
  static V dot(V acc, __m512i a, __m512i b) { return _mm512_dpbusd_epi32(acc, a, b); }
};

// c [R][32] (+)= sums * scales of the columns.
template <int R>
inline void add_scaled(const __m512 (&sums)[R][2], const float* scales, float* c, bool accumulate) {
  repeat<2>(SKYLINE_EACH(t) {
    const __m512 scale = _mm512_loadu_ps(scales + 16 * t);
    repeat<R>(SKYLINE_EACH(r) {
      float* to = c + r * kPanel + 16 * t;
      _mm512_storeu_ps(to, _mm512_fmadd_ps(sums[r][t], scale, accumulate ? _mm512_loadu_ps(to) : _mm512_setzero_ps()));
    });
  });
}

// c [rows][32] (+)= rows <= kRowBlock of A (row stride lda) times `steps` blocks of the panel, and, if there are scales of its
// columns (of float sums only), times those.
template <class Step, int R = static_cast<int>(kRowBlock)>
void multiply(const typename Step::A* a, int64_t lda, int64_t rows, const uint8_t* b, int64_t steps, typename Step::C* c,
              bool accumulate, Ahead ahead, const float* scales = nullptr) {
  if constexpr (R > 1) {
    if (rows < R) return multiply<Step, R - 1>(a, lda, rows, b, steps, c, accumulate, ahead, scales);
  }
  typename Step::V acc[R][2];
  const bool go_on = accumulate && !scales;
  repeat<R>(SKYLINE_EACH(r) {
    repeat<2>(SKYLINE_EACH(t) { acc[r][t] = go_on ? Step::load(c + r * kPanel + 16 * t) : Step::zero(); });
  });
  constexpr int64_t a_part = Step::k / 16;
  for (int64_t s = 0; s < steps; s++, a += Step::k, b += 2048)
    for (int p = 0; p < 16; p++) {
      if constexpr (R >= kAskingRows) ahead.ask_for_two();
      const __m512i left = _mm512_loadu_si512(b + 64 * p), right = _mm512_loadu_si512(b + 1024 + 64 * p);
      repeat<R>(SKYLINE_EACH(r) {
        const __m512i x = Step::spread(a + r * lda + p * a_part);
        acc[r][0] = Step::dot(acc[r][0], x, left);
        acc[r][1] = Step::dot(acc[r][1], x, right);
      });
    }
  if constexpr (std::is_same_v<typename Step::C, float>) {
    if (scales) return add_scaled<R>(acc, scales, c, accumulate);
  }
  repeat<R>(SKYLINE_EACH(r) { repeat<2>(SKYLINE_EACH(t) { Step::store(c + r * kPanel + 16 * t, acc[r][t]); }); });
}

#endif

constexpr int64_t kLevelRows = 8;  // of A at once: 16 accumulators, 4 vectors of levels, 2 of a row, 1 mask, of 32 registers

// int4 levels 0 to 15 times R rows of A, for the `blocks` blocks of 32 k of one group at b, in whole numbers: sums [R][2] of 16
// columns each. Unlike signed ones, levels go into the instructions as they are; -8 * a_sums, of the group, undoes the shift.
template <int R>
inline __attribute__((always_inline)) void multiply_levels(const int8_t* a, int64_t lda, const int32_t* a_sums, const uint8_t* b,
                                                           int64_t blocks, __m512i (&sums)[R][2], Ahead& ahead) {
  constexpr bool two = R <= 4;  // chains of additions to a sum: with few rows, one would wait for itself
  const __m512i nibble = _mm512_set1_epi8(15);
  __m512i more[R][2];
  repeat<R>(SKYLINE_EACH(r) {
    sums[r][0] = sums[r][1] = _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_slli_epi32(_mm512_set1_epi32(a_sums[r]), 3));
    more[r][0] = more[r][1] = _mm512_setzero_si512();
  });
  for (int64_t block = 0; block < blocks; block++, a += 16, b += 256)
    for (int part = 0; part < 4; part++, a += 4, b += 64) {  // not unrolled: addresses would take more registers than there are
      if constexpr (R >= kAskingRows) ahead.ask_for_two();
      const __m512i left = _mm512_loadu_si512(b), right = _mm512_loadu_si512(b + 256);
      const __m512i low[2] = {_mm512_and_si512(left, nibble), _mm512_and_si512(right, nibble)};
      const __m512i high[2] = {_mm512_and_si512(_mm512_srli_epi16(left, 4), nibble),
                               _mm512_and_si512(_mm512_srli_epi16(right, 4), nibble)};
      repeat<R>(SKYLINE_EACH(r) {
        const __m512i x = spread_four(a + r * lda), y = spread_four(a + r * lda + 16);
        repeat<2>(SKYLINE_EACH(t) {
          __m512i(&second)[2] = two ? more[r] : sums[r];
          sums[r][t] = _mm512_dpbusd_epi32(sums[r][t], low[t], x);
          second[t] = _mm512_dpbusd_epi32(second[t], high[t], y);
        });
      });
    }
  if constexpr (two)
    repeat<R>(SKYLINE_EACH(r) { repeat<2>(SKYLINE_EACH(t) { sums[r][t] = _mm512_add_epi32(sums[r][t], more[r][t]); }); });
}

#if defined(__AMX_TILE__)

// Widens int4 blocks of 32 k to int8 tiles, -8 to 7, for steps of 32 or 64 k.
inline void widen_int4(const uint8_t* from, int64_t blocks, int64_t step_k, uint8_t* to) {
  const __m512i nibble = _mm512_set1_epi8(15), eight = _mm512_set1_epi8(8);
  const int64_t tile = step_k * kTile;
  for (int64_t block = 0; block < blocks; block++) {
    uint8_t* at = to + block * 32 / step_k * 2 * tile + block * 32 % step_k * kTile;
    for (int t = 0; t < 2; t++, at += tile)
      for (int part = 0; part < 4; part++, from += 64) {
        prefetch_l2(from + kAhead);
        const __m512i bytes = _mm512_loadu_si512(from);
        const __m512i low = _mm512_and_si512(bytes, nibble), high = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), nibble);
        _mm512_storeu_si512(at + 64 * part, _mm512_sub_epi8(low, eight));
        _mm512_storeu_si512(at + 64 * part + 256, _mm512_sub_epi8(high, eight));
      }
  }
}

#endif

}  // namespace skyline
